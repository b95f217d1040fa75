"""The modules about policy files: check run, run, second run, what --diff shows, and every refusal by its text."""

from __future__ import annotations

import json
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from ansible_collections.secure_agent.workspace.plugins.modules import (
    policy_bundle_check,
    policy_key,
    policy_sign,
    policy_verify,
)
from policy_parts import CASES, Officers, documented, officers, write_bundle

from saw.policy.bundle import add_signatures, describe
from saw.policy.loader import load_bundle_folder
from saw.policy.reach_diff import diff_bundles

__all__ = ["officers"]


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return write_bundle(tmp_path / "coding")


# --- policy_bundle_check ----------------------------------------------------------------------------------------------


def test_a_good_bundle_passes_and_changes_nothing(folder, run_module):
    for check in (True, False, False):
        outcome = run_module(policy_bundle_check, check=check, path=folder)
        assert not outcome["changed"]
        assert outcome["cases"] == [{"name": "reading is allowed", "fault": ""}]
        assert (outcome["blueprint"], outcome["version"]) == ("coding", "1.0.0")
        documented(policy_bundle_check)(outcome)


def test_everything_that_is_wrong_is_told_at_once_with_place_and_cure(folder, run_module):
    policy = Path(folder, "policy.yaml")
    policy.write_text(policy.read_text().replace("read-only", "read").replace("port: 443", "port: 0"))
    outcome = run_module(policy_bundle_check, path=folder)
    assert outcome.failed
    assert outcome["failure"]["code"] == "policy_invalid"
    assert outcome["failure"]["cure"]
    assert len(outcome["problems"]) >= 2
    for problem in outcome["problems"]:
        assert problem["file"] == str(policy)
        assert problem["line"] == 6
        assert problem["reason"]
        assert problem["cure"]
    assert {problem["field"].rpartition(".")[2] for problem in outcome["problems"]} >= {"access", "port"}


def test_a_case_that_comes_out_otherwise_fails_by_name(folder, run_module):
    Path(folder, "tests.yaml").write_text(CASES.replace("verdict: allow", "verdict: deny"))
    outcome = run_module(policy_bundle_check, path=folder)
    assert outcome["failure"]["code"] == "cases_failed"
    assert "reading is allowed: verdict is 'allow' instead of 'deny'" in outcome["msg"]
    assert outcome["cases"][0]["fault"]
    assert not run_module(policy_bundle_check, path=folder, cases=False).failed


def test_cases_that_are_missing_are_not_passed_over(folder, run_module):
    Path(folder, "tests.yaml").rename(Path(folder, "other.yaml"))
    outcome = run_module(policy_bundle_check, path=folder)
    assert outcome.failed
    assert f"cannot read {folder}/tests.yaml" in outcome["msg"]
    assert not run_module(policy_bundle_check, path=folder, cases_file=f"{folder}/other.yaml").failed


@pytest.mark.control("POL-01")
def test_the_reach_is_compared_with_a_base_or_with_nothing(folder, tmp_path, run_module):
    wider = write_bundle(tmp_path / "wider", "read-write")
    expected = diff_bundles(load_bundle_folder(folder), load_bundle_folder(wider))
    reach = run_module(policy_bundle_check, path=wider, reach=True, base=folder)["reach"]
    assert reach["widening"]
    assert reach["reach_digest"] == expected.digest
    assert any(line.startswith("  + ") and "POST" in line for line in reach["lines"])
    same = run_module(policy_bundle_check, path=folder, reach=True, base=folder)["reach"]
    assert not same["widening"]
    assert not any(line.startswith("  + ") for line in same["lines"])
    first = run_module(policy_bundle_check, path=folder, reach=True)["reach"]
    assert first["widening"]
    assert first["lost"] == []


# --- policy_sign and policy_verify --------------------------------------------------------------------------------------


@pytest.fixture
def signing(folder, tmp_path, officers, run_module):
    """Sign as ada and ben unless told otherwise."""

    def sign(check: bool = False, **more):
        arguments = {"path": folder, "revision": 1, "dest": str(tmp_path / "coding-1.bundle.json")}
        return run_module(policy_sign, check=check, **{**arguments, "keys": officers.keys("ada", "ben"), **more})

    return sign


