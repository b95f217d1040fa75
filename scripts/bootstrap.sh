#!/bin/sh
# Install what this repository needs on a Debian machine: packages by name, then a virtual environment locked by hashes.
# Re-runnable; does nothing when everything is there. Usage: scripts/bootstrap.sh [all|workspace|python]; only `all` installs what nothing but the tests needs.
set -eu
cd "$(dirname "$0")/.."
what=${1:-all}
build=${SAW_BUILD:-build}
mkdir -p "$build"

say() { printf '%s\n' "    $*"; }
fail() { printf 'bootstrap: %s\n' "$*" >&2; exit 1; }

packages="bubblewrap ca-certificates curl debian-archive-keyring dosfstools e2fsprogs eatmydata fdisk git iproute2 libtss2-tcti-swtpm0
 lynis mmdebstrap mtools nftables nginx-light opensc openssh-client openssh-server openssl ovmf packer procps python3-venv
 qemu-system-x86 qemu-utils rsync sbsigntool shellcheck softhsm2 swtpm swtpm-tools systemd-container tpm2-tools tmux"
tests="aide chromium clamav cryptsetup-bin default-jdk-headless gpg gpg-agent postgresql rclone rsyslog rsyslog-relp sudo
 systemd-boot-efi systemd-journal-remote unattended-upgrades"
# These packages would start a service; the tests run the programs themselves, so a service that was not here stays off.
services="clamav-freshclam.service clamav-freshclam-once.service clamav-freshclam-once.timer lynis.timer nginx.service
  postgresql.service rsyslog.service ssh.service systemd-journal-remote.socket unattended-upgrades.service"

[ "$what" = all ] && packages="$packages $tests"
if [ "$what" != python ]; then
  command -v apt-get >/dev/null || fail "this needs Debian 12 or later (apt-get is missing)"
  missing=
  for package in $packages; do
    dpkg-query -W -f '${db:Status-Status}\n' "$package" 2>/dev/null | grep -qx installed || missing="$missing $package"
  done
  if ! command -v npm >/dev/null; then missing="$missing npm"; fi
  if [ -n "$missing" ]; then
    [ "$(id -u)" = 0 ] || fail "these packages are missing:$missing - run as root, or: sudo apt-get install$missing"
    say "installing packages:$missing"
    log="$build/bootstrap-apt.log"
    export DEBIAN_FRONTEND=noninteractive
    quiet=
    if [ -d /run/systemd/system ]; then
      for service in $services; do
        if ! systemctl cat "$service" >/dev/null 2>&1; then quiet="$quiet $service"; fi
      done
      # shellcheck disable=SC2086  # a list of names
      if [ -n "$quiet" ]; then systemctl mask --runtime --quiet $quiet; fi
    fi
    # Its package would switch updates of this machine on; the tests run the program on hosts of their own.
    case "$missing " in *" unattended-upgrades "*)
      if command -v debconf-set-selections >/dev/null; then
        echo "unattended-upgrades unattended-upgrades/enable_auto_updates boolean false" | debconf-set-selections
      fi ;;
    esac
    failed=
    # shellcheck disable=SC2086  # RUNLEVEL=1: the same for services without a unit
    { apt-get update -q && RUNLEVEL=1 apt-get install -q -y --no-install-recommends $missing; } >"$log" 2>&1 || failed=yes
    if [ -n "$quiet" ]; then
      # shellcheck disable=SC2086  # a list of names
      { systemctl unmask --runtime $quiet; systemctl disable $quiet; } >>"$log" 2>&1 || true
    fi
    if [ -n "$failed" ]; then
      tail -n 15 "$log" >&2
      fail "apt-get failed; see $log. Check the machine's mirror and network, then run it again"
    fi
  fi
fi

python=
for candidate in python3.11 python3.12 python3.13 python3; do
  if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python=$candidate; break; fi
done
[ -n "$python" ] || fail "Python 3.11 or later with venv is missing: apt-get install python3 python3-venv"

stamp=.venv/.locked
wanted="$(cat uv.lock pyproject.toml | sha256sum | cut -d' ' -f1) compiled"
if [ "$(cat "$stamp" 2>/dev/null || true)" != "$wanted" ] || [ ! -x .venv/bin/saw ]; then
  say "virtual environment from uv.lock ($("$python" --version))"
  uv=$(awk '/^name = "uv"$/ { getline; gsub(/[^0-9.]/, ""); print; exit }' uv.lock)
  if [ ! -x "$build/uv/bin/uv" ]; then
    "$python" -m venv "$build/uv"
    "$build/uv/bin/python" -m pip install --quiet --disable-pip-version-check "uv==$uv" ||
      fail "pip could not install uv; check this machine's package index and network, then run it again"
  fi
  # Compiled once here: a program that finds no byte code, and may write none, spends twice its own time on making it at every start.
  UV_PYTHON_DOWNLOADS=never "$build/uv/bin/uv" sync --quiet --frozen --compile-bytecode --python "$("$python" -c 'import sys; print(sys.executable)')" ||
    fail "uv sync failed; check this machine's package index and network, then run it again"
  printf '%s\n' "$wanted" > "$stamp"
fi
.venv/bin/python -m compileall -q src

npm_tree() {  # FOLDER WHAT: what its lock file says, once
  stamp=$1/node_modules/.locked
  wanted=$(sha256sum < "$1/package-lock.json" | cut -d' ' -f1)
  [ "$(cat "$stamp" 2>/dev/null || true)" = "$wanted" ] && return
  say "$2 from $1/package-lock.json"
  npm ci --ignore-scripts --no-audit --no-fund --loglevel=error --prefix "$1" >"$build/bootstrap-npm.log" 2>&1 || {
    tail -n 15 "$build/bootstrap-npm.log" >&2
    fail "npm failed; see $build/bootstrap-npm.log. Check this machine's npm registry and network, then run it again"
  }
  printf '%s\n' "$wanted" > "$stamp"
}

if [ "$what" != python ]; then
  npm_tree roles/broker/files/terminal "the portal's terminal"
  npm_tree tests/oidc "the OpenID provider of the demonstration and of tests"
  npm_tree tests/oidc/node "a newer Node.js for it and for clients in the sandbox"
fi
if [ "$what" = all ]; then
  npm_tree tests/pages "the engine that tests the portal's pages for WCAG"
  npm_tree tests/clients "clients that tests run in the sandbox"
fi
