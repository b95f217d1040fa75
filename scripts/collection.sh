#!/usr/bin/env bash
# Lays the collection out where Ansible looks for it: DEST/ansible_collections/secure_agent/workspace.
#   scripts/collection.sh link [DEST]   a link to the working tree; for playbooks, molecule and development
#   scripts/collection.sh copy [DEST]   a copy of what a release carries; for ansible-test, which needs real paths
# DEST defaults to build/installed (link; ansible.cfg names it) or build/sanity (copy). Prints DEST.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
case ${1:-} in
  link)
    destination=${2:-$root/build/installed}
    mkdir -p "$destination/ansible_collections/secure_agent"
    place=$destination/ansible_collections/secure_agent/workspace
    [ "$(readlink "$place")" = "$root" ] || ln -sfn "$root" "$place" # somebody may be reading through it
    ;;
  copy)
    destination=${2:-$root/build/sanity}
    collection=$destination/ansible_collections/secure_agent/workspace
    rm -rf "$collection"
    mkdir -p "$collection/tests"
    for part in galaxy.yml README.md LICENSE LICENSES meta changelogs plugins roles playbooks extensions; do
      [ ! -e "$root/$part" ] || cp -a "$root/$part" "$collection/$part"
    done
    cp -a "$root/tests/config.yml" "$collection/tests/"
    find "$collection" \( -name __pycache__ -o -name node_modules \) -prune -exec rm -rf {} +
    ;;
  *)
    echo "usage: collection.sh link|copy [DEST]" >&2
    exit 2
    ;;
esac
printf '%s\n' "$destination"
