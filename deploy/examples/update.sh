#!/bin/sh
# update.sh APP [--full]: builds and deploys what is not deployed yet; with --full in any case, and all of it.
# It belongs beside build.sh and deploy.sh, is run in a clone, and takes the variables of both.
set -eu
here=$(dirname "$0")
app=$1
shift
git fetch -q
git merge -q --ff-only '@{u}'
now=$(git rev-parse HEAD)
[ "${1:-}" = --full ] || [ "$now" != "$(cat .git/deployed 2>/dev/null || true)" ] || exit 0
image=$("$here/build.sh" "$app" "$@")
"$here/deploy.sh" "$app" "$image" "$(git log -1 --format=%s)"
echo "$now" > .git/deployed
