# shellcheck shell=bash
# Sourced by scripts/fleet.sh: what all scenarios have in common, and those in which nothing breaks but a release. Each
# begins and ends with one version on all hosts, which is `version`. Load is on all hosts that are up.

scenarios=(good bad_release sickens_later cut_off suspended_agent suspended_monitoring killed_trying killed_host
    leader_killed leader_suspended etcd_member_killed away_for_two three_bad pinned drained commanded verbs codes)
version=v1 # what all hosts serve
release=   # the release of the rollout that was opened last
before=    # the release of the rollout before that

# One line, since each value is a line of the log of etcd.
put_spec() { # MONITOR [RELEASE-COMMAND]
    local way='socket: /run/app/app.sock' listen='SOCKET: /run/app/app.sock'
    if [ "${DEMAE_FLEET_INGRESS:-socket}" = port ]; then way='port: 8080' listen='PORT: 8080'; fi
    put apps/web/spec "{image: 'fleet/web:v1', environment: {$listen}, stop_grace_period: 2s, \
healthcheck: {http: /healthz, interval: 500ms, retries: 2, start_period: 10s}, \
ingress: {hosts: [web.test], $way, drain: 5s}, \
deploy: {update_config: {parallelism: 1, monitor: $1}}${2:+, release_command: [$2]}}"
}

first_release() {
    local host
    put_spec 2s
    await 60 "all hosts serve the first release" all_serve v1
    at_rest v1
    for host in "${hosts[@]}"; do start_load "$host"; done
}

# The status of each host says so too: the leader goes by it when it looks for the first host.
is_at_rest() { # VERSION
    local host status serving
    no_permits || return 1
    all_serve "$1" || return 1
    for host in "${hosts[@]}"; do
        status=$(get "state/apps/$host/web")
        [[ $status == *'"healthy":1'* ]] || return 1
        serving=$(field serving <<<"$status")
        has_proven "$host" "${serving:-$(field release <<<"$status")}" || return 1
    done
}
at_rest() { await 90 "all hosts serve $1, and no turn is open" is_at_rest "$1"; } # VERSION

another_rollout() {
    local now
    now=$(rollout release)
    [ -n "$now" ] && [ "$now" != "$before" ]
}
# Waits until the leader has opened the rollout, which a new one does after a while.
deploy() { # IMAGE
    before=$(rollout release)
    put apps/web/image "fleet/web:$1"
    await 40 "a rollout of $1 is opened" another_rollout
    release=$(rollout release)
}
# Goes over all hosts to the end.
finish() { # VERSION
    await 120 "the rollout of $1 is done" rollout_is done "$release"
    at_rest "$1"
    version=$1
}
expect_turns() { # HOSTS, in their order
    settle_store_log
    [ "$(turns "$release")" = "$1" ] || fail "these hosts had a turn, in this order: $(turns "$release")"
}
in_switched_turn() { permit_is "$1" switch && serves "$1" "$2"; } # HOST VERSION
is_release() { [ "$(rollout release)" = "$1" ]; }
is_pinned() { is_release "$1" && [[ $(get state/rollouts/web) == *'"pinned":true'* ]]; }

scenario_good() {
    deploy v2
    finish v2
    expect_turns "host1 host2 host3"
    local host
    for host in "${hosts[@]}"; do has_proven "$host" "$release" || fail "$host has not proven v2"; done
    passed good "v2 on three hosts, one after the other"
}

# On the first host alone, which goes back.
expect_one_failure() { # VERSION-THAT-FAILED
    await 60 "the rollout of $1 is reverted" rollout_is reverted "$release"
    at_rest "$version"
    expect_turns host1
    [ "$(verdicts "$release")" = host1 ] || fail "$1 failed on: $(verdicts "$release")"
    local host
    for host in host2 host3; do
        [ -z "$(on "$host" docker ps --all --quiet --filter "label=demae.release=$release")" ] ||
            fail "$host has a container of $1"
    done
}

scenario_bad_release() {
    deploy exits1
    expect_one_failure exits1
    if grep -q " release $release " "$work"/load-*.log; then fail "requests were answered by exits1"; fi
    passed bad_release "a release that ends at once, on host1 alone; $version serves"
}

