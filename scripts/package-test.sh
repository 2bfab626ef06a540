#!/usr/bin/env bash
# The package on a bare Debian: a container with a Docker engine, nginx and etcd of its own, and no systemd, so the agent
# is started by hand. Install, `demae dev`, the role for Ansible, a deploy, an upgrade under load, a removal, and a purge that is refused.
#
#   scripts/package-test.sh    3 min; makes packages of the debug build first
#
# Needs root in its container, as scripts/fleet.sh does.
set -euo pipefail
cd "$(dirname "$0")/.."

suffix=$(od -An -N4 -tx1 /dev/urandom | tr -d ' \n')
name=demae-package-$suffix
services=
work=$(mktemp -d)

fail() {
    echo "FAIL $*" >&2
    exit 1
}
clean_up() {
    local code=$?
    trap - EXIT INT TERM
    set +e
    if [ $code -ne 0 ]; then
        docker exec "$name" sh -c 'tail -n 15 /var/log/dockerd.log /var/log/demae.log /tmp/dev.log' 2>&1 | cut -c1-300
    fi
    docker rm --force --volumes "$name" >/dev/null 2>&1
    if [ -n "$services" ]; then
        docker run --rm --volume /sys/fs/cgroup:/sys/fs/cgroup:rw --cgroupns host "$services" \
            find /sys/fs/cgroup -depth -type d -path "*/$name*" -exec rmdir {} + 2>/dev/null
    fi
    docker rmi --force "$name:debian" >/dev/null 2>&1
    scripts/stack-images.sh --remove "$suffix"
    rm -rf "$work"
    exit $code
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

on() { docker exec "$name" "$@"; }
await() { # SECONDS WHAT COMMAND...
    local end=$((SECONDS + $1)) what=$2
    shift 2
    until "$@" >/dev/null 2>&1; do
        [ $SECONDS -lt $end ] || fail "waited in vain until $what"
        sleep 0.2
    done
}
answers() { on curl -sf --max-time 5 -H 'Host: web.example.com' http://127.0.0.1/ | grep -q "version=$1"; } # VERSION

echo "two packages"
for version in '' +1; do
    DEMAE_VERSION_SUFFIX=$version scripts/package.sh --debug >/dev/null 2>&1
    cp target/dist/*.deb "$work/demae$version.deb"
done

echo "a bare Debian"
images=$(scripts/stack-images.sh "$suffix")
services=$(sed -n 's/^DEMAE_STACK_ETCD_IMAGE=//p' <<<"$images")
for program in app load; do
    rustc --edition 2024 -O -C target-feature=+crt-static -C strip=symbols -o "$work/$program" "examples/$program.rs"
done
cat >"$work/boot" <<'BOOT'
#!/bin/bash
set -eu
for path in /sys /proc/sys; do
    if mountpoint --quiet $path; then mount -o remount,rw $path; fi
done
etcd --data-dir /var/lib/etcd/data --logger zap >/var/log/etcd.log 2>&1 &
nginx
exec dockerd --storage-driver=overlay2 --bip=172.29.0.1/24 --cgroup-parent="$CGROUP" >/var/log/dockerd.log 2>&1
BOOT
chmod +x "$work/boot"
cat >"$work/Dockerfile" <<DOCKERFILE
FROM $services
RUN apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
    docker.io iptables nftables iproute2 curl procps ansible-core cloud-init >/dev/null && rm -rf /var/lib/apt/lists/* /etc/nginx/sites-enabled/default
COPY app load boot demae.deb demae+1.deb /test/
VOLUME /var/lib/docker /var/lib/demae
ENTRYPOINT ["/test/boot"]
DOCKERFILE
docker build --no-cache --force-rm --tag "$name:debian" "$work" >"$work/log" 2>&1 || fail "$(cat "$work/log")"
docker run --detach --name "$name" --hostname bare \
    --cap-add SYS_ADMIN --cap-add NET_ADMIN --cap-add SYS_PTRACE --cap-add SYS_MODULE --cap-add DAC_READ_SEARCH \
    --cap-add MKNOD --cap-add SYS_NICE --cap-add SYSLOG --cap-add IPC_LOCK \
    --security-opt seccomp=unconfined --security-opt apparmor=unconfined --security-opt systempaths=unconfined \
    --volume /sys/fs/cgroup:/sys/fs/cgroup:rw --cgroupns host --device-cgroup-rule 'a *:* rwm' --tmpfs /run:exec \
    --env "CGROUP=/$name" "$name:debian" >/dev/null
await 60 "the engine answers" on docker version
for version in v1 v2 v3; do
    on sh -c "tar -C /test -c app | docker import --change 'ENTRYPOINT [\"/app\"]' --change 'ENV VERSION=$version' - web:$version"
done >/dev/null

echo "install"
on dpkg --install /test/demae.deb >/dev/null
on test -e /etc/demae/agent.toml
[ -z "$(on sh -c 'ls /etc/systemd/system/*.wants 2>/dev/null | grep demae')" ] || fail "a unit is enabled"
on sh -c '! nginx -T 2>/dev/null | grep -q demae' || fail "nginx includes demae's files already"
on demae version >/dev/null
on sh -c 'test -s /usr/share/bash-completion/completions/demae && test -x /usr/bin/demae'

echo "demae dev"
docker exec --detach "$name" sh -c 'exec demae dev --dir /tmp/dev >/tmp/dev.log 2>&1'
await 60 "dev is ready" on sh -c '. /tmp/dev/dev.env && demae ready --agent "$DEMAE_METRICS"'
on sh -c '. /tmp/dev/dev.env; export ETCDCTL_API ETCDCTL_ENDPOINTS DEMAE_CONFIG DEMAE_METRICS
    printf "image: web:v1\nenvironment: {PORT: 8080}\ningress: {hosts: [dev.example.com], port: 8080}\n" |
    demae apply -f - --app dev --timeout 60s'
on pkill -INT -x demae
await 30 "dev has ended" on sh -c '! pgrep -x demae'

echo "the role for Ansible, twice"
docker cp deploy/ansible "$name:/test/ansible" >/dev/null
docker cp deploy/cloud-init.yaml "$name:/test/cloud-init.yaml" >/dev/null
on sh -c 'printf "[demae]\nlocalhost ansible_connection=local\n" >/test/ansible/hosts'
play() { on ansible-playbook -i /test/ansible/hosts -e demae_package=/test/demae.deb -e '{"demae_labels": {"role": "web"}}' /test/ansible/site.yml; }
play >"$work/play" 2>&1 || fail "$(cat "$work/play")"
play >"$work/play" 2>&1 || fail "$(cat "$work/play")"
grep -q 'changed=0 .*failed=0' "$work/play" || fail "the second run changes something: $(cat "$work/play")"
on sh -c 'nginx -T 2>/dev/null | grep -q demae' || fail "nginx does not include demae's files"
on grep -q 'role = "web"' /etc/demae/agent.toml
on cloud-init schema --config-file /test/cloud-init.yaml >"$work/play" 2>&1 || fail "$(cat "$work/play")"

echo "a deploy"
start_agent() {
    docker exec --detach "$name" sh -c 'mkdir -p /run/demae; exec demae agent --endpoints 127.0.0.1:2379 >>/var/log/demae.log 2>&1'
    await 60 "the agent is ready" on demae ready
}
start_agent
on demae init >/dev/null
on sh -c 'printf "image: web:v1\nenvironment: {PORT: 8080}\nhealthcheck: {http: /healthz}\ningress: {hosts: [web.example.com], port: 8080}\n" |
    demae apply -f - --app web --timeout 60s'
answers v1 || fail "the app does not answer"

echo "an upgrade under load"
docker exec --detach "$name" sh -c '/test/load 127.0.0.1:80 web.example.com 200 /tmp/stop >/tmp/load.log'
await 10 "there is load" on sh -c 'grep -q total /tmp/load.log'
on dpkg --install /test/demae+1.deb >/dev/null
# What the package does by systemd.
on pkill -TERM -x demae
await 30 "the agent has ended" on sh -c '! pgrep -x demae'
start_agent
on demae deploy web web:v2 --timeout 60s >/dev/null 2>&1
answers v2 || fail "the new release does not answer"
on touch /tmp/stop
await 20 "the load has ended" on sh -c '! pgrep -x load'
read -r _ _ requests failed _ < <(on tail -n 1 /tmp/load.log)
echo "    $requests requests, $failed failed"
[ "$failed" = 0 ] && [ "$requests" -gt 100 ] || fail "$(on grep failed /tmp/load.log | head -5)"

echo "remove"
on pkill -TERM -x demae
await 30 "the agent has ended" on sh -c '! pgrep -x demae'
on dpkg --remove demae >/dev/null
answers v2 || fail "the app does not answer without the package"
on nginx -t -q || fail "nginx does not take its files any more"

echo "purge"
if said=$(on dpkg --purge demae 2>&1); then fail "the purge took what nginx serves from"; fi
grep -q 'apps are served from /var/lib/demae' <<<"$said" || fail "the purge did not say why: $said"
answers v2 || fail "the app does not answer after the purge that was refused"
on test -e /etc/demae/agent.toml || fail "the settings are gone"
on dpkg --install /test/demae+1.deb >/dev/null
start_agent
on demae hosts drain bare --force >/dev/null 2>&1
await 30 "no route is left" on sh -c '! ls -A /var/lib/demae/tcp-routes /var/lib/demae/routes 2>/dev/null | grep -q web'
on pkill -TERM -x demae
await 30 "the agent has ended" on sh -c '! pgrep -x demae'
said=$(on dpkg --purge demae 2>&1) || fail "an empty host cannot be purged: $said"
on sh -c '! ls -A /var/lib/demae | grep -q . && test ! -e /etc/demae/agent.toml' || fail "the purge left something"
on nginx -t -q || fail "nginx does not take its files after the purge"
echo "ok  installed, upgraded, removed and purged; $requests requests, 0 failed"
