#!/usr/bin/env bash
# All tests, fastest first, each lane with its own log line and junit file under build/test-results.
#   scripts/test.sh [lint] [unit] [roles] [e2e]        default: all four
# Long lanes say what they are at (scripts/follow.py). Ends with a table of seconds per lane, which lanes.json keeps; leaves no
# process, mount, namespace or tap behind. After all four, each enforced control must have been shown by its tests
# (scripts/controls.py); after some of them, none of the tests that ran may have failed.
set -uo pipefail

# Whoever starts this may ignore hang-ups and interrupts (nohup, a background job); tests of signals need the ordinary ways.
if [ -z "${SAW_SIGNALS_RESET:-}" ]; then
  exec env --default-signal SAW_SIGNALS_RESET=1 bash "$0" "$@"
fi

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root" || exit 1
lanes=("$@")
[ ${#lanes[@]} -gt 0 ] || lanes=(lint roles unit e2e)
results=$root/build/test-results
mkdir -p "$results"
# A virtual environment's own programs come first; real interpreters, never shims, follow.
export PATH="$root/.venv/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:$PATH"
export PYTHONDONTWRITEBYTECODE=1
unset SAW_BUILD SAW_CONTEXT # the lanes work in this checkout and in a clone of it, never on a workspace that runs here
failed=()
rows=()
started=$SECONDS
declare -A beside=()

clean_up() {
  local lane
  for lane in "${!beside[@]}"; do
    kill -TERM -- "-${beside[$lane]}" 2>/dev/null && wait "${beside[$lane]}"
  done
}
trap clean_up EXIT
trap 'exit 130' INT TERM

banner() { printf '\n==> [%3ss] %s\n' $((SECONDS - started)) "$*"; }

newer_python() { # an interpreter of 3.12 or later, where one exists: the second supported pair with ansible-core 2.21
  local candidate
  for candidate in python3.13 python3.12 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[23].*/bin/python3; do
    if "$candidate" -c 'import sys, venv; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; then
      "$candidate" -c 'import sys; print(sys.executable)'
      return
    fi
  done
}

newer_environment() { # build/venv-newer with the second supported pair; prints why and fails where there is no such Python
  local python
  python=$(newer_python)
  if [ -z "$python" ]; then
    printf 'no Python 3.12 or later on this machine: ansible-core 2.21 is not tested here\n'
    return 1
  fi
  if python -c 'import sys; sys.exit(sys.version_info < (3, 12))'; then
    printf 'that was %s already\n' "$(python --version)"
    return 1
  fi
  printf 'once more on %s\n' "$("$python" --version)"
  UV_PROJECT_ENVIRONMENT=$root/build/venv-newer UV_PYTHON_DOWNLOADS=never uv sync -q --frozen --compile-bytecode --python "$python" || return 2
}

lane_lint() {
  scripts/lint.sh || return 1
  newer_environment
  case $? in
    0) # style is the same there, and the modules' own tests run on it as well: that all loads and is documented is what differs
      VENV=$root/build/venv-newer LINT_DIR=$root/build/lint-newer SANITY_TESTS="compile import validate-modules ansible-doc" \
        scripts/lint.sh sanity ;;
    1) return 0 ;;
    *) return 1 ;;
  esac
}

closed_directory() { # the first directory on the way to the checkout that other users may not enter
  local directory=$root
  while [ "$directory" != / ]; do
    case $(stat -c %A "$directory") in *[xt]) ;; *) printf '%s\n' "$directory" && return ;; esac
    directory=$(dirname "$directory")
  done
}

lane_unit() {
  local closed
  closed=$(closed_directory)
  if [ "$(id -u)" = 0 ] && [ -n "$closed" ]; then
    printf 'unit: other users may not enter %s, and tests run programs of this checkout as the agent: move it, to /srv say\n' "$closed" >&2
    return 1
  fi
  # base tree and wheelhouse of the light hosts, from the cache or made now: without them their tests would be skipped
  if [ "$(id -u)" = 0 ]; then
    python -m saw.image.build host-tar && python -m saw.image.build wheelhouse || return 1
  fi
  pytest tests/unit tests/integration -q -n 2 --dist loadfile --durations=25 --junitxml="$results/unit.xml" -p no:cacheprovider || return 1
  newer_environment
  case $? in
    0) # what differs there is Ansible and what modules and plugins do with it; roles and whole releases by playbook run once
      build/venv-newer/bin/pytest tests/unit/plugins -q -n 2 --dist loadfile \
        --ignore-glob "*_playbook*.py" --ignore-glob "*_role.py" \
        --junitxml="$results/unit-newer.xml" -p no:cacheprovider ;;
    1) return 0 ;;
    *) return 1 ;;
  esac
}

lane_roles() {
  trap 'molecule destroy -s default >"$results/roles-reset.log" 2>&1; exit 143' INT TERM
  # an interrupted run may have left hosts, or only the belief that they exist
  molecule destroy -s default >"$results/roles-reset.log" 2>&1 || true
  PY_COLORS=0 ANSIBLE_FORCE_COLOR=0 python scripts/follow.py --log "$results/roles.log" -- molecule test --all
  local status=$?
  [ $status = 0 ] || { tail -n 60 "$results/roles.log"; printf 'whole log: %s\n' "$results/roles.log"; }
  return $status
}

