# etcd, nginx and Prometheus from Debian's packages, for a machine without access to a registry: scripts/stack-images.sh
# builds it. Programs are where the official images have them, so that one compose file serves both.
FROM debian:bookworm-slim
# etcd and Prometheus are single programs; their packages would bring users, services and fonts that are not needed here.
RUN set -eu; \
    apt-get update -qq; \
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends nginx curl >/dev/null; \
    mkdir /tmp/packages; \
    cd /tmp/packages; \
    apt-get download -qq etcd-server etcd-client prometheus; \
    for package in *.deb; do dpkg-deb -x "$package" .; done; \
    install usr/bin/etcd usr/bin/etcdctl /usr/local/bin; \
    install usr/bin/prometheus usr/bin/promtool /bin; \
    rm -rf /tmp/packages /var/lib/apt/lists/* /var/cache/apt/*.bin; \
    nginx -V; etcd --version; /bin/prometheus --version
