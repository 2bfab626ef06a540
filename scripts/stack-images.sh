#!/usr/bin/env bash
# Images for the stack where no registry can be reached, from Debian's packages:
#
#   scripts/stack-images.sh SUFFIX            makes demae-stack-SUFFIX/{etcd,nginx,prometheus}:debian
#   scripts/stack-images.sh --remove SUFFIX   removes them, and with the last of them what they were made from
#
# Prints the variables that docker-compose.yml takes them by. Also makes `debian:bookworm-slim`, unless it is here or
# can be pulled: the agent's image is built from it. What was made is kept in target/stack, so that the next run takes
# seconds; remove that directory to have it made anew.
set -euo pipefail
cd "$(dirname "$0")/.."

cache=target/stack
base=debian:bookworm-slim
services=demae-stack/services:debian

say() { echo "$*" >&2; }
have() { docker image inspect "$1" >/dev/null 2>&1; }
# The label that tells an image of ours from one that was pulled.
made_here() { [ "$(docker image inspect --format '{{index .Config.Labels "demae.stack"}}' "$1" 2>/dev/null)" = "$2" ]; }

usage() {
    say "usage: $0 [--remove] SUFFIX (small letters and digits)"
    exit 64
}
remove=
if [ "${1:-}" = --remove ]; then
    remove=yes
    shift
fi
suffix=${1:-}
if [ $# -ne 1 ] || ! [[ $suffix =~ ^[a-z0-9]+$ ]]; then usage; fi

mkdir -p "$cache"
# Two at a time would make the same, and one would remove what the other builds on.
exec 9>"$cache/lock"
flock 9

if [ -n "$remove" ]; then
    for name in etcd nginx prometheus; do
        if have "demae-stack-$suffix/$name:debian"; then docker rmi "demae-stack-$suffix/$name:debian" >/dev/null; fi
    done
    if [ -z "$(docker images --quiet 'demae-stack-*/*')" ]; then
        if have $services; then docker rmi $services >/dev/null; fi
        # One that was pulled stays.
        if made_here $base base; then docker rmi $base >/dev/null; fi
    fi
    exit 0
fi

make_base() {
    if [ ! -e "$cache/base.tar" ]; then
        if ! command -v debootstrap >/dev/null && [ ! -x /usr/sbin/debootstrap ]; then
            say "error: there is no debootstrap; \`scripts/install.sh stack\` installs it"
            exit 1
        fi
        say "making $base with debootstrap"
        local as_root=()
        [ "$(id -u)" -eq 0 ] || as_root=(sudo)
        "${as_root[@]}" scripts/base-tarball.sh "$cache/base.tar.new"
        mv -f "$cache/base.tar.new" "$cache/base.tar"
    fi
    docker import --change 'LABEL demae.stack=base' --change 'CMD ["bash"]' \
        --change 'ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin' \
        --message 'made with debootstrap' "$cache/base.tar" $base >/dev/null
}

make_services() {
    if [ -e "$cache/services.tar" ] && [ ! deploy/stack/debian.Dockerfile -nt "$cache/services.tar" ] &&
        docker load --quiet --input "$cache/services.tar" >/dev/null && have $services; then
        return
    fi
    say "installing etcd, nginx and Prometheus into an image"
    # What it prints is of interest only if it fails; the older builder always complains of its age.
    if ! log=$(docker build --tag $services --label demae.stack=services - <deploy/stack/debian.Dockerfile 2>&1); then
        say "$log"
        exit 1
    fi
    docker save --output "$cache/services.tar.new" $services
    mv "$cache/services.tar.new" "$cache/services.tar"
}

have $base || timeout 120 docker pull --quiet $base >/dev/null 2>&1 || make_base
have $services || make_services

# One image by three names: the compose file names the program.
for name in etcd nginx prometheus; do
    docker tag $services "demae-stack-$suffix/$name:debian"
    echo "DEMAE_STACK_${name^^}_IMAGE=demae-stack-$suffix/$name:debian"
done
