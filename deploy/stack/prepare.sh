#!/bin/sh
# Runs in the stack's `prepare` service, before all others: writes their configuration from the files beside this one,
# with each @NAME@ replaced by that variable, and creates the directories that non-root services write to.
set -eu
umask 022

fill() { # FILE DIRECTORY
    mkdir -p "/config/$2"
    sed -e "s|@HOST@|$HOST|g" \
        -e "s|@STATE_DIR@|$STATE_DIR|g" -e "s|@RUN_DIR@|$RUN_DIR|g" \
        -e "s|@ETCD_PORT@|$ETCD_PORT|g" -e "s|@NGINX_PORT@|$NGINX_PORT|g" \
        -e "s|@AGENT_PORT@|$AGENT_PORT|g" -e "s|@APP_PORTS@|$APP_PORTS|g" \
        "/stack/$1" >"/config/$2/.$1.new"
    # Atomic: the services may be running.
    mv "/config/$2/.$1.new" "/config/$2/$1"
}

fill agent.toml agent
fill nginx.conf nginx
fill prometheus.yml prometheus

# Not the volume itself: an empty volume takes the owner of the image's directory at that path.
own() { # DIRECTORY USER
    [ -d "$1" ] && return
    mkdir -m 0700 "$1"
    chown "$2:$2" "$1"
}

own /volumes/etcd/data 65532
own /volumes/prometheus/data 65534
