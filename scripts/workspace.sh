#!/usr/bin/env bash
# `make workspace`: install what is missing, bring the workspace up, and note what the whole took (for `make bench`).
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
build=${SAW_BUILD:-build}

# What there is before the run decides what its time says.
before=partial
if [ ! -x .venv/bin/saw ] && [ ! -d "$build/images" ] && [ ! -d "$build/lab" ]; then
  before=nothing
elif [ -d "$build/lab" ] && grep -q '^  "ok": true,$' "$build/report.json" 2>/dev/null; then
  before=everything
fi
installed=$(dpkg-query -W -f '${db:Status-Status}\n' 2>/dev/null | grep -cx installed || true)

echo "==> what this machine needs"
scripts/bootstrap.sh workspace || exit 1
echo "==> governed workspace on the embedded default"
.venv/bin/saw lab up
status=$?
packages=$(($(dpkg-query -W -f '${db:Status-Status}\n' | grep -cx installed) - installed))
if [ -e "$build/report.json" ] && [ "$status" -le 1 ]; then
  .venv/bin/python benchmarks/workspace_runs.py --build "$build" --before "$before" --seconds "$SECONDS" --packages "$packages"
fi
exit "$status"
