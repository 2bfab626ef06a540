#!/bin/sh
# build.sh APP [--full]: builds the image of the commit that is checked out here, and prints what to deploy.
#
#   REGISTRY=registry.example.com/team    pushes it there; or, without a registry:
#   ARCHIVES=/srv/builds                  saves it in this directory,
#   ARCHIVES_URL=https://builds.example.com   which hosts reach at this address; unless given, by the same path
#
# With --full nothing is taken from earlier builds, and the base image is pulled again: for a build each night.
set -eu

app=$1
tag=$(git rev-parse --short=12 HEAD)
set -- "${2:-}"
if [ "$1" = --full ]; then
    tag=$tag-$(date -u +%Y%m%d)
    set -- --no-cache --pull
else
    set --
fi
say() { echo "$*" >&2; }

if [ -n "${REGISTRY:-}" ]; then
    name=$REGISTRY/$app:$tag
    docker build "$@" -t "$name" . >&2
    docker push "$name" >&2
    # By its digest it is the same image on each host, whatever becomes of the tag.
    digests=$(docker image inspect --format '{{range .RepoDigests}}{{println .}}{{end}}' "$name")
    # Docker leaves out the name of its own registry.
    if ! echo "$digests" | grep -m 1 -F "${REGISTRY#docker.io/}/$app@"; then
        say "error: $name was pushed and has no digest"
        exit 1
    fi
elif [ -n "${ARCHIVES:-}" ]; then
    case $ARCHIVES in
        /*) ;;
        *) say "error: ARCHIVES is an absolute path"; exit 1 ;;
    esac
    name=$app:$tag
    docker build "$@" -t "$name" . >&2
    new=$ARCHIVES/.$app-$tag.$$
    trap 'rm -f "$new" "$new.gz"' EXIT
    docker save -o "$new" "$name"
    # The same image is the same file: gzip writes no time into it.
    gzip -n "$new"
    sum=$(sha256sum "$new.gz")
    sum=${sum%% *}
    # Another build of the same commit is another file: hosts may still need this one.
    file=$app-$tag-$(echo "$sum" | cut -c 1-12).tar.gz
    chmod 644 "$new.gz"
    mv "$new.gz" "$ARCHIVES/$file"
    echo "docker-archive:${ARCHIVES_URL:-$ARCHIVES}/$file@sha256:$sum"
else
    say "error: set REGISTRY or ARCHIVES"
    exit 1
fi
