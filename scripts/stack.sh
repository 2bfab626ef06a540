#!/usr/bin/env bash
# Brings the whole stack up by docker-compose.yml, deploys through it under load, reads the result back from Prometheus,
# takes etcd away for two minutes, and tears everything down again, whatever happened. Where no registry can be reached,
# the images are made from Debian's packages.
#
# Names, ports and directories are its own, so that it runs beside another one.
set -euo pipefail
cd "$(dirname "$0")/.."

suffix=$(od -An -N4 -tx1 /dev/urandom | tr -d ' \n')
dir=/tmp/demae-stack-$suffix
# `docker compose` where it is there, as on most machines; else Debian's.
if docker compose version >/dev/null 2>&1; then compose=(docker compose); else compose=(docker-compose); fi

free_port() {
    local port
    while port=$((10000 + RANDOM % 9000)) && (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do :; done
    echo "$port"
}

first=$((20000 + RANDOM % 90 * 100))
export COMPOSE_PROJECT_NAME=demaestack$suffix DEMAE_STACK_HOST=stack-$suffix
export DEMAE_STATE_DIR=$dir/state DEMAE_RUN_DIR=$dir/run
DEMAE_STACK_ETCD_PORT=$(free_port) DEMAE_STACK_ETCD_PEER_PORT=$(free_port) DEMAE_STACK_NGINX_PORT=$(free_port)
DEMAE_STACK_AGENT_PORT=$(free_port) DEMAE_STACK_PROMETHEUS_PORT=$(free_port)
export DEMAE_STACK_ETCD_PORT DEMAE_STACK_ETCD_PEER_PORT DEMAE_STACK_NGINX_PORT
export DEMAE_STACK_AGENT_PORT DEMAE_STACK_PROMETHEUS_PORT DEMAE_STACK_APP_PORTS=$first-$((first + 99))
export DEMAE_STACK_AGENT_IMAGE=demae-stack-$suffix-agent:local DEMAE_STACK_APP=demae-stack-$suffix-app
export DEMAE_STACK_EXAMPLE_IMAGE=$DEMAE_STACK_APP:v1 DEMAE_STACK_EXAMPLE_INGRESS='port: 8080'
export DEMAE_STACK_CHECK_INTERVAL=1s

# A registry for one image, so that one is pulled.
DEMAE_STACK_REGISTRY_PORT=$(free_port) DEMAE_STACK_WORK=$(mktemp -d)
export DEMAE_STACK_REGISTRY_PORT DEMAE_STACK_WORK DEMAE_STACK_CERTIFICATE=$PWD/tests/golden/certificate.pem
work=$DEMAE_STACK_WORK
clean_up() {
    local code=$?
    trap - EXIT INT TERM
    set +e
    if [ $code -ne 0 ]; then
        "${compose[@]}" ps
        "${compose[@]}" logs --no-color --tail 30 2>&1 | cut -c1-400
    fi
    echo "cleaning up"
    # What the agent and nginx wrote belongs to their users, and needs one of them to be removed.
    "${compose[@]}" stop >/dev/null 2>&1
    apps=$(docker ps -aq --filter "label=demae.host=$DEMAE_STACK_HOST")
    # shellcheck disable=SC2086 # one word for each container
    [ -z "$apps" ] || docker rm -fv $apps >/dev/null
    docker run --rm --entrypoint /bin/sh --volume "$dir:/stack" "$DEMAE_STACK_NGINX_IMAGE" -c 'rm -rf /stack/*' >/dev/null 2>&1
    "${compose[@]}" down -v >/dev/null 2>&1
    docker rmi -f "$DEMAE_STACK_AGENT_IMAGE" "$DEMAE_STACK_APP:v1" "$DEMAE_STACK_APP:v2" >/dev/null 2>&1
    scripts/stack-images.sh --remove "$suffix"
    rm -rf "$work"
    rmdir "$dir" 2>/dev/null
    exit $code
}
trap clean_up EXIT INT TERM
DEMAE_STACK_NGINX_IMAGE=

echo "images of etcd, nginx and Prometheus, the agent's, and two of an app"
images=$(scripts/stack-images.sh "$suffix")
while IFS='=' read -r name value; do export "$name=$value"; done <<<"$images"
DEMAE_IMAGE_PROFILE=${DEMAE_IMAGE_PROFILE:-dev} scripts/image.sh "$DEMAE_STACK_AGENT_IMAGE" >/dev/null
rustc --edition 2024 -O -C target-feature=+crt-static -C strip=symbols -o "$work/app" examples/app.rs
for version in v1 v2; do
    printf 'FROM scratch\nCOPY app /app\nENV VERSION=%s\nENTRYPOINT ["/app"]\n' $version \
        >"$work/Dockerfile"
    docker build --quiet --no-cache --force-rm --tag "$DEMAE_STACK_APP:$version" "$work" >/dev/null 2>&1
done

echo "the stack comes up: ${compose[*]} up -d"
mkdir -p "$dir"
"${compose[@]}" config -q
if ! "${compose[@]}" up -d >"$work/up.log" 2>&1; then
    cat "$work/up.log" >&2
    exit 1
fi
cargo run --quiet --example stack
