#!/usr/bin/env bash
# End everything that this checkout runs on this machine, then remove its state. `make clean` calls it.
# Without a virtual environment it is made again first when something runs: nothing is removed under running hosts.
# SAW_BUILD names another build directory; there only what the project itself writes is removed.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
build=$(realpath -m "${SAW_BUILD:-$root/build}")
# What the project writes into a build directory, hidden files apart; nothing else is touched outside the checkout.
own=(ansible-home bench.json bootstrap-apt.log cache e2e.log image-tree images installed lab lint lint-newer molecule
  packer.log report.json runner sanity test-results uv venv-newer workspace-runs.json .lock)
removed=0

say() { printf '    %s\n' "$*"; }
fail() {
  printf 'clean: %s\n' "$*" >&2
  exit 1
}

hosts_here() { # directories of hosts that may run
  [ -n "$(find "$build/lab/hosts" "$build/molecule/hosts" "$build/image-tree/hosts" "$build"/site-*/lab/hosts -maxdepth 0 2>/dev/null)" ]
}

works() { .venv/bin/python -c 'import saw.lab.leftovers' 2>/dev/null; }

remove() { # remove PATH …: what exists of it, with sizes; nothing that has a mount below it
  local path size busy
  for path in "$@"; do
    [ -e "$path" ] || [ -L "$path" ] || continue
    busy=$(awk -v below="$path" '$2 == below || index($2, below "/") == 1 { print $2; exit }' /proc/self/mounts)
    [ -z "$busy" ] || fail "$busy is still mounted: umount $busy, then run it again"
    size=$(du -sh "$path" 2>/dev/null | cut -f1)
    rm -rf --one-file-system "$path"
    say "removed $path ($size)"
    removed=$((removed + 1))
  done
}

printf '==> end what runs for %s\n' "$build"
if hosts_here && ! works; then
  say "the virtual environment is gone; making it again to end the hosts"
  rm -f .venv/.locked
  scripts/bootstrap.sh python || fail "hosts may still run and cannot be ended without it; nothing was removed"
fi
if works; then
  SAW_BUILD=$build .venv/bin/saw lab down --purge || fail "not everything was ended; nothing was removed"
else
  say "no host was ever started from here"
fi

printf '==> remove state\n'
if [ "$build" = "$root/build" ]; then
  remove "$build"
else
  remove "${own[@]/#/$build/}"
  if [ -d "$build" ]; then
    if rmdir "$build" 2>/dev/null; then say "removed $build (empty)"; else say "kept $build: it holds more than ours"; fi
  fi
  remove "$root/build"
fi
remove "$root/.venv"
remove "$root"/roles/broker/files/terminal/node_modules "$root"/tests/{oidc/node/,oidc/,pages/,clients/}node_modules
printf '==> clean: %s removed\n' "$([ "$removed" = 1 ] && echo '1 thing' || echo "$removed things")"
