"""Hostile policy files are refused in bounded time and memory: in a process that the kernel ends when it takes more.

Limits: 20 s of processor time (the slowest takes about 3 s) and 512 MiB of address space for a file of at most 4 MiB.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from saw.policy.errors import PolicyError
from saw.policy.loader import load_policy

pytestmark = pytest.mark.control("POL-02")

LIMITED = r"""
import resource, sys
resource.setrlimit(resource.RLIMIT_CPU, (20, 20))
from saw.policy.errors import PolicyError
from saw.policy.loader import load_governance, load_policy
resource.setrlimit(resource.RLIMIT_AS, (1 << 29, 1 << 29))

HEAD = b'version: 1\n'
ENDPOINTS = HEAD + b'network_policies:\n  a:\n    binaries: [{path: /x}]\n    endpoints:\n'
REST = b'port: 1, protocol: rest, access: full, allow_encoded_slash: '
def endpoint(fields, slash):
    return b'    - {%s, %s%s}\n' % (fields, REST, b'true' if slash else b'false')

raw = EXPRESSION
try:
    LOAD(raw)
except PolicyError as error:
    assert len(str(error)) < 500_000, len(str(error))
    print('\n'.join(sorted({problem.reason for problem in error.problems}))[-100_000:])
else:
    print('loaded')
"""
HOSTILE = {
    "aliases": (r"b'a: &a [x]\nversion: *a\n'", "anchors are refused"),
    "alias bomb": (
        r"b'a0: &a0 [x,x]\n' + b''.join(b'a%d: &a%d [*a%d,*a%d]\n' % (n, n, n - 1, n - 1) for n in range(1, 60))",
        "anchors are refused",
    ),
    "alias": (r"b'version: *a\n'", "aliases are refused"),
    "merge key": (r"HEAD + b'process: {<<: {run_as_user: x}}\n'", "merge keys are refused"),
    "python tag": (r"HEAD + b'process: !!python/object/apply:os.system [id]\n'", "tags are refused"),
    "binary tag": (r"HEAD + b'process: !!binary aGk=\n'", "tags are refused"),
    "huge tag": ("b'a: !' + b'x' * 4_000_000 + b' 1'", "tags are refused"),
    "huge anchor": ("b'a: &' + b'x' * 4_000_000 + b' 1'", "anchors are refused"),
    "byte order mark": (r"b'\xef\xbb\xbfversion: 1'", "byte order mark"),
    "utf-16": ("'version: 1'.encode('utf-16')", "not UTF-8"),
    "overlong utf-8": (r"HEAD + b'# \xc0\xaf'", "not UTF-8"),
    "half a character": (r"HEAD + b'# \xed\xa0\x80'", "not UTF-8"),
    "half a character, escaped": (r"HEAD + b'\"\\ud800\": 1'", "not YAML"),
    "nul": (r"HEAD + b'\x00'", "not YAML"),
    "escape character": (r"HEAD + b'\x1b[2J'", "not YAML"),
    "one byte too large": ("b'#' * (4 * 1024 * 1024 + 1)", "bytes"),
    "far too large": (r"b'a: 1\n' * 10_000_000", "bytes"),
    "deep flow": ("HEAD + b'x: ' + b'[' * 4_000_000", "nested deeper"),
    "deep maps": ("HEAD + b'x: ' + b'{a: ' * 800_000", "nested deeper"),
    "deep block": (r"b''.join(b' ' * n + b'a:\n' for n in range(2000))", "nested deeper"),
    "deep dashes": (r"HEAD + b'x:\n' + b'- ' * 2_000_000", "nested deeper"),
    "question marks": ("b'? ' * 2_000_000", "a key is not text"),
    "more than half a million keys": (r"b''.join(b'%x:\n' % n for n in range(580_000))", "more than 200000 values"),
    "two million elements": ("HEAD + b'x: [' + b'a,' * 2_000_000 + b']'", "more than 200000 values"),
    "unknown keys": (r"HEAD + b''.join(b'versionx%d: 1\n' % n for n in range(99_000))", "not known"),
    "one key, again and again": (r"HEAD + b'a: 1\n' * 90_000", "not known"),
    "huge key": (r"b'? ' + b'k' * 4_000_000 + b'\n: 1\n'", "a key has"),
    "huge key over many faults": (
        r"HEAD + b'network_policies:\n  ? ' + b'k' * 2000000 + b'\n  : {' + b','.join(b'a%d: 1' % n for n in range(9999)) + b'}'",
        "a key has",
    ),
    "huge scalar": ("HEAD + b'process: {run_as_user: \"' + b'a' * 4_000_000 + b'\"}'", " … "),
    "huge number": ("b'version: ' + b'9' * 4_000_000", "expected one of 1"),
    "endpoints of which half differ": (
        "ENDPOINTS + b''.join(endpoint(b'host: \"*x%04d*.b.c\"' % n, n % 2) for n in range(4000))",
        "too many endpoints",
    ),
    "long globs that differ": (
        "ENDPOINTS + b''.join(endpoint(b'host: a.b.c, path: \"/%s\"' % (b'*a' * 500), n % 2) for n in range(40))",
        "too many endpoints",
    ),
    "rules that would be tried one by one": (
        "ENDPOINTS + b''.join(endpoint(b'host: a.b.c, path: \"/*abcdef*%05d*\"' % n, 0) for n in range(9000))",
        "more than 32",
    ),
}


def limited(expression: str, load: str = "load_policy") -> str:
    """What the loader says of the bytes that ``expression`` makes, within the limits."""
    source = LIMITED.replace("EXPRESSION", expression).replace("LOAD(", f"{load}(")
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.thorough
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_in_bounded_time_and_memory(name: str) -> None:
    expression, reason = HOSTILE[name]
    assert reason in limited(expression)


@pytest.mark.parametrize(
    ("expression", "load"),
    [
        (r"ENDPOINTS + b''.join(b'    - {host: a%d.b.c, port: 1}\n' % n for n in range(15_000))", "load_policy"),
        ("ENDPOINTS + b''.join(endpoint(b'host: \"*.a%05d.b.c\"' % n, n % 2) for n in range(1000))", "load_policy"),
        (r"HEAD + b'#\n' * 2_000_000", "load_policy"),
        (
            r"b'schema: 1\nblueprint: {name: x, version: 1.0.0, owner: \"' + b'a' * 4_000_000 + b'\"}'",
            "load_governance",
        ),
    ],
    ids=["endpoints", "globs apart", "comments", "scalar"],
)
def test_large_files_that_are_good_load_within_the_same_limits(expression: str, load: str) -> None:
    assert limited(expression, load).strip() == "loaded"


def test_a_quoted_merge_key_is_a_key_like_any_other() -> None:
    text = (
        "version: 1\nnetwork_policies: {a: {binaries: [{path: /x}], endpoints: [{host: a.b.c, port: 1, protocol: rest, "
        "rules: [{allow: {query: {'<<': a}}}]}]}}"
    )
    rules = load_policy(text.encode()).network_policies["a"].endpoints[0].rules
    assert rules is not None and rules[0].allow.query == {"<<": "a"}
    with pytest.raises(PolicyError, match="merge keys are refused"):
        load_policy(text.replace("'<<'", "<<").encode())


def test_a_policy_file_runs_nothing(tmp_path: Path) -> None:
    trace = tmp_path / "ran"
    with pytest.raises(PolicyError, match="tags are refused"):
        load_policy(f"version: !!python/object/apply:os.mkdir ['{trace}']\n".encode())
    assert not trace.exists()
