#!/bin/sh
# First program of an image whose root file system is verified (saw.image.verified_root). It opens the root by the hash on the kernel's
# command line, mounts what may change, and hands over to systemd. What is missing or another one ends the start: the kernel panics when
# its first program ends. A block that was changed makes it panic when it is read.
set -euf
export PATH=/usr/sbin:/usr/bin
umask 022

refuse() {
  echo "saw: this image does not start: $1" >/dev/console
  exit 1
}

# The one partition with the GUID $1. Two of them are one that somebody else made, on another disk.
partition() {
  tries=0
  until found=$(blkid -c /dev/null -o device -t "PARTUUID=$1") && [ -n "$found" ]; do
    tries=$((tries + 1))
    [ "$tries" -lt 300 ] || refuse "there is no partition $1"
    sleep 0.1
  done
  case $found in
    *[!a-z0-9/]*) refuse "there is more than one partition $1" ;;
  esac
  echo "$found"
}

# The 32 digits $1 as a GUID.
guid() {
  rest=$1 parts=
  for skip in '????????' '????' '????' '????'; do
    # shellcheck disable=SC2295  # a pattern
    next=${rest#$skip}
    parts=$parts${rest%"$next"}-
    rest=$next
  done
  echo "$parts$rest"
}

mount -t devtmpfs -o mode=0755,nosuid,noexec dev /dev
mount -t proc -o nosuid,nodev,noexec proc /proc
mount -t sysfs -o nosuid,nodev,noexec sys /sys
mount -t tmpfs -o mode=0755,nosuid,nodev run /run

hash='' var=''
read -r words </proc/cmdline
for word in $words; do
  case $word in
    roothash=*)
      [ -z "$hash" ] || refuse "its root hash is named twice"
      hash=${word#*=}
      ;;
    saw.var=*)
      [ -z "$var" ] || refuse "its partition for /var is named twice"
      var=${word#*=}
      ;;
  esac
done
case $hash in
  *[!0-9a-f]*) refuse "its root hash is none" ;;
esac
[ "${#hash}" -eq 64 ] || refuse "its root hash is none"
[ -n "$var" ] || refuse "its partition for /var is not named"

set +f
for module in /modules/*; do
  insmod "$module" 2>/dev/null || : # one that only makes another one faster may not suit this processor
done
set -f

tail=${hash#????????????????????????????????}
data=$(partition "$(guid "${hash%"$tail"}")")
tree=$(partition "$(guid "$tail")")
var=$(partition "$var")
veritysetup open --panic-on-corruption "$data" root "$tree" "$hash" || refuse "its root is not what its hash says"
mount -t ext4 -o ro,noatime /dev/mapper/root /sysroot || refuse "its root cannot be mounted"

said=$(e2fsck -p "$var" 2>&1) || [ $? -lt 4 ] || refuse "its /var is damaged, rebuild the workspace: $said"
mount -t ext4 -o nosuid,nodev,noatime "$var" /sysroot/var || refuse "its /var cannot be mounted"

# The machine's id is made once and stays with /var; the host key follows by links of the image.
id=/sysroot/var/lib/saw-host/machine-id
if [ ! -s "$id" ]; then
  # shellcheck disable=SC2046  # four words
  set -- $(od -An -N16 -tx4 /dev/random)
  echo "$1$2$3$4" >"$id"
fi
mount --bind "$id" /sysroot/etc/machine-id
mount -o remount,bind,ro /sysroot/etc/machine-id

exec switch_root /sysroot /sbin/init