scenario_sickens_later() {
    put_spec 30s
    deploy sickens1
    await 30 "host1 serves it" serves host1 sickens1
    local moved
    moved=$(now_ms)
    await 30 "host1 serves $version again" serves host1 "$version"
    moved=$(since "$moved")
    expect_one_failure sickens1
    put_spec 2s
    passed sickens_later "served on host1 alone for $moved, then $version again"
}

scenario_three_bad() {
    local bad
    for bad in exits2 exits3 exits4; do
        deploy $bad
        expect_one_failure $bad
    done
    passed three_bad "each on host1 alone; $version serves"
}

scenario_pinned() {
    local old pinned
    # What is pinned is a release that all hosts had, and another one is wanted meanwhile.
    deploy v12
    finish v12
    old=$release
    deploy v13
    finish v13
    put apps/web/release "$old"
    pinned=$(now_ms)
    await 60 "all hosts serve v12" all_serve v12
    pinned=$(since "$pinned")
    is_pinned "$old" || fail "the rollout is not pinned: $(get state/rollouts/web)"
    at_rest v12
    del apps/web/release
    await 30 "the rollout of v13 goes on" is_release "$release"
    finish v13
    passed pinned "all hosts on the pinned release after $pinned; v13 again once the pin was deleted"
}

has_no_app() { is_missing "state/apps/$1/web" && [ -z "$(on "$1" docker ps --all --quiet)" ]; } # HOST

scenario_drained() {
    local drained active
    stop_load host2
    put hosts/host2/mode drained
    drained=$(now_ms)
    await 60 "host2 has no app" has_no_app host2
    drained=$(since "$drained")
    all_serve "$version" host1 host3 || fail "the other hosts do not serve $version"
    del hosts/host2/mode
    active=$(now_ms)
    await 60 "host2 serves $version again" serves host2 "$version"
    active=$(since "$active")
    start_load host2
    at_rest "$version"
    passed drained "host2 was empty after $drained, and served again $active after it was active"
}

# How often the engines have started a container of a release command since a time, by their own account.
commands_started() { # SECONDS-SINCE-1970
    local host sum=0 count
    for host in "${hosts[@]}"; do
        count=$(on "$host" docker events --since "$1" --until "$(date +%s)" --filter event=start \
            --format '{{.Actor.Attributes.name}}' | grep -c '\.command$' || true)
        sum=$((sum + count))
    done
    echo "$sum"
}

scenario_commanded() {
    local from count
    from=$(date +%s)
    put_spec 2s "exit, '0', '1500'"
    deploy v14
    await 30 "the release command runs" exists "state/commands/web/$release"
    all_serve "$version" || fail "a host serves another release before its command has ended"
    finish v14
    expect_turns "host1 host2 host3"
    # The engines report whole seconds.
    await 10 "the second is over" has_passed_second "$(date +%s)"
    count=$(commands_started "$from")
    [ "$count" = 1 ] || fail "the release command was started $count times"
    put_spec 2s
    passed commanded "started once on three hosts, before the release"
}
has_passed_second() { [ "$(date +%s)" -gt "$1" ]; } # SECONDS-SINCE-1970

# Runs a verb on a host, and compares its exit code.
verb() { # CODE ARGUMENTS...
    local expected=$1 code=0
    shift
    on host2 demae "$@" >>"$work/verbs.log" 2>&1 || code=$?
    [ "$code" = "$expected" ] || fail "demae $*: exit code $code: $(tail -n 5 "$work/verbs.log")"
}

scenario_verbs() {
    verb 3 deploy web fleet/web:exits5
    release=$(rollout release)
    expect_one_failure exits5
    verb 0 rollback web
    at_rest "$version"
    verb 0 deploy web fleet/web:v15
    release=$(rollout release)
    finish v15
    stop_load host3
    verb 0 hosts drain host3
    has_no_app host3 || fail "host3 has an app"
    verb 0 hosts activate host3
    await 60 "host3 serves v15 again" serves host3 v15
    start_load host3
    at_rest v15
    verb 0 wait web
    passed verbs "deploy of a bad release: 3; rollback, deploy, drain and activate: 0"
}
