# shellcheck shell=bash
# Sourced by scripts/fleet.sh: the scenarios in which something of the fleet stops, hangs or cannot be reached.

is_away() { is_missing "state/hosts/$1"; }                         # HOST: its lease has ended
is_back() { serves "$1" "$2" && is_missing "state/permits/$1/web"; } # HOST VERSION
has_passed() { [ $(($(now_ms) - $1)) -ge "$2" ]; }                  # SINCE MS
serves_any() { [ -n "$(version_of "$1")" ]; }                       # HOST
another_leads() { [ -n "$(leader)" ] && [ "$(leader)" != "$1" ]; }  # HOST
# The leader knows that the host takes turns, and what it serves.
takes_part() { # HOST
    [[ $(get "state/hosts/$1") == *rollouts* && $(get "state/apps/$1/web") == *'"healthy":1'* ]]
}
# A container of the release runs there.
is_starting() { [ -n "$(on "$1" docker ps --quiet --filter "label=demae.release=$release")" ]; } # HOST
# shellcheck disable=SC2016 # it is the shell of the host that reads the file
is_suspended() { on "$1" sh -c 'grep -q "^State:.T" "/proc/$(cat /run/agent.pid)/status"'; } # HOST
terms_ended() { on "$1" grep -c 'this agent leads no more' /var/log/demae.log || true; }     # HOST
has_stepped_down() { [ "$(terms_ended "$1")" -gt "$2" ]; }                                   # HOST TERMS

scenario_cut_off() {
    put_spec 15s
    deploy v3
    await 30 "host1 serves v3 in its turn" in_switched_turn host1 v3
    cut_off host1
    local cut connected proof
    cut=$(now_ms)
    await 60 "the lease of host1 has ended" is_away host1
    expect_turns host1
    serves host1 v3 || fail "host1 serves $(version_of host1)"
    connect host1
    cut=$(since "$cut") connected=$(now_ms)
    put_spec 2s
    await 30 "host1 writes that it has proven v3" has_proven host1 "$release"
    proof=$(since "$connected")
    finish v3
    expect_turns "host1 host2 host3"
    passed cut_off "host1 for $cut in its turn; its proof came $proof later, all was done after $(since "$connected")"
}

scenario_suspended_agent() {
    local old stopped moved back
    old=$(rollout release)
    put_spec 20s
    signal_agent host1 TERM
    await 20 "the agent of host1 has ended" agent_ended host1
    # It suspends itself after it has written that it switches, and before it moves requests.
    start_agent host1 --env DEMAE_STANDSTILL=switch
    await 60 "host1 takes part again" takes_part host1
    deploy v4
    await 60 "host1 has written that it switches" permit_is host1 switch
    await 10 "the agent of host1 is suspended" is_suspended host1
    stopped=$(now_ms) moved="before requests moved"
    serves host1 v4 && moved="after requests had moved"
    put apps/web/release "$old"
    await 60 "the rollout is pinned to the release before" is_pinned "$old"
    await 60 "the lease of host1 has ended" is_away host1
    await 100 "three leases have passed" has_passed "$stopped" 90000
    all_serve "$version" host2 host3 || fail "host2 and host3 do not serve $version any more"
    signal_agent host1 CONT
    back=$(now_ms)
    await 90 "host1 serves $version, and its turn has ended" is_back host1 "$version"
    back=$(since "$back")
    expect_turns host1
    put_spec 2s
    del apps/web/release
    await 30 "the rollout of v4 goes on" is_release "$release"
    finish v4
    passed suspended_agent "host1 for 90 s $moved; $back later it had given its turn back"
}

# It serves the release meanwhile, and is not monitored.
scenario_suspended_monitoring() {
    local old stopped back ended
    old=$(rollout release)
    put_spec 30s
    deploy v5
    await 30 "host1 serves v5 in its turn" in_switched_turn host1 v5
    signal_agent host1 STOP
    stopped=$(now_ms)
    put apps/web/release "$old"
    await 60 "the rollout is pinned to the release before" is_pinned "$old"
    await 60 "the lease of host1 has ended" is_away host1
    serves host1 v5 || fail "host1 serves $(version_of host1)"
    all_serve "$version" host2 host3 || fail "host2 and host3 do not serve $version any more"
    stopped=$(since "$stopped")
    signal_agent host1 CONT
    back=$(now_ms)
    await 30 "host1 serves $version" serves host1 "$version"
    ended=$back back=$(since "$back")
    await 90 "the turn of host1 has ended" is_back host1 "$version"
    ended=$(since "$ended")
    expect_turns host1
    put_spec 2s
    del apps/web/release
    await 30 "the rollout of v5 goes on" is_release "$release"
    finish v5
    passed suspended_monitoring "host1 for $stopped with requests on v5; $back later they were on the pinned release," \
        "and its turn ended after $ended"
}