@pytest.mark.control("POL-01")
def test_a_bundle_is_forecast_signed_and_then_left_alone(signing, tmp_path, officers, run_module):
    dest = tmp_path / "coding-1.bundle.json"
    forecast = signing(check=True)
    assert forecast["changed"]
    assert forecast["policy_digest"] == ""
    assert forecast["signers"] == officers.ids("ada", "ben")
    assert not dest.exists()
    documented(policy_sign)(forecast)
    signed = signing()
    assert signed["changed"]
    assert signed["signers"] == officers.ids("ada", "ben")
    counts_from = datetime.fromisoformat(describe(dest.read_bytes())[1].not_before)
    assert counts_from < datetime.now(UTC) - timedelta(minutes=4), "a workspace's clock may be behind"
    before = dest.read_bytes()
    for check in (False, True):
        again = signing(check=check)
        assert not again["changed"]
        assert again["policy_digest"] == signed["policy_digest"]
    assert dest.read_bytes() == before
    good = run_module(policy_verify, path=str(dest), root=officers.root)
    assert (good["policy_digest"], good["revision"], good["threshold"]) == (signed["policy_digest"], 1, 2)
    assert good["signers"] == signed["signers"]
    documented(policy_verify)(good)


@pytest.mark.control("POL-01")
def test_officers_sign_one_after_the_other_and_the_digest_stays(signing, tmp_path, officers, run_module):
    dest = str(tmp_path / "coding-1.bundle.json")
    first = signing(keys=officers.keys("ada"))
    refused = run_module(policy_verify, path=dest, root=officers.root)
    assert refused["failure"]["code"] == "threshold"
    assert refused["failure"]["cure"] == "let further officers sign it"
    forecast = signing(check=True, keys=officers.keys("ben"))
    assert forecast["changed"]
    assert forecast["signers"] == officers.ids("ada", "ben")
    assert describe(Path(dest).read_bytes())[2] == tuple(officers.ids("ada"))
    second = signing(keys=officers.keys("ben"))
    assert second["changed"]
    assert second["policy_digest"] == first["policy_digest"]
    assert not run_module(policy_verify, path=dest, root=officers.root).failed
    # A bundle file that travels alone gets a third one.
    third = run_module(policy_sign, path=dest, dest=dest, keys=officers.keys("cleo"))
    assert third["signers"] == officers.ids("ada", "ben", "cleo")
    assert not run_module(policy_sign, path=dest, dest=dest, keys=officers.keys("cleo"))["changed"]


def test_a_bundle_that_goes_to_another_file_is_forecast_too(signing, tmp_path, officers, run_module):
    signing()
    arguments = {"path": str(tmp_path / "coding-1.bundle.json"), "dest": str(tmp_path / "other.json")}
    arguments["keys"] = officers.keys("ada")
    assert run_module(policy_sign, check=True, **arguments)["changed"]
    assert not Path(arguments["dest"]).exists()
    assert run_module(policy_sign, **arguments)["changed"]
    assert Path(arguments["dest"]).read_bytes() == Path(arguments["path"]).read_bytes()
    assert not run_module(policy_sign, **arguments)["changed"]


def test_a_revision_means_one_content(signing, folder, tmp_path):
    signing()
    before = (tmp_path / "coding-1.bundle.json").read_bytes()
    write_bundle(Path(folder), "read-write")
    refused = signing()
    assert refused["failure"]["code"] == "revision_taken"
    assert refused["failure"]["cure"] == "sign it as the next revision"
    assert (tmp_path / "coding-1.bundle.json").read_bytes() == before
    assert signing(revision=2, first=True)["revision"] == 2


def test_nobody_signs_a_longer_window_than_they_asked_for(signing, officers):
    signing(keys=officers.keys("ada"), valid_for="900d")
    refused = signing(keys=officers.keys("ben"))
    assert refused["failure"]["code"] == "window_differs"
    assert signing(keys=officers.keys("ben"), valid_for="900d")["signers"] == officers.ids("ada", "ben")


def test_a_bundle_whose_time_is_over_is_not_signed_on(signing, tmp_path, folder, officers):
    from datetime import UTC, datetime, timedelta

    from saw.policy.bundle import build_manifest, sign
    from saw.policy.tuf_reach import bundle_diff, reach_between

    bundle, now = load_bundle_folder(folder), datetime.now(UTC).replace(microsecond=0)
    reach = reach_between(None, bundle, bundle_diff())
    manifest = build_manifest(bundle, 1, now - timedelta(days=2), now - timedelta(days=1), reach=reach)
    keys = [officers.private["ada"]]
    (tmp_path / "coding-1.bundle.json").write_bytes(sign(manifest, bundle.members, keys))
    refused = signing()
    assert refused["failure"]["code"] == "expired"
    assert refused["failure"]["cure"] == "sign the next revision"


