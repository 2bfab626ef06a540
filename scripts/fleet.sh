#!/usr/bin/env bash
# A real fleet on one machine: three hosts, each a container with a Docker engine, nginx and agent of its own, and an
# etcd of three members. Releases go over the hosts under load, while hosts are cut off, suspended and killed. No
# request to a host that is up may fail, and at most one host may serve a release that it has not proven.
#
#   scripts/fleet.sh                     all scenarios, 12 min
#   scripts/fleet.sh good bad_release    only these; scripts/fleet/scenarios.sh lists them
#
# DEMAE_FLEET_AGENT=FILE takes that agent and builds none; for all scenarios it needs the feature `failpoints`.
# DEMAE_FLEET_INGRESS=port has the app listen on a TCP port in place of a socket.
# DEMAE_FLEET_EVIDENCE=DIR keeps the logs, and what is in etcd, there.
#
# Names and networks are its own, so that it runs beside another one. It needs root in its containers, and no more
# rights on this machine than to use Docker.
set -euo pipefail
cd "$(dirname "$0")/.."

suffix=$(od -An -N4 -tx1 /dev/urandom | tr -d ' \n')
prefix=demae-fleet-$suffix
hosts=(host1 host2 host3)
. scripts/fleet/hosts.sh
. scripts/fleet/checks.sh
. scripts/fleet/scenarios.sh
. scripts/fleet/faults.sh
. scripts/fleet/codes.sh

chosen=("$@")
[ $# -gt 0 ] || chosen=("${scenarios[@]}")
for scenario in "${chosen[@]}"; do
    declare -F "scenario_$scenario" >/dev/null || fail "there is no scenario $scenario; there are: ${scenarios[*]}"
done

work=$(mktemp -d)
clean_up() {
    local code=$?
    trap - EXIT INT TERM
    set +e
    if [ $code -ne 0 ]; then print_logs; fi
    if [ -n "${DEMAE_FLEET_EVIDENCE:-}" ]; then keep_evidence "$DEMAE_FLEET_EVIDENCE"; fi
    echo "cleaning up"
    end_clients
    remove_fleet
    rm -rf "$work"
    exit $code
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

echo "the agent, an app, and images of etcd and of a host"
build_fleet
echo "three members of etcd and three hosts come up"
start_fleet
first_release
for scenario in "${chosen[@]}"; do
    begin_scenario
    "scenario_$scenario"
done
for host in "${hosts[@]}"; do stop_load "$host"; done
no_failures
read -r permits unproven <<<"$(most_at_once)"
echo "ok  all: $(total_requests) requests, failed: 0; at most $permits host with a permit and $unproven on a release" \
    "that it had not proven; $((SECONDS / 60)) min $((SECONDS % 60)) s"
