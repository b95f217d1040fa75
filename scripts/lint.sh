#!/usr/bin/env bash
# Every static check, fastest first, each with one line of outcome; ends with 1 when one of them failed.
#   scripts/lint.sh            everything
#   scripts/lint.sh NAME …     only these: ruff format mypy yamllint shellcheck packer galaxy ansible-lint sanity
# The slow ones (galaxy, ansible-lint, sanity) remember a passing run by a digest over all that they read and are skipped while
# nothing of it changed; LINT_FRESH=1 runs them anyway. Results and logs lie in build/lint. VENV names another virtual
# environment (the second supported pair of Python and ansible-core), LINT_DIR another place for its results, SANITY_TESTS the
# tests of ansible-test that are run instead of all.
# shellcheck disable=SC2317,SC2329 # the checks are called by name
set -uo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root" || exit 1
venv=${VENV:-$root/.venv}
export PATH="$venv/bin:$PATH"
logs=${LINT_DIR:-$root/build/lint}
mkdir -p "$logs"
sanity=$logs/sanity
collection=$sanity/ansible_collections/secure_agent/workspace

files() { # tracked and new files that match the patterns
  git ls-files --cached --others --exclude-standard -- "$@" | while IFS= read -r file; do [ ! -e "$file" ] || printf '%s\n' "$file"; done
}

digest() { # digest over the content of what a check reads, and over the tool's version
  { "$1" --version 2>/dev/null; shift; files "$@" | sort -u | tr '\n' '\0' | xargs -0 -r sha256sum; } | sha256sum | cut -c1-32
}

check_ruff() { ruff check --quiet .; }
check_format() { ruff format --quiet --check .; }
check_mypy() { mypy; }
check_yamllint() { files '*.yml' '*.yaml' '.yamllint' '.ansible-lint' | tr '\n' '\0' | xargs -0 -r yamllint --strict; }
check_shellcheck() { files '*.sh' '.ci/run' | tr '\n' '\0' | xargs -0 -r shellcheck --severity=style; }

check_packer() { # the template's own variables get harmless values where they have no default
  local failed=0 folder
  while IFS= read -r folder; do
    packer validate -syntax-only "$folder" || failed=1
  done < <(files ':(glob)packer/*.pkr.hcl' | xargs -r -n1 dirname | sort -u)
  return "$failed"
}

check_galaxy() { # what is released holds all that its playbooks name, and nothing that is for development
  local place=$logs/galaxy tarball stray missing names
  rm -rf "$place"
  mkdir -p "$place/empty"
  ansible-galaxy collection build --output-path "$place" . || return 1
  tarball=$(find "$place" -name '*.tar.gz')
  ANSIBLE_HOME=$logs/ansible ansible-galaxy collection install --force --offline --no-deps -p "$place/installed" "$tarball" || return 1
  local installed=$place/installed/ansible_collections/secure_agent/workspace
  missing=$(git ls-files --cached --others --exclude-standard -- plugins roles playbooks policies meta docs extensions | sort |
    while IFS= read -r file; do [ ! -e "$file" ] || [ -e "$installed/$file" ] || printf '%s\n' "$file"; done)
  [ -z "$missing" ] || { printf 'not in the collection, see build_ignore in galaxy.yml:\n%s\n' "$missing"; return 1; }
  stray=$(find "$installed" -mindepth 1 -maxdepth 1 -printf '%f\n' | grep -vxE \
    'FILES.json|MANIFEST.json|README.md|LICENSE|LICENSES|changelogs|docs|extensions|meta|playbooks|plugins|policies|roles')
  [ -z "$stray" ] || { printf 'does not belong in the collection, see build_ignore in galaxy.yml:\n%s\n' "$stray"; return 1; }
  # one process for all of them: most of a check is the start and the plugins' loading
  mapfile -t names < <(cd playbooks && printf '%s\n' *.yml | sed 's/^/secure_agent.workspace./; s/\.yml$//')
  (cd "$place/empty" && ANSIBLE_HOME=$logs/ansible ANSIBLE_COLLECTIONS_PATH=$place/installed ANSIBLE_LOCALHOST_WARNING=0 \
    ansible-playbook -i localhost, --syntax-check "${names[@]}")
}

check_ansible_lint() {
  ANSIBLE_COLLECTIONS_PATH=$(scripts/collection.sh link) ANSIBLE_HOME=$logs/ansible \
    ansible-lint --profile production --offline --nocolor -q
}

check_sanity() { # ansible-test wants the collection at its final path and a Python that is no shim
  local cache=$sanity/home/.ansible/test/cache version python test only=()
  for test in ${SANITY_TESTS:-}; do only+=(--test "$test"); done
  scripts/collection.sh copy "$sanity" >/dev/null
  mkdir -p "$cache"
  for version in 24_2 25_2; do cp scripts/get_pip.py "$cache/get_pip_$version.py"; done
  python=$(readlink -f "$venv/bin/python")
  cd "$collection" || return 1
  env HOME="$sanity/home" ANSIBLE_TEST_CONTENT_ROOT="$PWD" PATH="$venv/bin:$(dirname "$python"):/usr/bin:/bin" \
    ansible-test sanity --requirements --color no "${only[@]}" \
    --python "$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')"
}

outcome() { # outcome NAME SECONDS WORD
  printf '%-12s %4ss  %s\n' "$1" "$2" "$3"
}

run_check() { # run one check, keep its log, report
  local name=$1 log=$logs/$1.log started=$SECONDS
  if ("check_${name//-/_}") >"$log" 2>&1; then
    outcome "$name" $((SECONDS - started)) ok
    return 0
  fi
  outcome "$name" $((SECONDS - started)) FAILED
  tail -n 60 "$log"
  return 1
}

run_remembered() { # run_remembered NAME TOOL PATTERN …
  local name=$1 stamp
  shift
  stamp=$logs/$name.$(digest "$@").ok
  if [ -e "$stamp" ] && [ -z "${LINT_FRESH:-}" ]; then
    outcome "$name" 0 "ok (nothing changed since it passed)"
    return 0
  fi
  run_check "$name" || return 1
  rm -f "$logs/$name".*.ok
  : >"$stamp"
}

wanted=("$@")
[ "$#" -gt 0 ] || wanted=(ruff format yamllint shellcheck packer mypy galaxy ansible-lint sanity)
failed=0
background=()
for name in "${wanted[@]}"; do
  case $name in
    ruff | format | yamllint | shellcheck | packer | mypy) run_check "$name" || failed=1 ;;
    galaxy)
      run_remembered galaxy ansible-galaxy galaxy.yml README.md LICENSE LICENSES meta changelogs docs extensions plugins roles playbooks policies &
      background+=($!)
      ;;
    ansible-lint)
      run_remembered ansible-lint ansible-lint roles playbooks plugins meta molecule extensions galaxy.yml .ansible-lint changelogs &
      background+=($!)
      ;;
    sanity)
      run_remembered sanity ansible-test plugins meta galaxy.yml tests/sanity tests/config.yml changelogs roles playbooks scripts &
      background+=($!)
      ;;
    *)
      echo "lint.sh: there is no check $name" >&2
      exit 2
      ;;
  esac
done
for pid in "${background[@]}"; do
  wait "$pid" || failed=1
done
exit "$failed"
