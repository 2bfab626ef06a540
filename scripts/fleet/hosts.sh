# shellcheck shell=bash
# Sourced by scripts/fleet.sh: the fleet comes up, and is taken down.

services= # the image of etcd, which the hosts are made from too
net=      # the first two numbers of all addresses

build_fleet() {
    local agent=${DEMAE_FLEET_AGENT:-} files=$work/image/files images program log
    if [ -z "$agent" ]; then
        # With the features of the tests, so that nothing is built twice: one of them stops an agent at a named step.
        cargo build --quiet --all-features --bin demae
        agent=target/debug/demae
    fi
    for program in app load; do
        rustc --edition 2024 -O -C target-feature=+crt-static -C strip=symbols -o "$work/$program" \
            "examples/$program.rs"
    done
    images=$(scripts/stack-images.sh "$suffix")
    services=$(sed -n 's/^DEMAE_STACK_ETCD_IMAGE=//p' <<<"$images")
    install -D -m 0755 "$agent" "$files/usr/local/bin/demae"
    install -D -m 0755 -t "$files/fleet" scripts/fleet/host/{boot,agent,images} "$work/app"
    install -D -m 0644 -t "$files/etc/demae" scripts/fleet/host/agent.toml
    install -D -m 0644 -t "$files/etc/nginx/conf.d" deploy/nginx/demae.conf
    # What it prints is of interest only if it fails; the older builder always complains of its age.
    if ! log=$(docker build --no-cache --force-rm --tag "$prefix-host:debian" --build-arg SERVICES="$services" \
        --file scripts/fleet/host/Dockerfile "$work/image" 2>&1); then
        echo "$log" >&2
        exit 1
    fi
}

# One network for the requests to all hosts, one for the members of etcd, and one for each host and etcd, so that a host
# can be cut off from etcd alone. They are internal: nothing in them reaches the world, or another network.
make_networks() {
    local tries host
    for tries in {1..30}; do
        net=10.$((64 + RANDOM % 128))
        if ip -o route show | grep -qF " $net."; then continue; fi
        if docker network create --internal --subnet "$net.20.0/24" "$prefix-requests" >/dev/null 2>&1; then break; fi
        [ "$tries" -lt 30 ] || fail "no network is free"
    done
    docker network create --internal --subnet "$net.10.0/24" "$prefix-members" >/dev/null
    for host in "${hosts[@]}"; do
        docker network create --internal --subnet "$net.1${host#host}.0/24" "$prefix-$host" >/dev/null
    done
}

# A member has the same last number in each network that it is in, and a host too.
member() { echo "$net.$2.1${1#etcd}"; } # MEMBER NETWORK
address() { echo "$net.20.10${1#host}"; } # HOST: where its nginx listens

