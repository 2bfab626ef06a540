#!/usr/bin/env bash
# Installs what is missing from Debian's packages: for the build, for the tests and for the demo.
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
need docker-registry docker-registry
# An engine of any make will do; only where there is none, Debian's.
command -v docker >/dev/null 2>&1 || missing+=(docker.io)

if [ "${#missing[@]}" -gt 0 ]; then
    echo "installing: ${missing[*]}"
    sudo=()
    if [ "$(id -u)" -ne 0 ]; then
        command -v sudo >/dev/null || { echo "error: run as root, or install: ${missing[*]}" >&2; exit 1; }
        sudo=(sudo)
    fi
    # Runlevel 1 keeps new services from being started: demae starts its own, on ports of its own.
    "${sudo[@]}" apt-get update -qq
    "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
fi

command -v cargo >/dev/null || { echo "error: there is no Rust toolchain (cargo); install one first" >&2; exit 1; }
if ! docker version >/dev/null 2>&1; then
    echo "error: no Docker engine answers; start it, and make sure that this user may use it (group docker)" >&2
    exit 1
fi