@pytest.mark.control("POL-01")
def test_the_diff_is_of_reach_and_its_digest_is_signed(signing, tmp_path, run_module):
    signing()
    base = str(tmp_path / "coding-1.bundle.json")
    wider = write_bundle(tmp_path / "wider", "read-write")
    arguments = {"path": wider, "revision": 2, "base": base, "dest": str(tmp_path / "coding-2.bundle.json")}
    forecast = signing(check=True, **arguments)
    assert "GAINED" in forecast["diff"]["prepared"]
    assert "POST" in forecast["diff"]["prepared"]
    assert "before" not in forecast["diff"]
    signed = signing(**arguments)
    stated = describe(Path(arguments["dest"]).read_bytes())[1].reach
    assert stated.diff_digest == signed["reach"]["reach_digest"] == forecast["reach"]["reach_digest"]
    assert stated.base_digest == describe(Path(base).read_bytes())[0]
    assert stated.widening
    again = signing(**arguments)
    assert not again["changed"]
    assert again["diff"] == {}


@pytest.mark.control("POL-01")
def test_an_officer_does_not_sign_a_reach_that_is_not_what_they_see(signing, tmp_path, officers):
    signing()
    base = str(tmp_path / "coding-1.bundle.json")
    wider = write_bundle(tmp_path / "wider", "read-write")
    arguments = {"path": wider, "revision": 2, "dest": str(tmp_path / "coding-2.bundle.json")}
    blind = signing(**arguments, keys=officers.keys("ada"))
    assert "who signs sees what changes" in blind["msg"]
    assert blind["failure"]["cure"].startswith("give base")
    both = signing(**arguments, keys=officers.keys("ada"), base=base, first=True)
    assert "exclude each other" in both["msg"]
    folder = signing(**arguments, keys=officers.keys("ada"), base=wider)
    assert "is a folder" in folder["msg"]
    assert not Path(arguments["dest"]).exists()
    signing(**arguments, keys=officers.keys("ada"), first=True)  # the whole reach is new, says ada
    refused = signing(**arguments, keys=officers.keys("ben"), base=base)
    assert refused["failure"]["code"] == "reach_differs"
    assert "against nothing (first release)" in refused["msg"]
    Path(arguments["dest"]).unlink()
    signing(**arguments, keys=officers.keys("ada"), base=base)
    assert signing(**arguments, keys=officers.keys("ben"), base=base)["signers"] == officers.ids("ada", "ben")


def test_signing_programs_sign_and_check_mode_does_not_touch_them(signing, tmp_path, officers):
    signer = tmp_path / "signer"
    key = officers.keys("cleo")[0]
    signer.write_text(
        "#!/bin/sh\nset -eu\n"
        f'if [ "${{1:-}}" = --public ]; then exec cat {key.removesuffix(".key")}.pub; fi\n'
        f"cat > {tmp_path}/data\nopenssl pkeyutl -sign -rawin -inkey {key} -in {tmp_path}/data\n"
    )
    signer.chmod(0o755)
    keys = [*officers.keys("ada"), f"exec:{signer}"]
    assert signing(check=True, keys=keys)["signers"] == officers.ids("ada", "cleo")
    assert not (tmp_path / "data").exists()
    assert signing(keys=keys)["signers"] == officers.ids("ada", "cleo")


