#!/bin/sh
# Prints why this machine cannot boot lab hosts and exits with 1; prints nothing if it can. Leaves nothing behind.
# The first argument is the directory whose file system will hold the hosts' overlays.
set -u
refuse() {
  echo "$1"
  exit 1
}
[ "$(uname -s)" = Linux ] || refuse "lab hosts need Linux, this is $(uname -s)"
[ "$(id -u)" = 0 ] || refuse "lab hosts need root, this is uid $(id -u)"
command -v apt-get >/dev/null || refuse "lab hosts need Debian or Ubuntu: there is no apt-get"
grep -Eq '^ *0 +0 +4294967295$' /proc/self/uid_map || refuse "root is confined to a user namespace"
capabilities=$(sed -n 's/^CapEff:[[:space:]]*//p' /proc/self/status)
for capability in NET_ADMIN:12 SYS_CHROOT:18 SYS_ADMIN:21 MKNOD:27; do
  [ $((0x$capabilities >> ${capability#*:} & 1)) = 1 ] || refuse "this container has no CAP_${capability%:*}"
done
[ -w /proc/sys/net/ipv4/ip_forward ] || refuse "/proc/sys is read-only, as in a container"
[ -w /sys/fs/cgroup ] || refuse "/sys/fs/cgroup is read-only, as in a container"
at=$1
while [ ! -d "$at" ]; do at=$(dirname "$at"); done
probe=$(mktemp -d "$at/.llamaherd-probe-XXXXXX") || refuse "$at is not writable"
mkdir "$probe/lower" "$probe/upper" "$probe/work" "$probe/root"
# shellcheck disable=SC2016 # the inner shell expands it
unshare --mount sh -c 'cd "$1" && mount -t overlay overlay -o lowerdir=lower,upperdir=upper,workdir=work root' sh "$probe" 2>/dev/null
mounted=$?
rm -rf "$probe"
[ $mounted = 0 ] || refuse "no overlay can be mounted on the file system of $at"
