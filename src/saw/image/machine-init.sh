#!/bin/sh
# First process of the machine that Packer's source "qemu" provisions: an SSH server on the tree and nothing else, as the light host of
# the source "null" has it. No systemd, so nothing of the tree starts, and what it would leave (ids, keys, a journal) is never made.
# It lies with the keys of this one build on a partition of their own; all that it writes is in memory. SIGTERM ends the machine.
set -u
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root
umask 022
here=/run/saw-machine

end() { # everything off, the root file system whole, power off
  trap '' TERM
  kill -TERM -1
  tries=0
  until mount --options-source=disable -n -o remount,ro /; do # the tree's fstab is about another disk
    kill -KILL -1
    tries=$((tries + 1))
    [ "$tries" -lt 60 ] || break
    sleep 1
  done
  sync
  echo o >/proc/sysrq-trigger
  while :; do sleep 60; done
}

mount -t proc proc /proc
mount -t sysfs sysfs /sys
mkdir -p /dev/pts /dev/shm
mount -t devpts -o gid=5,mode=620,ptmxmode=666 devpts /dev/pts
mount -t tmpfs -o mode=1777,nosuid,nodev tmpfs /dev/shm
mount -t tmpfs -o mode=1777,nosuid,nodev tmpfs /tmp
for link in fd:/proc/self/fd stdin:/proc/self/fd/0 stdout:/proc/self/fd/1 stderr:/proc/self/fd/2; do
  [ -e "/dev/${link%%:*}" ] || ln -s "${link#*:}" "/dev/${link%%:*}"
done
echo image >/proc/sys/kernel/hostname
modprobe virtio_net
ip link set lo up
ip link set eth0 up
ip address add 10.0.2.15/24 dev eth0

mkdir -p /run/sshd /run/lock
install -m 0700 -d /run/keys
install -m 0600 "$here/host" "$here/login" /run/keys/
environment=$(cat "$here/environment")
umount -l "$here" # this script is read from there
trap end TERM
/usr/sbin/sshd -D -e -f /dev/null -h /run/keys/host -o AuthorizedKeysFile=/run/keys/login \
  -o PermitRootLogin=prohibit-password -o "SetEnv=$environment" -o Subsystem='sftp internal-sftp' &
echo "saw: the machine is up"
while :; do wait || true; sleep 1; done