def test_no_key_and_no_passphrase_reaches_a_result(folder, tmp_path, run_module):
    passphrase = tmp_path / "passphrase"
    passphrase.write_text("correct horse battery\n")
    made = run_module(policy_key, directory=str(tmp_path / "own"), names=["dora"], passphrase_file=str(passphrase))
    key = tmp_path / "own/dora.key"
    arguments = {"path": folder, "revision": 1, "dest": str(tmp_path / "b.json"), "keys": [str(key)]}
    closed = run_module(policy_sign, **arguments)
    assert closed["failure"]["code"] == "key_file"
    opened = run_module(policy_sign, **arguments, passphrase_files=[str(passphrase)])
    assert opened["changed"]
    shown = json.dumps([made, closed, opened])
    assert "correct horse" not in shown
    assert all(line not in shown for line in key.read_text().splitlines() if "PRIVATE" not in line)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"revision": None}, "a new bundle needs a revision"),
        ({"keys": []}, "nobody signs"),
        ({"keys": ["/nowhere/ada.key"]}, "cannot read the key /nowhere/ada.key"),
        ({"valid_for": "a month"}, "valid_for: 'a month' is not a duration"),
        ({"dest": "/nowhere/b.json"}, "cannot write /nowhere/b.json"),
        ({"passphrase_files": ["/a", "/b", "/c"]}, "3 passphrase files for 2 keys fit no reading"),
        ({"base": "/nowhere.json"}, "cannot read /nowhere.json"),
    ],
)
def test_what_cannot_be_signed_says_why(signing, change, text):
    refused = signing(**change)
    assert refused.failed
    assert text in refused["msg"]
    assert refused["failure"]["code"]
    assert refused["failure"]["cure"]


def test_a_foreign_bundle_and_an_old_revision_are_not_verified(signing, tmp_path, officers, run_module):
    signing()
    dest = str(tmp_path / "coding-1.bundle.json")
    old = run_module(policy_verify, path=dest, root=officers.root, min_revision=2)
    assert old["failure"]["code"] == "rolled_back"
    foreign = Officers(tmp_path / "foreign")
    assert run_module(policy_verify, path=dest, root=foreign.root)["failure"]["code"] == "threshold"
    both = add_signatures(Path(dest).read_bytes(), [foreign.private["ada"], foreign.private["ben"]])
    Path(dest).write_bytes(both)
    assert not run_module(policy_verify, check=True, path=dest, root=foreign.root)["changed"]


# --- policy_key -------------------------------------------------------------------------------------------------------


def test_keys_are_forecast_made_private_and_then_left_alone(tmp_path, run_module):
    arguments = {"directory": str(tmp_path / "keys"), "names": ["ada", "ben"]}
    forecast = run_module(policy_key, check=True, **arguments)
    assert forecast["created"] == ["ada", "ben"]
    assert not (tmp_path / "keys").exists()
    made = run_module(policy_key, **arguments)
    assert made["changed"]
    assert made["diff"] == forecast["diff"]
    documented(policy_key)(made)
    key = tmp_path / "keys/ada.key"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert stat.S_IMODE(key.parent.stat().st_mode) == 0o700
    before = key.read_bytes()
    for check in (False, True):
        again = run_module(policy_key, check=check, **arguments)
        assert not again["changed"]
        assert again["created"] == []
        assert again["public_keys"] == made["public_keys"]
    assert key.read_bytes() == before


def test_a_key_that_others_may_read_is_closed(tmp_path, run_module):
    arguments = {"directory": str(tmp_path / "keys"), "names": ["ada"]}
    run_module(policy_key, **arguments)
    key = tmp_path / "keys/ada.key"
    key.chmod(0o640)
    assert run_module(policy_key, check=True, **arguments)["changed"]
    assert stat.S_IMODE(key.stat().st_mode) == 0o640
    assert run_module(policy_key, **arguments)["diff"]["after"][str(key)] == "0o600"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert not run_module(policy_key, **arguments)["changed"]


def test_public_halves_are_told_without_making_anything(tmp_path, officers, run_module):
    (officers.directory / "cleo.key").unlink()  # she keeps hers in a token
    told = run_module(policy_key, directory=str(officers.directory))
    assert not told["changed"]
    assert [(key["name"], key["private_here"]) for key in told["public_keys"]] == [
        ("ada", True),
        ("ben", True),
        ("cleo", False),
    ]
    assert sorted(key["key_id"] for key in told["public_keys"]) == officers.ids("ada", "ben", "cleo")
    assert "PRIVATE" not in json.dumps(told)
    assert not run_module(policy_key, directory=str(officers.directory), names=["cleo"])["changed"]


def test_half_a_key_and_a_bad_name_are_refused(tmp_path, officers, run_module):
    (officers.directory / "ada.pub").unlink()
    refused = run_module(policy_key, directory=str(officers.directory), names=["ada"])
    assert refused["failure"]["code"] == "key_file"
    assert "lies there without" in refused["msg"]
    assert "is not a key name" in run_module(policy_key, directory=str(tmp_path), names=["Ada!"])["msg"]
