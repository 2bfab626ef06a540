#!/usr/bin/env bash
# A minimal Debian 12 as a tarball, for `docker import`: scripts/base-tarball.sh FILE
# As root, since debootstrap makes device files, and files of many users.
set -euo pipefail

# Where this machine gets its own packages; what debootstrap thinks best, if that cannot be told.
mirror=${DEMAE_STACK_MIRROR:-$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 2>/dev/null |
    grep -v security | head -1 || true)}

# Not below the cache: that may lie on a file system without device files.
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
root=$work/root
if ! debootstrap --variant=minbase --include=ca-certificates bookworm "$root" ${mirror:+"$mirror"} >"$work/log" 2>&1; then
    tail -5 "$work/log" "$root/debootstrap/debootstrap.log" >&2 || true
    exit 1
fi
# No service is started by the package that brings it.
printf '#!/bin/sh\nexit 101\n' >"$root/usr/sbin/policy-rc.d"
chmod 755 "$root/usr/sbin/policy-rc.d"
# Slim, and quick: no manuals, and no sync after each file of a package.
printf '%s\n' 'path-exclude /usr/share/doc/*' 'path-exclude /usr/share/man/*' 'path-exclude /usr/share/locale/*' \
    'force-unsafe-io' >"$root/etc/dpkg/dpkg.cfg.d/slim"
rm -rf "$root"/usr/share/{doc,man,locale,info}/* "$root"/var/lib/apt/lists/* "$root"/var/cache/apt/*.bin \
    "$root"/var/cache/apt/archives/*.deb "$root"/var/log/*.log
tar -C "$root" --numeric-owner -cf "$1" .
