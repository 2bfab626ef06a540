# shellcheck shell=bash
# Sourced by scripts/fleet.sh: what is read from etcd, from the load and from the hosts, and what must always hold.

fail() {
    echo "FAIL $*" >&2
    exit 1
}

# Waits until a command succeeds. A request that fails meanwhile ends it at once.
await() { # SECONDS WHAT COMMAND...
    local end=$((SECONDS + $1)) what=$2
    shift 2
    until "$@"; do
        no_failures
        [ $SECONDS -lt $end ] || fail "waited in vain until $what"
        sleep 0.1
    done
}

now_ms() { echo $((${EPOCHREALTIME//[.,]/} / 1000)); }
since() { # MS: the time since then, in seconds
    local tenths=$((($(now_ms) - $1) / 100))
    echo "$((tenths / 10)).$((tenths % 10)) s"
}

# --- etcd ---

put() { etcdctl put "/demae/$1" "$2" >/dev/null; }
del() { etcdctl del "/demae/$1" >/dev/null; }
# A member of etcd that is gone is noticed by the wait that asks again.
get() { etcdctl get --print-value-only "/demae/$1" 2>>"$work/etcdctl.log"; }
exists() { [ -n "$(get "$1")" ]; }
is_missing() { # KEY; not if etcd does not answer
    local value
    value=$(get "$1") && [ -z "$value" ]
}
field() { sed -n "s/.*\"$1\":\"\([^\"]*\)\".*/\1/p"; } # NAME: of a record on standard input
leader() { get state/leader | field host; }
rollout() { get state/rollouts/web | field "$1"; } # FIELD
rollout_is() { [ "$(rollout phase)" = "$1" ] && [ "$(rollout release)" = "$2" ]; } # PHASE RELEASE
permit_is() { [ "$(get "state/permits/$1/web" | field phase)" = "$2" ]; }          # HOST PHASE
has_proven() { [ "$(get "state/proven/$1/web" | field release)" = "$2" ]; }        # HOST RELEASE
no_permits() {
    local permits
    permits=$(etcdctl get --prefix --keys-only /demae/state/permits/) && [ -z "$permits" ]
}
# Hosts on which a release failed.
verdicts() { etcdctl get --prefix --keys-only "/demae/state/verdicts/web/$1/" | sed -n 's|.*/||p' | xargs; }

members_are_healthy() { etcdctl endpoint health >/dev/null 2>&1; }
# The member that leads etcd itself.
etcd_leader() {
    local endpoint
    endpoint=$(etcdctl endpoint status --write-out simple | awk -F', *' '$5 == "true" {print $1}')
    endpoint=${endpoint%:*}
    echo "etcd${endpoint##*.1}"
}

# Keeps all that is written to etcd in a file, one line a write, each with its time: what happened between two looks.
follow_store() {
    local kind key value
    etcdctl watch --prefix /demae 2>"$work/watch.log" > >(
        # Every value is one line.
        while IFS= read -r kind && IFS= read -r key && IFS= read -r value; do
            echo "$(now_ms) $kind ${key#/demae/} $value"
        done >"$work/store.log"
    ) &
    clients[watch]=$!
    await 10 "writes to etcd are followed" store_log_is_up_to_date
}

# Writes a mark, and finds it in the file: all that was written before is there too.
mark=0
store_log_is_up_to_date() {
    mark=$((mark + 1))
    etcdctl put /demae-fleet/mark "mark-$mark-" >/dev/null && sleep 0.1 && grep -q "mark-$mark-" "$work/store.log"
}
settle_store_log() { await 20 "the log of etcd is complete" store_log_is_up_to_date; }

# The hosts that had a turn for a release, in their order.
turns() { # RELEASE
    awk -v release="\"release\":\"$1\"" '$2 == "PUT" && $3 ~ /^state\/permits\// && index($0, release) {
        split($3, path, "/"); if (!(path[3] in seen)) printf "%s%s", n++ ? " " : "", path[3]; seen[path[3]] = 1
    }' "$work/store.log"
}

# --- load ---

declare -A clients # process ids, by what they do
requests_before=0

start_load() { # HOST
    rm -f "$work/stop-$1"
    "$work/load" "$(address "$1"):80" web.test 50 "$work/stop-$1" >>"$work/load-$1.log" &
    clients[$1]=$!
}

# Requests in flight end first, so that each counts.
stop_load() { # HOST
    touch "$work/stop-$1"
    wait "${clients[$1]}"
    unset "clients[$1]"
    no_failures
}

end_clients() {
    local client
    for client in "${!clients[@]}"; do kill "${clients[$client]}" 2>/dev/null; done
    wait
}

no_failures() {
    if grep -s ' failed ' "$work"/load-*.log; then fail "requests failed"; fi
}

# A client that is started again counts from zero.
total_requests() {
    cat "$work"/load-*.log |
        awk '$2 == "begin" {sum += last; last = 0} $2 == "total" {last = $3} END {print sum + last}'
}

slowest_since() { # MS
    awk -v from="$1" '$2 == "begin" {base[FILENAME] = 0}
        $2 == "total" && $1 >= from && $5 > worst {worst = $5} END {print worst + 0}' "$work"/load-*.log
}

version_of() { # HOST: what it answers with now
    curl -s --max-time 5 --header 'Host: web.test' "http://$(address "$1")/" | sed -n 's/^version=\([^ ]*\) .*/\1/p'
}
serves() { [ "$(version_of "$1")" = "$2" ]; } # HOST VERSION
all_serve() { # VERSION [HOST...]
    local host version=$1
    shift
    [ $# -gt 0 ] || set -- "${hosts[@]}"
    for host in "$@"; do serves "$host" "$version" || return 1; done
}

# --- what must always hold ---

# The most hosts that had a permit at the same time, and the most whose requests were answered by a release that they
# had never proven.
most_at_once() {
    awk '
        FILENAME ~ /load-/ && $2 == "release" {
            host = FILENAME; sub(/.*load-/, "", host); sub(/\.log$/, "", host)
            print $1, "serves", host, $3
        }
        $3 ~ /^state\/permits\// {split($3, path, "/"); print $1, $2 == "PUT" ? "permit" : "no-permit", path[3], "-"}
        $3 ~ /^state\/proven\// && match($0, /"release":"[^"]*"/) {
            split($3, path, "/"); print $1, "proven", path[3], substr($0, RSTART + 11, RLENGTH - 12)
        }' "$work"/load-*.log "$work/store.log" | sort --stable --key 1,1n | awk '
        $2 == "serves" {serves[$3] = $4}
        $2 == "proven" {proven[$3, $4] = 1}
        $2 == "permit" {permit[$3] = 1}
        $2 == "no-permit" {delete permit[$3]}
        {
            permits = unproven = 0
            for (host in permit) permits++
            for (host in serves) if (!((host, serves[host]) in proven)) unproven++
            if (permits > most) most = permits
            if (unproven > worst) worst = unproven
        }
        END {print most + 0, worst + 0}'
}

begin_scenario() {
    began=$(now_ms)
    requests_before=$(total_requests)
}

passed() { # SCENARIO FIGURES...
    local most unproven
    settle_store_log
    no_failures
    read -r most unproven <<<"$(most_at_once)"
    [ "$most" -le 1 ] || fail "$1: $most hosts had a permit at the same time"
    [ "$unproven" -le 1 ] || fail "$1: $unproven hosts served a release that they had not proven"
    echo "ok  $1: ${*:2}; $(since "$began"), requests: $(($(total_requests) - requests_before)), failed: 0," \
        "slowest $(slowest_since "$began") ms"
}
