#!/usr/bin/env bash
# Build a golden image with endpoint detection, bring a workspace up on it in a clone of this checkout, attack it, and see the findings
# at the broker. `make image-edr-check` calls it; it needs root and takes some 20 minutes. SAW_IMAGE_EDR_CHECKOUT names a clone that
# runs already: then only the attacks are done, and it is left running.
set -uo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root" || exit 1
unset SAW_BUILD SAW_CONTEXT
export PATH="$root/.venv/bin:$PATH" PYTHONDONTWRITEBYTECODE=1

if [ -z "${SAW_IMAGE_EDR_CHECKOUT:-}" ]; then
  if [ -e /run/netns/sawlab ]; then
    printf 'another embedded workspace runs on this machine (namespace sawlab); run "make clean" there first\n' >&2
    exit 1
  fi
  scratch=$(mktemp -d "${TMPDIR:-/tmp}/saw-image-edr.XXXXXX") || exit 1
  export SAW_IMAGE_EDR_CHECKOUT=$scratch/checkout
  trap 'if [ -d "$SAW_IMAGE_EDR_CHECKOUT" ]; then make -s -C "$SAW_IMAGE_EDR_CHECKOUT" clean >/dev/null 2>&1; fi
    rm -rf --one-file-system "$scratch"' EXIT
  trap 'exit 143' INT TERM
  git clone -q "$root" "$SAW_IMAGE_EDR_CHECKOUT" || exit 1
  mkdir "$scratch/signatures" || exit 1
  # the EICAR test file alone, by its MD5 sum
  printf '44d88612fea8a8f36de82e1278abb02f:68:Test.Eicar\n' >"$scratch/signatures/test.hdb"
  make -s -C "$SAW_IMAGE_EDR_CHECKOUT" workspace EDR=embedded EDR_SIGNATURES="$scratch/signatures" || exit 1
fi
pytest tests/image_edr -v -x --durations=10 -p no:cacheprovider
