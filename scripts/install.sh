#!/usr/bin/env bash
# Installs what is missing from Debian's packages: for the build, for the tests and for the demo. With the argument
# `stack`, also what the whole stack needs; with `fleet`, what the fleet of hosts is made with; with `fuzz`, what libFuzzer
# is built with.
# With `sudo` if need be. Installs nothing that is there.
set -euo pipefail

missing=()
need() { command -v "$1" >/dev/null 2>&1 || [ -x "/usr/sbin/$1" ] || missing+=("$2"); }
need cc gcc
need protoc protobuf-compiler
[ -e /usr/include/google/protobuf/descriptor.proto ] || missing+=(libprotobuf-dev)
need etcd etcd-server
need etcdctl etcd-client
need nginx nginx
need curl curl
need git git
need ip iproute2
need nft nftables
need docker-registry docker-registry
need busybox busybox-static
need prometheus prometheus
need openssl openssl
need strace strace
# By itself, where no systemd is.
need systemd-tmpfiles systemd-standalone-tmpfiles
if [ "${1:-}" = fuzz ]; then
    need c++ g++
fi
if [ "${1:-}" = stack ]; then
    docker compose version >/dev/null 2>&1 || need docker-compose docker-compose
fi
if [ "${1:-}" = stack ] || [ "${1:-}" = fleet ]; then
    # Where there is no registry, the base of all images is made with it.
    docker image inspect debian:bookworm-slim >/dev/null 2>&1 || need debootstrap debootstrap
fi

as_root=()
if [ "$(id -u)" -ne 0 ]; then
    as_root=(sudo)
    if [ "${#missing[@]}" -gt 0 ] && ! command -v sudo >/dev/null; then
        echo "error: run this as root, or install these packages: ${missing[*]}" >&2
        exit 1
    fi
fi

install() {
    echo "installing: $*"
    "${as_root[@]}" apt-get update -qq
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}

if [ "${#missing[@]}" -gt 0 ]; then
    # Debian starts the servers it installs. demae's are its own, on ports of its own, so none is to be started.
    policy=/usr/sbin/policy-rc.d
    if [ ! -e "$policy" ]; then
        printf '#!/bin/sh\nexit 101\n' | "${as_root[@]}" tee "$policy" >/dev/null
        "${as_root[@]}" chmod 755 "$policy"
        trap '"${as_root[@]}" rm -f "$policy"' EXIT
    fi
    install "${missing[@]}"
    if [ -n "$(trap -p EXIT)" ]; then
        "${as_root[@]}" rm -f "$policy"
        trap - EXIT
    fi
fi
# An engine of any make will do; only where there is none, Debian's, which is started.
command -v docker >/dev/null 2>&1 || install docker.io

command -v cargo >/dev/null || { echo "error: there is no Rust toolchain (cargo); install one first" >&2; exit 1; }
if ! docker version >/dev/null 2>&1; then
    echo "error: no Docker engine answers; start it, and make sure that this user may use it (group docker)" >&2
    exit 1
fi
