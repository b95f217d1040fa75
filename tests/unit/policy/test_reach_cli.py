"""``saw policy diff`` and ``prove`` as people, scripts and reviewers meet them."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import msgspec
import pytest
import rfc8785

from saw.cli.main import main
from saw.policy import governance as words
from saw.policy.loader import Bundle, load_members
from saw.policy.reach_diff import diff_bundles
from saw.policy.reach_html import page, plain, style_hash, table
from saw.policy.reach_settings import _KNOWN, compare_settings

pytestmark = pytest.mark.control("POL-01")

ROOT = Path(__file__).parents[3]
CODING = ROOT / "policies" / "coding"


@pytest.fixture
def wider(tmp_path: Path) -> Path:
    """The demonstration's bundle with a widened rule."""
    folder = tmp_path / "wider"
    shutil.copytree(CODING, folder)
    policy = folder / "policy.yaml"
    policy.write_text(policy.read_text().replace('{method: GET, path: "/v1/**"}', '{method: GET, path: "/**"}'))
    return folder


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict]:
    code = main(["policy", *map(str, arguments), "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_a_widening_is_exit_code_one_and_a_narrowing_zero(
    wider: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, answer = run(capsys, "diff", CODING, wider, "--html", tmp_path / "diff.html")
    assert code == 1 and answer["widening"] and answer["gained"][0]["risk"] == "medium"
    assert answer["reach_digest"] in (tmp_path / "diff.html").read_text()
    code, answer = run(capsys, "diff", wider, CODING)
    assert code == 0 and not answer["widening"] and answer["lost"]
    assert main(["policy", "diff", str(CODING), str(wider)]) == 1
    text = capsys.readouterr().out
    assert "GAINED · medium" in text and "https://api.example.com:443/" in text


def test_bad_input_is_exit_code_two(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (
        ["diff", CODING, tmp_path / "absent"],
        ["diff", CODING, tmp_path],
        ["diff", CODING, CODING, "--html", tmp_path / "absent" / "x.html"],
        ["prove", CODING, "--invariants", tmp_path / "absent.yaml"],
    ):
        with pytest.raises(SystemExit) as caught:
            main(["policy", *map(str, arguments), "--json"])
        assert caught.value.code == 2
        assert json.loads(capsys.readouterr().out)["ok"] is False


def test_signed_bundles_are_compared_like_folders(
    wider: Path, signed: Callable[..., bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "coding-1.bundle.json"
    file.write_bytes(signed())
    assert run(capsys, "diff", file, CODING)[0] == 0
    assert run(capsys, "diff", file, wider)[1] == run(capsys, "diff", CODING, wider)[1]


def test_prove_finds_the_invariants_next_to_the_bundles(wider: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, answer = run(capsys, "prove", CODING)
    assert code == 0 and all(finding["verdict"] == "holds" for finding in answer["findings"])
    code, answer = run(capsys, "prove", wider, "--parent", CODING)
    assert code == 1 and answer["findings"][0]["counter_example"]["call"]["method"] == "GET"
    code, answer = run(capsys, "prove", CODING, "--parent", wider)
    assert code == 0 and len(answer["findings"]) > 1


def test_the_digest_names_exactly_the_diff_whatever_the_process(wider: Path) -> None:
    script = (
        "import sys; from saw.policy.loader import load_bundle_folder as l; from saw.policy.reach_diff import diff_bundles;"
        "print(diff_bundles(l(sys.argv[1]), l(sys.argv[2])).digest)"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", script, str(CODING), str(wider)],
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
        for seed in ("1", "2")
    }
    members = {name: (wider / name).read_bytes() for name in ("policy.yaml", "governance.yaml")}
    old = load_members({name: (CODING / name).read_bytes() for name in members})
    diff = diff_bundles(old, load_members(members))
    content = {k: v for k, v in diff.to_builtins().items() if k not in {"widening", "reach_digest"}}
    assert digests == {diff.digest, hashlib.sha256(rfc8785.dumps(content)).hexdigest()}


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes.update(name for name, _ in attrs)


def hostile(coding: Bundle) -> Bundle:
    """A bundle whose author writes markup and terminal controls wherever text is free."""
    members = dict(coding.members)
    members["governance.yaml"] = members["governance.yaml"].replace(
        b"        - node\n", b'        - "<script>alert(1)</script>\\u001b[2J\\u202e\\" onload=x"\n', 1
    )
    members["policy.yaml"] = members["policy.yaml"].replace(
        b"path: /usr/bin/curl", b"path: \"/usr/bin/<img src=x onerror='x'>*\"", 1
    )
    return load_members(members)


def test_the_page_escapes_what_a_bundle_says_and_needs_nothing_else(coding: Bundle) -> None:
    diff = diff_bundles(coding, hostile(coding))
    text = page(diff)
    assert "&lt;script&gt;" in text and "&lt;img" in text
    assert "\x1b" not in text and "\u202e" not in text
    reader = _Tags()
    reader.feed(text)
    assert not reader.tags & {"script", "img", "link", "iframe", "a", "form", "svg", "object"}
    assert reader.attributes <= {"lang", "charset", "http-equiv", "content", "name", "class"}
    assert not re.search(
        r"url\(|@import|https?://(?!\S*example)", text.partition("<style>")[2].partition("</style>")[0]
    )
    assert f"default-src 'none'; style-src '{style_hash()}'" in text
    style = text.partition("<style>")[2].partition("</style>")[0]
    assert "prefers-color-scheme:dark" in style
    assert hashlib.sha256(style.encode()).digest() == base64.b64decode(style_hash()[7:])


def test_the_table_holds_no_terminal_controls(coding: Bundle) -> None:
    text = table(diff_bundles(coding, hostile(coding)))
    assert all(char == "\n" or char.isprintable() for char in text) and "\\u{1b}" in text
    assert plain("a\nb") == "a\\u{a}b"


def test_a_field_that_is_not_known_counts_as_wider_when_it_changes(
    coding: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if a later version had brought ``review_days``: no one may add a field that the diff is silent about."""
    monkeypatch.setitem(_KNOWN, words.Blueprint, _KNOWN[words.Blueprint] - {"review_days"})
    blueprint = msgspec.structs.replace(coding.governance.blueprint, review_days=7)
    changed = msgspec.structs.replace(coding.governance, blueprint=blueprint)
    same = (coding.policy, coding.governance)
    assert compare_settings(same, same) == []
    (item,) = compare_settings(same, (coding.policy, changed))
    assert item.kind == "possibly" and not item.exact and item.region.setting == "blueprint.review_days"
