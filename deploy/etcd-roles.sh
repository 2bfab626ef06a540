#!/usr/bin/env bash
# Makes the roles by which etcd limits who may write what. docs/security.md has the rights of each.
#
#   etcd-roles.sh host NAME     the agent of a host: user and role host-NAME
#   etcd-roles.sh lead NAME     also lets the agent of that host be elected as the leader
#   etcd-roles.sh deploy APP    for `demae deploy` and its neighbours, in CI: user and role deploy-APP
#   etcd-roles.sh put APP       for a CI that only puts the image, and reads no secret: user and role put-APP
#   etcd-roles.sh team APP      sets the variables of an app, and cannot read them: user and role team-APP
#
# Again changes nothing. Users are made without a password: they log in by a client certificate with their name (CN), or
# get a password by `etcdctl user passwd NAME`. `etcdctl` is used as you have set it up, as a user with the role root;
# ETCDCTL='echo etcdctl' only prints the commands. DEMAE_PREFIX is the prefix of all keys, /demae.
#
# These roles count once `etcdctl auth enable` was given, and hold on etcd 3.4.44, 3.5.30, 3.6.11 and later.
set -euo pipefail

prefix=${DEMAE_PREFIX:-/demae}
export ETCDCTL_API=3
read -ra etcdctl <<<"${ETCDCTL:-etcdctl}"

usage() {
    sed -n 's/^# \{0,1\}//; 2,15p' "$0" >&2
    exit 64
}
[ $# -eq 2 ] || usage
kind=$1 name=$2
[[ $name =~ ^[A-Za-z0-9][A-Za-z0-9._-]*$ ]] || {
    echo "error: \`$name\` is not the name of a host or an app" >&2
    exit 1
}

# What is there already is no error; everything else is.
ask() {
    local said
    if ! said=$("${etcdctl[@]}" "$@" 2>&1); then
        case $said in
        *'already exists'*) ;;
        *)
            echo "error: etcdctl $*: $said" >&2
            exit 1
            ;;
        esac
    elif [ -n "${ETCDCTL:-}" ]; then
        echo "$said"
    fi
}
role= # the one that is given rights
key() { ask role grant-permission "$role" "$1" "$prefix/$2"; }                     # RIGHT KEY
below() { ask role grant-permission --prefix=true "$role" "$1" "$prefix/$2"; }      # RIGHT DIRECTORY
range() { ask role grant-permission "$role" "$1" "$prefix/$2" "$prefix/$3"; }       # RIGHT FROM TO
make_role() { role=$1 && ask role add "$role"; }
make_user() { ask user add "$1" --no-password && ask user grant-role "$1" "$role"; }

case $kind in
host)
    make_role "host-$name"
    # apps/, cluster, env/, freeze and hosts/: all that people write. The variables of all apps are among it.
    range read apps/ hosts0
    key readwrite secret/release-key
    below read secret/releases/
    below read state/
    key readwrite "state/hosts/$name"
    key readwrite "state/fence/$name"
    for what in apps permits proven; do below readwrite "state/$what/$name/"; done
    # By app first: etcd cannot limit them to one host.
    for what in verdicts commands digests lost; do below readwrite "state/$what/"; done
    make_user "host-$name"
    ;;
lead)
    make_role lead
    range read apps/ state0
    below readwrite secret/releases/
    key readwrite state/leader
    for what in rollouts permits releases lost verdicts commands digests; do below readwrite "state/$what/"; done
    ask user grant-role "host-$name" lead
    ;;
deploy)
    make_role "deploy-$name"
    # An app is checked as an agent would check it, so this reads what an agent reads.
    range read apps/ hosts0
    key read secret/release-key
    below read state/
    for what in image release restart promote retry by; do key readwrite "apps/$name/$what"; done
    # `demae retry` deletes what hosts have found.
    below readwrite "state/verdicts/$name/"
    make_user "deploy-$name"
    ;;
put)
    make_role "put-$name"
    key readwrite "apps/$name/image"
    below read state/apps/
    make_user "put-$name"
    ;;
team)
    make_role "team-$name"
    below write "env/$name/"
    for what in restart paused; do key readwrite "apps/$name/$what"; done
    below read state/apps/
    make_user "team-$name"
    ;;
*) usage ;;
esac
