#!/usr/bin/env bash
# What follows the build of a golden image: its record with a reference boot and the scanner's score of its hardening, the search for known
# vulnerabilities, signatures.
# `make image` calls it with the build's answer (JSON). What is done for these bytes is not done again, and nothing is signed with a key
# that nobody gave.
#   DATABASE, WAIVERS     the tracker's database as mirrored, who answers for what: `saw image scan`
#   ADVISORIES            OSV exports for PyPI and npm packages, several with blanks between
#   BASELINE_FLOOR        a floor with waivers that the scanner's report of the build's own tree has to hold (docs/baseline.md)
#   MEASURED              a hypervisor's answer of `saw vm measure --json`, in place of a boot on this machine
#   SIGN_KEY              keys of officers, with blanks between; SIGN_PASSPHRASE_FILE likewise; SIGN_FOR, such as 30d
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
saw=$root/.venv/bin/saw

told() { "$root/.venv/bin/python" -c 'import json, sys; print(json.load(open(sys.argv[1]))[sys.argv[2]])' "$1" "$2"; }
say() { printf '    %s\n' "$*"; }

folder=$(told "$1" directory)
record=$folder/release.json
signed=$folder/release.signed.json
say "$(told "$1" name): $(told "$1" reason)"

echo "==> release record: boot the image once and hold it against what its bytes must measure"
options=()
[ -z "${MEASURED:-}" ] || options=(--measured "$MEASURED")
"$saw" image record "$folder" "${options[@]}"
[ -n "${MEASURED:-}" ] || say "measured on this machine's firmware; hypervisors with another one need a record of their own: docs/images.md"

echo "==> hardening, as the scanner saw the image's tree when it was built"
options=()
[ -z "${BASELINE_FLOOR:-}" ] || options=(--floor "$BASELINE_FLOOR")
if [ -f "$folder/baseline.dat" ]; then
  scored=$("$saw" baseline score "$folder/baseline.dat" "${options[@]}") || { printf '%s\n' "$scored" >&2; exit 1; }
  printf '%s\n' "$scored" | grep -E '^(scanner|index|floor|warnings|suggestions|waived): ' | sed 's/^/    /'
  say "what is open: saw baseline score $folder/baseline.dat"
else
  say "not scored: an older release built this image"
  [ -z "${BASELINE_FLOOR:-}" ] || { echo "there is no score to hold against $BASELINE_FLOOR: build the image again" >&2; exit 1; }
fi

echo "==> known vulnerabilities"
if [ -n "${DATABASE:-}" ]; then
  options=(--database "$DATABASE")
  [ -z "${WAIVERS:-}" ] || options+=(--waivers "$WAIVERS")
  for place in ${ADVISORIES:-}; do options+=(--advisories "$place"); done
  "$saw" image scan "$record" "${options[@]}"
else
  say "not searched: give the mirrored database of the distribution's security tracker, DATABASE=FILE"
fi
"$saw" image evidence "$record" >/dev/null

echo "==> signatures"
if [ -n "${SIGN_KEY:-}" ]; then
  options=()
  for key in $SIGN_KEY; do options+=(--key "$key"); done
  for file in ${SIGN_PASSPHRASE_FILE:-}; do options+=(--passphrase-file "$file"); done
  [ -z "${SIGN_FOR:-}" ] || options+=(--for "$SIGN_FOR")
  "$saw" image sign "$record" --keep --out "$signed" "${options[@]}"
  say "next: saw image register $signed"
else
  say "not signed: no key was given (SIGN_KEY='officer-a.key officer-b.key')"
  say "next: saw image sign $record --key officer-a.key --out $signed"
fi
