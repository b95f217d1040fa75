"""What is released, and what a release changes: against a real broker and against the officers' copy."""

from __future__ import annotations

from pathlib import Path

import pytest
from ansible_collections.secure_agent.workspace.plugins.modules import policy_release, policy_release_info
from broker_rig import GOVERNANCE, POLICY
from policy_parts import documented
from test_broker_modules import lay_out

from saw.policy.bundle import describe
from saw.policy.keys import key_id

WIDER = POLICY.replace("read-only", "full")


@pytest.fixture(scope="module")
def two_releases(broker_context, tmp_path_factory):
    """Revisions 1 and 2 of ``coding`` in the ring ``told``; the second one reaches more. Returns the digests."""
    from saw.policy.tuf_repository import adopt_publication

    lab = broker_context
    digests = []
    for revision, content in ((1, POLICY), (2, WIDER)):
        digest, publication = lab.officers.publication(revision, ring="told", content=content)
        from broker_rig import encode

        lab.operator.request("POST", "/v1/policy/publish", encode(publication))
        adopt_publication(lab.officers.directory, publication)
        digests.append(digest)
    return digests


def test_the_broker_tells_revision_digest_signers_and_window(broker_context, two_releases, run_module):
    arguments = {"context": broker_context.context, "ring": "told", "blueprint": "coding"}
    for check in (True, False):
        outcome = run_module(policy_release_info, check=check, **arguments)
        assert not outcome["changed"]
        [release] = outcome["releases"]
        assert (release["ring"], release["blueprint"], release["revision"]) == ("told", "coding", 2)
        assert release["policy_digest"] == two_releases[1]
        signers = sorted(key_id(key.public_key()) for key in broker_context.officers.keys[:2])
        assert sorted(release["signers"]) == signers
        assert release["not_after"] > release["not_before"]
        assert [old["policy_digest"] for old in release["history"]] == two_releases[:1]
        assert release["rollout"] == {
            "state": "running",
            "reason": "",
            "previous_revision": 1,
            "returns_to": None,
            "rollback": "",
            "standing": 2,
        }
        assert outcome["limits"]["require_rollback"] is False
        documented(policy_release_info)(outcome)
    assert run_module(policy_release_info, **{**arguments, "ring": "nowhere"})["releases"] == []


def test_the_officers_copy_tells_the_same_and_where_the_bundles_lie(broker_context, two_releases, run_module, tmp_path):
    copy = str(broker_context.officers.directory)
    # No broker is asked: this context leads nowhere.
    [release] = run_module(policy_release_info, context=str(tmp_path / "none"), repository=copy, ring="told")[
        "releases"
    ]
    for one, digest in ((release, two_releases[1]), (release["history"][0], two_releases[0])):
        assert one["policy_digest"] == digest
        assert describe(Path(one["bundle"]).read_bytes())[0] == digest
        assert set(one["members"]) == {"policy.yaml", "governance.yaml"}
    assert release["members"] != release["history"][0]["members"]
    assert release["role"] == "targets"


def test_a_copy_that_is_none_and_a_broker_that_is_away_are_named(run_module, tmp_path):
    assert run_module(policy_release_info, repository=str(tmp_path))["releases"] == []
    context = tmp_path / "context.json"
    context.write_text('{"broker": {"socket": "/nowhere.sock"}}')
    away = run_module(policy_release_info, context=str(context))
    assert away["failure"]["code"] == "unavailable"
    assert away["failure"]["cure"]


@pytest.mark.control("POL-01")
def test_a_change_of_reach_that_nobody_signed_is_refused_in_check_mode_too(
    broker_context, two_releases, run_module, tmp_path
):
    from datetime import UTC, datetime

    from saw.policy.tuf_repository import stage_publication

    lab, path = broker_context, "rings/told/coding.bundle.json"
    _, raw = lab.officers.bundle(3, POLICY.replace("git.example.com", "git3.example.com"))
    blind = stage_publication(lab.officers.directory, path, raw, lab.officers.keys[:2], datetime.now(UTC))
    folder, copy = lay_out(blind, tmp_path / "blind"), str(lab.officers.directory)
    for check, more in ((True, {"repository": copy}), (False, {"repository": copy}), (False, {})):
        refused = run_module(policy_release, check=check, context=lab.context, publication=folder, **more)
        assert refused["failure"]["code"] == "unsigned_widening"
        assert "no diff was signed" in refused["msg"]
    [release] = run_module(policy_release_info, context=lab.context, ring="told")["releases"]
    assert release["policy_digest"] == two_releases[1]


@pytest.mark.control("POL-01")
def test_a_release_shows_its_change_of_reach(broker_context, two_releases, run_module, tmp_path):
    lab = broker_context
    narrow = POLICY.replace("git.example.com", "git2.example.com")
    _, publication = lab.officers.publication(3, ring="told", content=narrow, governance=GOVERNANCE)
    arguments = {
        "context": lab.context,
        "publication": lay_out(publication, tmp_path / "three"),
        "repository": str(lab.officers.directory),
    }
    forecast = run_module(policy_release, check=True, **arguments)
    [(path, reach)] = forecast["reach"].items()
    assert path == "rings/told/coding.bundle.json"
    assert reach["widening"]
    assert any("git2.example.com" in item["what"] for item in reach["gained"])
    assert "+ " in forecast["diff"]["prepared"]
    assert "git2.example.com" in forecast["diff"]["prepared"]
    released = run_module(policy_release, **arguments)
    assert released["reach"] == forecast["reach"]
    again = run_module(policy_release, **arguments)
    assert not again["changed"]
    assert again["reach"] == {}
    assert "prepared" not in again["diff"]