lane_e2e() {
  local status
  scratch=$(mktemp -d "${TMPDIR:-/tmp}/saw-e2e.XXXXXX") || return 1
  clone=$scratch/checkout
  trap 'if [ -d "$clone" ]; then make -s -C "$clone" clean >/dev/null 2>&1; fi; rm -rf --one-file-system "$scratch"' EXIT
  trap 'exit 143' INT TERM
  if [ -e /run/netns/sawlab ]; then
    # A machine that was switched off leaves the name where /run is on a disk: nothing lives in it, and it is taken away.
    [ -n "$(ip netns pids sawlab 2>/dev/null)" ] || python -c 'from saw.lab.nspawn import LabNetwork; LabNetwork().down()'
    if [ -e /run/netns/sawlab ]; then
      printf 'e2e: another embedded workspace runs on this machine (namespace sawlab); run "make clean" there first\n'
      return 1
    fi
  fi
  git clone -q "$root" "$clone" || return 1
  SAW_E2E_CHECKOUT=$clone python scripts/follow.py --whole --log "$results/e2e.log" \
    --watch "$root/build/e2e.log" --watch "$scratch/pytest/*/output" -- \
    pytest tests/e2e -v -x --durations=25 --durations-min=5 --basetemp="$scratch/pytest" --junitxml="$results/e2e.xml" -p no:cacheprovider
  status=$?
  [ $status = 0 ] || tail -n 80 build/e2e.log
  return $status
}

start_beside() { # start_beside LANE: in a process group of its own; exit code and seconds go to build/test-results/LANE.end
  local lane=$1 begin=$SECONDS
  rm -f "$results/$lane.end"
  banner "$lane begins, beside the others"
  set -m
  {
    trap : INT TERM # its parts end by the signal, and this says how
    ("lane_$lane") 2>&1 | (trap '' INT TERM && exec tee "$results/$lane.out") | (trap '' INT TERM && exec sed -u "s/^/    $lane |/")
    printf '%s %s\n' "${PIPESTATUS[0]}" $((SECONDS - begin)) >"$results/$lane.end"
  } &
  beside[$lane]=$!
  set +m
}

row() { # row NAME OK SECONDS
  rows+=("$(printf '{"lane": "%s", "ok": %s, "seconds": %d}' "$1" "$2" "$3")")
  table+=$(printf '    %-10s %-7s %6d s' "$1" "$([ "$2" = true ] && echo ok || echo FAILED)" "$3")$'\n'
}

reports_of() { # the JUnit files of a lane
  find "$results" -maxdepth 1 -name "$1*.xml"
}

table=
number=0
for lane in "${lanes[@]}"; do
  if ! declare -F "lane_$lane" >/dev/null; then
    printf 'test.sh: there is no lane %s\n' "$lane" >&2
    exit 2
  fi
  reports_of "$lane" | xargs -r rm -f
done
if [ ${#lanes[@]} -gt 1 ]; then
  for lane in "${lanes[@]}"; do
    # One long lane beside the others, which follow one another: more at once gains nothing on two cores, and what waits for a state waits longer.
    case $lane in e2e) start_beside "$lane" ;; esac
  done
  renice -n 10 $$ >/dev/null # e2e takes longest and was started before: all others stand back
fi
for lane in "${lanes[@]}"; do
  number=$((number + 1))
  banner "[$number/${#lanes[@]}] $lane"
  begin=$SECONDS
  if [ -n "${beside[$lane]:-}" ]; then
    wait "${beside[$lane]}"
    unset "beside[$lane]"
    read -r status took <"$results/$lane.end" || status=1 took=$((SECONDS - started))
  else
    ("lane_$lane") # in a shell of its own: what it cleans up at its end is its own matter
    status=$? took=$((SECONDS - begin))
  fi
  if [ "$status" = 0 ]; then ok=true; else ok=false failed+=("$lane"); fi
  row "$lane" "$ok" "$took"
  banner "[$number/${#lanes[@]}] $lane: $([ "$ok" = true ] && echo ok || echo FAILED) in $took s"
done

if [ ${#failed[@]} -eq 0 ]; then
  mapfile -t reports < <(for lane in "${lanes[@]}"; do reports_of "$lane"; done)
  if [ ${#reports[@]} -gt 0 ]; then
    banner "controls"
    some=(--some)
    [ ${#lanes[@]} -lt 4 ] || some=()
    begin=$SECONDS
    if python scripts/controls.py "${some[@]}" --results "${reports[@]}"; then ok=true; else ok=false failed+=(controls); fi
    row controls "$ok" $((SECONDS - begin))
  fi
fi
printf '{"total_seconds": %d, "lanes": [%s]}\n' $((SECONDS - started)) "$(IFS=, && echo "${rows[*]}")" >"$results/lanes.json"
banner "lanes: ${lanes[*]}; failed: ${failed[*]:-none}"
printf '%s    %-10s %-7s %6d s\n' "$table" total "" $((SECONDS - started))
for lane in "${failed[@]}"; do
  case $lane in
    unit | e2e) python scripts/failures.py "$results/$lane.xml" ;;
    roles) python scripts/failures.py "$results/roles.log" ;;
  esac
  [ -z "$(reports_of "$lane")" ] && [ -s "$results/$lane.out" ] && tail -n 5 "$results/$lane.out"
done
[ ${#failed[@]} -eq 0 ]
