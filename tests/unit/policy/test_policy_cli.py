"""``saw policy`` end to end: from an empty folder to a publication, as people and as scripts read it."""

from __future__ import annotations

import json
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from saw.cli.main import main
from saw.policy.bundle import BundleRefused, verify_bundle
from saw.policy.keys import key_id, load_private_key, load_public_key
from saw.policy.tuf_repository import accept_publication, current_releases, install_root

ROOT = Path(__file__).parents[3]
CODING = str(ROOT / "policies" / "coding")


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict]:
    code = main(["policy", *map(str, arguments), "--json"])
    return code, json.loads(capsys.readouterr().out)


@pytest.fixture
def keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    names = [part for name in ("ada", "ben", "cleo", "online") for part in ("--name", name)]
    assert run(capsys, "keys", "create", "--dir", tmp_path / "keys", *names)[0] == 0
    return tmp_path / "keys"


def test_check_test_and_explain(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "check", CODING) == (
        0,
        {"ok": True, "blueprint": "coding", "version": "1.0.0", "stores": ["file"]},
    )
    code, answer = run(capsys, "test", CODING)
    assert code == 0 and answer["ok"] and len(answer["cases"]) > 15
    url = "https://api.example.com/v1/x"
    code, answer = run(capsys, "explain", CODING, "GET", url, "--binary", "/usr/bin/curl")
    assert code == 0 and answer["decision"]["credential"] == "api-token"
    code, answer = run(capsys, "explain", CODING, "GET", url, "--binary", "/usr/bin/wget")
    assert code == 1 and answer["decision"]["reason"] == "binary_not_allowed"


@pytest.mark.control("CRED-01")
def test_a_credential_in_a_store_that_the_perimeter_has_not_fails_the_check(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(CODING, tmp_path / "coding")
    assert run(capsys, "check", folder, "--store", "file")[0] == 0
    text = (folder / "governance.yaml").read_text()
    (folder / "governance.yaml").write_text(text.replace("local:git-token", "vault:kv/git/{sponsor}"))
    assert run(capsys, "check", folder)[1]["stores"] == ["file", "vault"]
    assert run(capsys, "check", folder, "--store", "file", "--store", "vault")[0] == 0
    assert run(capsys, "check", folder, "--store", "file") == (
        1,
        {"ok": False, "problems": [], "missing_stores": ["vault"]},
    )
    assert main(["policy", "check", str(folder), "--store", "file"]) == 1
    assert "credential git-token lies in a store that the perimeter has not: vault" in capsys.readouterr().out


def test_a_failing_case_fails_the_test(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = tmp_path / "cases.yaml"
    cases.write_text(
        "schema: 1\ncases:\n  - name: x\n    request: {url: https://x.org/}\n    expect: {verdict: allow}\n"
    )
    code, answer = run(capsys, "test", CODING, "--cases", cases)
    assert code == 1 and "verdict is 'deny' instead of 'allow'" in answer["cases"][0]["fault"]


def test_check_tells_all_problems(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "init", tmp_path / "new")[0] == 0
    assert run(capsys, "check", tmp_path / "new")[0] == 0
    assert run(capsys, "test", tmp_path / "new")[0] == 0
    (tmp_path / "new" / "policy.yaml").write_text("version: 3\nextra: 1\n")
    code, answer = run(capsys, "check", tmp_path / "new")
    assert code == 1 and [problem["field"] for problem in answer["problems"]] == ["version", "extra"]
    assert main(["policy", "check", str(tmp_path / "new")]) == 1
    assert "policy.yaml:2:1: extra: this field is not known" in capsys.readouterr().out


@pytest.mark.control("POL-01")
def test_from_source_to_publication(keys: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], now) -> None:
    first, second = tmp_path / "1.bundle.json", tmp_path / "2.bundle.json"
    repository, publication = tmp_path / "officers", tmp_path / "publication"
    ada, ben = ("--key", keys / "ada.key"), ("--key", keys / "ben.key")
    code, answer = run(capsys, "sign", CODING, *ada, "--revision", 1, "--out", first)
    assert code == 0 and answer["signatures"] == 1
    code, _ = run(
        capsys,
        "init-repo",
        "--dir",
        repository,
        *ada,
        *ben,
        "--officer-pub",
        keys / "cleo.pub",
        "--online-pub",
        keys / "online.pub",
    )
    root = repository / "metadata" / "1.root.json"
    assert code == 0
    code, answer = run(capsys, "verify", first, "--root", root)
    assert code == 1 and answer["error"]["code"] == "threshold"
    assert run(capsys, "sign", first, *ben, "--out", second)[0] == 0
    code, answer = run(capsys, "verify", second, "--root", root, "--min-revision", 1)
    assert code == 0 and answer["revision"] == 1 and len(answer["signers"]) == 2
    assert run(capsys, "digest", second)[1]["policy_digest"] == answer["policy_digest"]
    stage = ("stage", "--repository", repository, "--ring", "stable", "--bundle", second, "--out", publication)
    assert run(capsys, *stage, *ada)[0] == 0
    assert run(capsys, "stage", "--out", publication, *ben)[1]["targets"] == ["rings/stable/coding.bundle.json"]

    store, online = tmp_path / "store", load_private_key(keys / "online.key")
    store.mkdir()
    install_root(store, root.read_bytes(), online, now)
    accept_publication(
        store,
        {path.name: path.read_bytes() for path in (publication / "metadata").iterdir()},
        {"rings/stable/coding.bundle.json": second.read_bytes()},
        online,
        datetime.now(UTC),
    )
    assert current_releases(store)[0].policy_digest == answer["policy_digest"]


@pytest.mark.control("POL-02")
def test_a_signed_bundle_counts_at_a_workspace_whose_clock_is_behind(
    keys: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, now = tmp_path / "1.bundle.json", datetime.now(UTC)
    assert run(capsys, "sign", CODING, "--key", keys / "ada.key", "--revision", 1, "--out", file)[0] == 0
    ada = load_public_key(keys / "ada.pub")
    trusted = {key_id(ada): ada}
    for behind in (timedelta(0), timedelta(minutes=4)):
        assert verify_bundle(file.read_bytes(), trusted, 1, now - behind).revision == 1
    with pytest.raises(BundleRefused, match="counts from"):
        verify_bundle(file.read_bytes(), trusted, 1, now - timedelta(minutes=6))


def test_keys_are_private_and_can_have_a_passphrase(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    secret = tmp_path / "passphrase"
    secret.write_text("correct horse\n")
    create = ("keys", "create", "--dir", tmp_path, "--name", "ada", "--passphrase-file", secret)
    assert run(capsys, *create)[0] == 0
    assert (tmp_path / "ada.key").stat().st_mode & 0o777 == 0o600
    assert b"ENCRYPTED" in (tmp_path / "ada.key").read_bytes()
    assert load_public_key(tmp_path / "ada.pub")
    code, answer = run(capsys, *create)
    assert code == 1 and answer["error"]["code"] == "key_file"
    sign = ("sign", CODING, "--key", tmp_path / "ada.key", "--revision", 1, "--out", tmp_path / "b.json")
    code, answer = run(capsys, *sign)
    assert code == 1 and "--passphrase-file" in answer["error"]["cure"]
    assert run(capsys, *sign, "--passphrase-file", secret)[0] == 0


def test_wrong_usage_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["policy", "sign"])
    assert caught.value.code == 2
    with pytest.raises(SystemExit) as caught:
        main(["policy", "--help"])
    assert caught.value.code == 0
    assert "exit codes" in capsys.readouterr().out
