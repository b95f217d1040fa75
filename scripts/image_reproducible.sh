#!/usr/bin/env bash
# Build the golden image twice from the same inputs, in two places, with another umask, time zone and language and out of a copy of this
# checkout, and compare; then boot two machines on it and compare what identifies them. `make image-reproducible` calls it; needs root.
# What both builds download is downloaded twice as well. SAW_IMAGE_KEEP=DIR keeps both builds there; a later run then builds them anew
# from the packages that it finds.
set -uo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root" || exit 1
unset SAW_CONTEXT
export PATH="$root/.venv/bin:$PATH" PYTHONDONTWRITEBYTECODE=1

if [ -e /run/netns/sawimg ]; then
  printf 'another image is being built on this machine (namespace sawimg)\n' >&2
  exit 1
fi
if [ -n "${SAW_IMAGE_KEEP:-}" ]; then
  mkdir -p "$SAW_IMAGE_KEEP" || exit 1
  scratch=$(cd "$SAW_IMAGE_KEEP" && pwd)
else
  scratch=$(mktemp -d "${TMPDIR:-/tmp}/saw-image-reproducible.XXXXXX") || exit 1
  trap 'rm -rf --one-file-system "$scratch"' EXIT
  trap 'exit 143' INT TERM
fi

copy=$scratch/another/place/checkout
rm -rf --one-file-system "$copy" "$scratch/one/images" "$scratch/another/place/two/images" # of an earlier run that was kept
mkdir -p "$copy" || exit 1
# what git knows and what it would not ignore, as it lies here
git ls-files -z --cached --others --exclude-standard | while IFS= read -r -d '' name; do [ -e "$name" ] && printf '%s\0' "$name"; done |
  tar --null -T - -cf - | (umask 077 && tar -C "$copy" --no-same-permissions -xf -) || exit 1

printf '==> first build\n'
(umask 022 && TZ=UTC LC_ALL=C python -m saw.image.build image --repository . --build "$scratch/one") || exit 1
one=$(echo "$scratch"/one/images/workspace-*)
printf '==> second build\n'
(umask 077 && TZ=Asia/Kathmandu LC_ALL=C.UTF-8 SAW_IMAGE_PACKAGES="$one/packages.json" python -m saw.image.build image --repository "$copy" --build "$scratch/another/place/two") || exit 1
two=$(echo "$scratch"/another/place/two/images/workspace-*)
printf '==> comparison\n'
saw image compare "$one" "$two" || exit 1
printf '==> two machines on the image\n'
SAW_IMAGE_PAIR="$one:$two" pytest tests/image_reproducible -v --durations=5 -p no:cacheprovider