start_members() {
    local member host peers=''
    for member in etcd1 etcd2 etcd3; do peers+=${peers:+,}$member=http://$(member $member 10):2380; done
    for member in etcd1 etcd2 etcd3; do
        docker create --name "$prefix-$member" --network "$prefix-members" --ip "$(member $member 10)" \
            --volume /var/lib/etcd "$services" etcd --name $member --data-dir /var/lib/etcd/data --logger zap \
            --listen-client-urls http://0.0.0.0:2379 --advertise-client-urls "http://$(member $member 10):2379" \
            --listen-peer-urls http://0.0.0.0:2380 --initial-advertise-peer-urls "http://$(member $member 10):2380" \
            --initial-cluster "$peers" >/dev/null
        for host in "${hosts[@]}"; do
            docker network connect --ip "$(member $member "1${host#host}")" "$prefix-$host" "$prefix-$member"
        done
        docker start "$prefix-$member" >/dev/null
    done
}

start_host() { # HOST
    local endpoints='' member
    for member in etcd1 etcd2 etcd3; do endpoints+=${endpoints:+,}http://$(member $member "1${1#host}"):2379; done
    # In the place of --privileged, which asks for all capabilities: not every machine has them to give.
    docker create --name "$prefix-$1" --hostname "$1" --network "$prefix-requests" --ip "$(address "$1")" \
        --cap-add SYS_ADMIN --cap-add NET_ADMIN --cap-add SYS_PTRACE --cap-add SYS_MODULE --cap-add DAC_READ_SEARCH \
        --cap-add MKNOD --cap-add SYS_NICE --cap-add SYSLOG --cap-add IPC_LOCK \
        --security-opt seccomp=unconfined --security-opt apparmor=unconfined --security-opt systempaths=unconfined \
        --volume /sys/fs/cgroup:/sys/fs/cgroup:rw --cgroupns host --device-cgroup-rule 'a *:* rwm' --tmpfs /run:exec \
        --env "FLEET_CGROUP=/$prefix-$1" --env "ETCDCTL_ENDPOINTS=$endpoints" "$prefix-host:debian" >/dev/null
    connect "$1"
    docker start "$prefix-$1" >/dev/null
}

connect() { docker network connect --ip "$net.1${1#host}.10${1#host}" "$prefix-$1" "$prefix-$1"; } # HOST: to etcd
cut_off() { docker network disconnect "$prefix-$1" "$prefix-$1"; }                               # HOST: from etcd
on() { # HOST COMMAND...
    local host=$1
    shift
    docker exec "$prefix-$host" "$@"
}
signal_agent() { on "$1" sh -c "kill -$2 \$(cat /run/agent.pid)"; } # HOST SIGNAL
start_agent() { docker exec --detach "${@:2}" "$prefix-$1" /fleet/agent; } # HOST [OPTION...]
agent_ended() { on "$1" sh -c '! kill -0 $(cat /run/agent.pid) 2>/dev/null'; } # HOST
engine_answers() { on "$1" docker version >/dev/null 2>&1; }                    # HOST
is_ready() { on "$1" demae ready >/dev/null 2>&1; }                             # HOST: its agent
kill_host() { docker kill "$prefix-$1" >/dev/null; }
boot_host() { docker start "$prefix-$1" >/dev/null; }

# All at once, and then an app that all of them serve, with load.
start_fleet() {
    local host
    make_networks
    start_members
    export ETCDCTL_API=3 ETCDCTL_DIAL_TIMEOUT=2s ETCDCTL_COMMAND_TIMEOUT=5s
    ETCDCTL_ENDPOINTS=$(member etcd1 10):2379,$(member etcd2 10):2379,$(member etcd3 10):2379
    export ETCDCTL_ENDPOINTS
    await 30 "etcd has a leader" members_are_healthy
    follow_store
    for host in "${hosts[@]}"; do start_host "$host"; done
    for host in "${hosts[@]}"; do
        await 60 "the engine of $host answers" engine_answers "$host"
        on "$host" /fleet/images
        await 60 "the agent of $host is ready" is_ready "$host"
    done
    on host1 demae init >/dev/null
}

# Everything below these names, whatever state it is in. The engines of hosts leave their control groups behind, which
# are the machine's.
remove_fleet() {
    local containers networks
    containers=$(docker ps --all --quiet --filter "name=^/?$prefix-")
    # shellcheck disable=SC2086 # one word for each
    [ -z "$containers" ] || docker rm --force --volumes $containers >/dev/null
    if [ -n "$services" ]; then
        docker run --rm --volume /sys/fs/cgroup:/sys/fs/cgroup:rw --cgroupns host "$services" \
            find /sys/fs/cgroup -depth -type d -path "*/$prefix-host*" -exec rmdir {} + 2>/dev/null
    fi
    networks=$(docker network ls --quiet --filter "name=^$prefix-")
    # shellcheck disable=SC2086 # one word for each
    [ -z "$networks" ] || docker network rm $networks >/dev/null
    docker rmi --force "$prefix-host:debian" >/dev/null 2>&1
    scripts/stack-images.sh --remove "$suffix"
}

print_logs() {
    local host
    for host in "${hosts[@]}"; do
        echo "== $host =="
        docker logs --tail 10 "$prefix-$host" 2>&1
        docker cp "$prefix-$host:/var/log/demae.log" "$work/$host.log" >/dev/null 2>&1
        tail -n 20 "$work/$host.log" 2>/dev/null | cut -c1-300
    done
    echo "== what agents wrote to etcd =="
    grep -Ev "state/(apps|fence)" "$work/store.log" 2>/dev/null | tail -n 30 | cut -c1-300
}

keep_evidence() { # DIRECTORY
    local host file
    mkdir -p "$1"
    for host in "${hosts[@]}"; do
        for file in demae dockerd nginx/error; do
            docker cp "$prefix-$host:/var/log/$file.log" "$1/$host-$(basename $file).log" >/dev/null 2>&1
        done
    done
    etcdctl get --prefix /demae/ >"$1/etcd.txt" 2>&1
    cp "$work"/*.log "$1"
}