# Before it has moved requests: its turn ends with its lease, and it has another one later.
scenario_killed_trying() {
    local killed
    deploy slow1
    await 30 "host1 starts the release in its turn" is_starting host1
    permit_is host1 try || fail "host1 has moved requests already"
    stop_load host1
    kill_host host1
    killed=$(now_ms)
    await 60 "the lease of host1 has ended" is_away host1
    await 60 "the rollout of slow1 is done without host1" rollout_is done "$release"
    killed=$(since "$killed")
    boot_host host1
    await 60 "host1 serves again" serves_any host1
    start_load host1
    finish slow1
    passed killed_trying "host1 in its turn, before it moved requests; the others had proven it $killed later"
}

# While requests are on the release, and it is monitored.
scenario_killed_host() {
    put_spec 15s
    deploy v6
    await 30 "host1 serves v6 in its turn" in_switched_turn host1 v6
    stop_load host1
    kill_host host1
    local killed booted serving
    killed=$(now_ms)
    await 60 "the lease of host1 has ended" is_away host1
    expect_turns host1
    boot_host host1
    killed=$(since "$killed") booted=$(now_ms)
    # The version that it served, or the one before, until its turn goes on.
    await 60 "host1 serves again" serves_any host1
    serving=$(since "$booted")
    start_load host1
    put_spec 2s
    finish v6
    expect_turns "host1 host2 host3"
    passed killed_host "host1 off for $killed in its turn; served $serving after its start," \
        "all was done after $(since "$booted")"
}

turn_of_another() { # HOST
    local host
    for host in "${hosts[@]}"; do
        if [ "$host" != "$1" ] && exists "state/permits/$host/web"; then return 0; fi
    done
    return 1
}

scenario_leader_killed() {
    local old killed leads
    put_spec 5s
    old=$(leader)
    deploy v7
    await 60 "a host that does not lead has a turn" turn_of_another "$old"
    signal_agent "$old" KILL
    killed=$(now_ms)
    await 40 "another agent leads" another_leads "$old"
    leads=$(since "$killed")
    start_agent "$old"
    put_spec 2s
    finish v7
    passed leader_killed "the agent of $old; $(leader) leads after $leads, done after $(since "$killed")"
}

scenario_leader_suspended() {
    local old stopped leads finished next ended others
    old=$(leader)
    others=("${hosts[@]/$old/}")
    ended=$(terms_ended "$old")
    signal_agent "$old" STOP
    stopped=$(now_ms)
    deploy v8
    await 40 "another agent leads" another_leads "$old"
    next=$(leader) leads=$(since "$stopped")
    # shellcheck disable=SC2068 # the empty word is left out
    await 60 "the others serve v8" all_serve v8 ${others[@]}
    finished=$(since "$stopped")
    await 70 "it was suspended for a minute" has_passed "$stopped" 60000
    signal_agent "$old" CONT
    await 30 "$old steps down" has_stepped_down "$old" "$ended"
    [ "$(leader)" = "$next" ] || fail "$(leader) leads, and not $next"
    finish v8
    passed leader_suspended "the agent of $old for 60 s; $next leads after $leads, the others serve v8 after $finished"
}

scenario_etcd_member_killed() {
    local member killed
    put_spec 3s
    deploy v9
    await 30 "host1 has a turn" exists state/permits/host1/web
    member=$(etcd_leader)
    docker kill "$prefix-$member" >/dev/null
    killed=$(now_ms)
    finish v9
    killed=$(since "$killed")
    docker start "$prefix-$member" >/dev/null
    await 60 "all members of etcd are healthy" members_are_healthy
    put_spec 2s
    passed etcd_member_killed "$member, which led etcd; the rollout was done $killed later"
}

scenario_away_for_two() {
    local back
    stop_load host3
    kill_host host3
    await 60 "the lease of host3 has ended" is_away host3
    for version in v10 v11; do
        deploy $version
        await 60 "the rollout of $version is done" rollout_is done "$release"
    done
    boot_host host3
    back=$(now_ms)
    await 60 "host3 serves" serves_any host3
    start_load host3
    await 60 "host3 serves v11" serves host3 v11
    back=$(since "$back")
    at_rest v11
    passed away_for_two "host3 serves the newest $back after its start"
}
