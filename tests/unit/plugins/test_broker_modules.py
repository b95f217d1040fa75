"""The modules of the group ``broker`` against a real broker: check run, run, second run, and every refusal by its text."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
from ansible_collections.secure_agent.workspace.plugins.modules import (
    broker_certificate,
    delegation,
    image_release,
    image_release_info,
    policy_release,
    workspace_info,
    workspace_registration,
)
from broker_rig import image_record, signed_record
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from saw.identity.x509 import Authority, new_key_and_csr

PROFILE = {"sponsor": "dana@example.com", "blueprint": "coding", "ring": "stable", "image": "workspace"}


def endorsement_key() -> str:
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048).public_key()
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


# --- workspace_registration -------------------------------------------------------------------------------------------


@pytest.mark.control("ID-04")
def test_registration_is_checked_made_and_then_left_alone(broker_context, run_module):
    wanted = {"context": broker_context.context, "id": "ws-one", **PROFILE}
    forecast = run_module(workspace_registration, check=True, **wanted)
    assert forecast["changed"]
    assert run_module(workspace_info, context=broker_context.context, id="ws-one")["workspaces"] == []
    made = run_module(workspace_registration, **wanted)
    assert made["changed"]
    assert made["workspace"]["state"] == "requested"
    assert made["workspace"]["number"] >= 1
    again = run_module(workspace_registration, **wanted)
    assert not again["changed"]
    assert again["workspace"] == made["workspace"]
    assert not run_module(workspace_registration, check=True, **wanted)["changed"]


def test_a_new_workspace_needs_its_whole_profile(broker_context, run_module):
    outcome = run_module(workspace_registration, context=broker_context.context, id="ws-bare", blueprint="coding")
    assert outcome["msg"] == "workspace ws-bare does not exist and sponsor, ring, image is missing"
    assert outcome["failure"]["code"] == "profile_missing"


def test_another_profile_is_refused_and_nothing_changes(broker_context, run_module):
    context = broker_context.context
    run_module(workspace_registration, context=context, id="ws-fixed", **PROFILE)
    outcome = run_module(workspace_registration, context=context, id="ws-fixed", **{**PROFILE, "ring": "canary"})
    assert outcome["failure"] == {
        "code": "profile_fixed",
        "details": {"ring": {"is": "stable", "wanted": "canary"}},
        "cure": "a change of profile means a new workspace",
    }
    assert run_module(workspace_info, context=context, id="ws-fixed")["workspaces"][0]["ring"] == "stable"


def test_the_endorsement_key_is_recorded_once(broker_context, run_module):
    key = endorsement_key()
    wanted = {"context": broker_context.context, "id": "ws-key", **PROFILE}
    assert run_module(workspace_registration, **wanted, ek_pub_pem=key)["workspace"]["ek_recorded"]
    assert not run_module(workspace_registration, **wanted, ek_pub_pem=key)["changed"]
    other = run_module(workspace_registration, **wanted, ek_pub_pem=endorsement_key())
    assert other["failure"]["code"] == "ek_recorded"
    assert "ws-key already has another endorsement key" in other["msg"]


def test_steps_are_taken_once_and_refused_ones_say_why(broker_context, run_module):
    wanted = {"context": broker_context.context, "id": "ws-steps", **PROFILE}
    assert run_module(workspace_registration, **wanted, state="provisioning")["workspace"]["state"] == "provisioning"
    assert run_module(workspace_registration, check=True, **wanted, state="attesting")["changed"]
    assert run_module(workspace_registration, **wanted, state="attesting")["changed"]
    assert not run_module(workspace_registration, **wanted, state="attesting")["changed"]
    # It is past provisioning; asking for it again does not take it back.
    assert not run_module(workspace_registration, **wanted, state="provisioning")["changed"]
    assert run_module(workspace_registration, **wanted, state="decommissioned")["changed"]
    refused = run_module(workspace_registration, **wanted, state="attesting")
    assert refused["msg"].startswith("ws-steps is decommissioned and cannot become attesting")
    assert refused["failure"]["code"] == "transition_refused"


@pytest.mark.control("LIF-02")
def test_quarantined_is_the_kill_switch(broker_context, run_module):
    wanted = {"context": broker_context.context, "id": "ws-kill", **PROFILE}
    assert run_module(workspace_registration, **wanted, state="quarantined", reason="incident")["changed"]
    assert not run_module(workspace_registration, **wanted, state="quarantined", reason="incident")["changed"]
    events = broker_context.operator.request("GET", "/v1/audit/events?after=0&limit=500")
    assert "workspace.kill" in json.dumps(events)


def test_decommissioning_what_the_broker_does_not_know_changes_nothing(broker_context, run_module):
    outcome = run_module(workspace_registration, context=broker_context.context, id="ws-nobody", state="decommissioned")
    assert not outcome["changed"]


def test_a_broker_that_is_away_is_named_with_the_cure(tmp_path, run_module):
    context = tmp_path / "context.json"
    context.write_text(json.dumps({"broker": {"socket": str(tmp_path / "nobody.sock")}}))
    outcome = run_module(workspace_info, context=str(context))
    assert outcome["failure"]["code"] == "unavailable"
    assert "the broker does not answer" in outcome["msg"]


# --- image_release ----------------------------------------------------------------------------------------------------


def signed(broker_context, path: Path, officers: int = 2, **fields) -> Path:
    path.write_text(json.dumps(signed_record(image_record(**fields), broker_context.officers.keys[:officers])))
    return path


@pytest.mark.control("P0-04")
def test_an_image_is_registered_once(broker_context, run_module, tmp_path):
    record = signed(broker_context, tmp_path / "image.signed.json", name="second", digest="2" * 64)
    arguments = {"context": broker_context.context, "record": str(record)}
    assert run_module(image_release, check=True, **arguments)["changed"]
    made = run_module(image_release, **arguments)
    assert (made["changed"], made["image"]["state"]) == (True, "candidate")
    assert not run_module(image_release, **arguments)["changed"]
    assert not run_module(image_release, check=True, **arguments)["changed"]


@pytest.mark.control("P0-04")
def test_an_image_is_promoted_deprecated_and_revoked_once_each(broker_context, run_module, tmp_path):
    record = signed(broker_context, tmp_path / "image.signed.json", name="moved", digest="4" * 64)
    context = broker_context.context
    wanted = {"context": context, "record": str(record), "state": "stable"}
    assert run_module(image_release, check=True, **wanted)["image"]["state"] == "stable"
    assert run_module(image_release, **wanted)["changed"]
    assert not run_module(image_release, **wanted)["changed"]
    for state in ("deprecated", "revoked"):
        step = {"context": context, "name": "moved", "state": state, "reason": "test"}
        assert run_module(image_release, check=True, **step)["changed"]
        assert run_module(image_release, **step)["changed"]
        assert not run_module(image_release, **step)["changed"]
    refused = run_module(image_release, **wanted)
    assert refused["failure"]["code"] == "transition_refused"
    assert "is revoked and cannot become stable" in refused["msg"]


@pytest.mark.control("P0-04")
def test_a_record_without_enough_signatures_incomplete_or_unreadable_is_refused(broker_context, run_module, tmp_path):
    context = broker_context.context
    one = signed(broker_context, tmp_path / "one.json", officers=1, name="third", digest="3" * 64)
    refused = run_module(image_release, context=context, record=str(one))
    assert refused["failure"]["code"] == "record_threshold"
    assert "1 of 1 signatures are good and by different officers, 2 are needed" in refused["msg"]
    part = signed(broker_context, tmp_path / "part.json", name="third", digest="3" * 64, pcrs={"0": "0" * 64})
    assert run_module(image_release, context=context, record=str(part))["failure"]["code"] == "record_incomplete"
    plain = tmp_path / "plain.json"
    plain.write_text(json.dumps(image_record("third", "3" * 64)))
    assert run_module(image_release, context=context, record=str(plain))["failure"]["code"] == "malformed"
    assert run_module(image_release, context=context, name="none")["failure"]["code"] == "unknown_image"
    absent = run_module(image_release, context=context, record=str(tmp_path / "none.json"))
    assert absent["failure"]["code"] == "record_unreadable"


# --- image_release_info -----------------------------------------------------------------------------------------------


def test_images_are_read_by_name_digest_state_and_variant(broker_context, run_module, tmp_path):
    context = broker_context.context
    broker_context.register_image(image_record("told-stable", "5" * 64))
    broker_context.register_image({**image_record("told-gpu", "6" * 64), "variant": "gpu"}, promoted=False)

    def names(**wanted):
        found = run_module(image_release_info, context=context, **wanted)
        assert not found["changed"]
        return [image["name"] for image in found["images"] if image["name"].startswith("told-")]

    assert names() == ["told-gpu", "told-stable"]
    assert names(name="told-gpu") == ["told-gpu"]
    assert names(image_sha256="5" * 64) == ["told-stable"]
    assert names(states=["stable"]) == ["told-stable"]
    assert names(states=["candidate", "stable"], variant="gpu") == ["told-gpu"]
    assert names(variant="cpu") == ["told-stable"]
    assert names(name="told-none") == []


@pytest.mark.control("LIF-03")
def test_a_workspace_that_can_go_back_nowhere_is_told_why(broker_context, run_module):
    context = broker_context.context
    run_module(workspace_registration, context=context, id="ws-told", **PROFILE)
    refused = run_module(image_release_info, context=context, workspace="ws-told")
    assert refused["failure"]["code"] == "no_earlier_image"
    assert "ws-told can go back to from workspace: it is the first that it was bound to" in refused["msg"]
    assert "workspace_rebuild" in refused["failure"]["cure"]
    missing = run_module(image_release_info, context=context, workspace="ws-none", check=True)
    assert missing["failure"]["code"] == "unknown_workspace"


# --- broker_certificate -----------------------------------------------------------------------------------------------


@pytest.fixture
def certificate(broker_context, run_module):
    """Ask for the certificate of the perimeter ``edge``."""

    def ask(csr: bytes, present: str = "", **more):
        return run_module(
            broker_certificate,
            context=broker_context.context,
            kind="perimeter",
            name="edge",
            csr=csr.decode(),
            certificate=present,
            **more,
        )

    return ask


def test_a_certificate_is_issued_once_and_renewed_when_it_ends_soon(certificate):
    _key, csr = new_key_and_csr("edge")
    forecast = certificate(csr, check=True)
    assert forecast["changed"]
    assert forecast["certificate"] == ""
    first = certificate(csr)
    assert first["reason"] == "there is none"
    again = certificate(csr, first["certificate"])
    assert not again["changed"]
    assert again["certificate"] == first["certificate"]
    renewed = certificate(csr, first["certificate"], renew_days=31)
    assert renewed["reason"] == "it ends within 31 days"
    assert renewed["certificate"] != first["certificate"]


def test_a_certificate_for_another_key_or_of_another_authority_is_replaced(certificate, tmp_path):
    _key, csr = new_key_and_csr("edge")
    _other, other_csr = new_key_and_csr("edge")
    mine = certificate(csr)["certificate"]
    assert certificate(other_csr, mine)["reason"] == "it is for another key"
    foreign = Authority.create(tmp_path / "foreign", "saw.example", datetime.now(UTC))
    theirs = foreign.issue_perimeter(csr, "edge", datetime.now(UTC), 3600)
    assert certificate(csr, theirs.decode())["reason"] == "it is not from this authority"
    assert certificate(csr, "garbage")["reason"] == "it is not from this authority"


def test_an_empty_request_is_refused_outside_check_mode(certificate):
    outcome = certificate(b"")
    assert outcome["failure"]["code"] == "csr_missing"
    assert certificate(b"", check=True)["changed"]


# --- policy_release ---------------------------------------------------------------------------------------------------


def lay_out(publication, folder: Path) -> str:
    for part, files in (("metadata", publication.metadata), ("targets", publication.targets)):
        for name, raw in files.items():
            path = folder / part / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(raw)
    return str(folder)


@pytest.mark.control("POL-01")
def test_a_publication_is_released_once(broker_context, run_module, tmp_path):
    digest, publication = broker_context.officers.publication(1)
    arguments = {"context": broker_context.context, "publication": lay_out(publication, tmp_path / "one")}
    forecast = run_module(policy_release, check=True, **arguments)
    assert forecast["changed"]
    assert forecast["releases"] == []
    released = run_module(policy_release, **arguments, repository=str(broker_context.officers.directory))
    assert released["changed"]
    assert [(one["ring"], one["revision"], one["policy_digest"]) for one in released["releases"]] == [
        ("stable", 1, digest)
    ]
    assert not run_module(policy_release, **arguments)["changed"]
    assert not run_module(policy_release, check=True, **arguments)["changed"]


@pytest.mark.control("POL-01")
def test_a_publication_that_one_officer_signed_is_refused(broker_context, run_module, tmp_path):
    from saw.policy.tuf_repository import stage_publication

    _digest, raw = broker_context.officers.bundle(9)
    keys = broker_context.officers.keys[:1]
    alone = stage_publication(
        broker_context.officers.directory, "rings/lone/coding.bundle.json", raw, keys, datetime.now(UTC)
    )
    outcome = run_module(policy_release, context=broker_context.context, publication=lay_out(alone, tmp_path / "alone"))
    assert outcome.failed
    assert outcome["failure"]["code"]
    assert outcome["failure"]["cure"]
    rings = {one["ring"] for one in broker_context.operator.request("GET", "/v1/policy/state")["releases"]}
    assert "lone" not in rings


def test_a_folder_without_publication_is_named(broker_context, run_module, tmp_path):
    outcome = run_module(policy_release, context=broker_context.context, publication=str(tmp_path))
    assert outcome["msg"] == f"{tmp_path} holds no publication"
    assert outcome["failure"]["code"] == "publication_missing"


# --- delegation -------------------------------------------------------------------------------------------------------

TASK = {"task": "tidy the notes", "resources": [{"host": "api.example.com", "paths": ["/v1/**"]}], "duration": "8h"}


@pytest.mark.control("DEL-01")
def test_a_delegation_is_checked_issued_and_then_left_alone(broker_context, run_module):
    context = broker_context.context
    run_module(workspace_registration, context=context, id="ws-del", **PROFILE)
    wanted = {"context": context, "workspace": "ws-del", **TASK}
    assert run_module(delegation, check=True, **wanted)["changed"]
    path = "/v1/delegations?workspace_id=ws-del"
    assert broker_context.operator.request("GET", path)["delegations"] == []
    made = run_module(delegation, **wanted)
    assert made["changed"]
    assert (made["delegation"]["state"], made["delegation"]["sponsor"]) == ("active", "dana@example.com")
    assert "statement" not in json.dumps(made)
    again = run_module(delegation, **wanted)
    assert not again["changed"]
    assert again["delegation"]["id"] == made["delegation"]["id"]
    assert not run_module(delegation, check=True, **wanted)["changed"]


@pytest.mark.control("DEL-01")
def test_another_content_or_a_near_end_replaces_a_delegation(broker_context, run_module):
    context = broker_context.context
    run_module(workspace_registration, context=context, id="ws-del-2", **PROFILE)
    wanted = {"context": context, "workspace": "ws-del-2", **TASK}
    first = run_module(delegation, **wanted)["delegation"]["id"]
    narrower = run_module(delegation, **{**wanted, "approval": "read-only"})
    assert narrower["revoked"] == [first]
    renewed = run_module(delegation, **{**wanted, "approval": "read-only", "renew": "9h"})
    assert renewed["revoked"] == [narrower["delegation"]["id"]]
    assert not run_module(delegation, **{**wanted, "approval": "read-only", "renew": "7h"})["changed"]


@pytest.mark.control("DEL-01")
def test_tools_are_handed_out_compared_and_left_to_policy_where_none_are_named(broker_context, run_module):
    context = broker_context.context
    run_module(workspace_registration, context=context, id="ws-del-5", **PROFILE)
    wanted = {"context": context, "workspace": "ws-del-5", **TASK}
    plain = run_module(delegation, **wanted)["delegation"]
    assert "tools" not in plain
    named = {**wanted, "tools": [{"server": "tracker", "tools": ["search", "read_*"]}, {"server": "files"}]}
    assert "tools" in run_module(delegation, check=True, **named)["delegation"]
    made = run_module(delegation, **named)
    assert made["revoked"] == [plain["id"]]
    assert made["delegation"]["tools"] == [
        {"server": "tracker", "tools": ["search", "read_*"]},
        {"server": "files", "tools": ["*"]},
    ]
    assert not run_module(delegation, **named)["changed"]
    none = run_module(delegation, **{**wanted, "tools": []})
    assert (none["delegation"]["tools"], none["revoked"]) == ([], [made["delegation"]["id"]])
    assert not run_module(delegation, **{**wanted, "tools": []})["changed"]
    assert run_module(delegation, **wanted)["revoked"] == [none["delegation"]["id"]]
    refused = run_module(delegation, **{**wanted, "tools": [{"server": "a[b]"}]})
    assert refused["failure"]["code"] == "delegation_invalid"


@pytest.mark.control("DEL-01")
def test_classes_of_data_are_handed_out_and_compared(broker_context, run_module):
    context = broker_context.context
    run_module(workspace_registration, context=context, id="ws-del-6", **PROFILE)
    wanted = {"context": context, "workspace": "ws-del-6", **TASK}
    plain = run_module(delegation, **wanted)["delegation"]
    assert "data_classes" not in plain
    raised = {**wanted, "data_classes": ["confidential"]}
    assert run_module(delegation, check=True, **raised)["delegation"]["data_classes"] == ["confidential"]
    made = run_module(delegation, **raised)
    assert (made["delegation"]["data_classes"], made["revoked"]) == (["confidential"], [plain["id"]])
    assert not run_module(delegation, **raised)["changed"]
    lower = run_module(delegation, **{**wanted, "parent": made["delegation"]["id"], "task": "a part", "duration": "1h"})
    assert "leaves out the confidential data" in str(lower["failure"]["details"]["problems"])
    assert run_module(delegation, **{**raised, "parent": made["delegation"]["id"], "task": "a part", "duration": "1h"})[
        "changed"
    ]
    refused = run_module(delegation, **{**wanted, "data_classes": ["Confidential"]})
    assert refused["failure"]["code"] == "delegation_invalid"


@pytest.mark.control("DEL-01")
def test_beside_a_broker_of_before_which_knows_no_pages_and_no_states_only_what_counts_is_taken_back():
    task, calls = TASK["task"], []
    every = [{"id": f"dlg-{state}", "state": state, "task": task} for state in ("revoked", "ended", "active")]

    def request(method, path, body=None):
        calls.append((method, path.partition("?")[0]))
        return {"delegations": every} if method == "GET" else {"revoked": ["dlg-active"]}

    module = SimpleNamespace(
        params={"workspace": "ws-a", "task": task, "state": "absent", "reason": "r"}, check_mode=False
    )
    found = delegation.ensure(module, SimpleNamespace(request=request))
    assert (found["changed"], found["revoked"]) == (True, ["dlg-active"])
    assert calls == [("GET", "/v1/delegations"), ("POST", "/v1/delegations/dlg-active/revoke")]


@pytest.mark.control("DEL-01")
def test_a_delegation_is_taken_back_once(broker_context, run_module):
    context = broker_context.context
    run_module(workspace_registration, context=context, id="ws-del-3", **PROFILE)
    made = run_module(delegation, context=context, workspace="ws-del-3", **TASK)["delegation"]["id"]
    gone = {"context": context, "workspace": "ws-del-3", "task": TASK["task"], "state": "absent"}
    forecast = run_module(delegation, check=True, **gone)
    assert (forecast["changed"], forecast["revoked"]) == (True, [])
    assert run_module(delegation, **gone)["revoked"] == [made]
    assert not run_module(delegation, **gone)["changed"]


@pytest.mark.control("DEL-02")
def test_a_wider_part_an_unknown_workspace_and_a_malformed_time_are_refused_by_name(broker_context, run_module):
    context = broker_context.context
    run_module(workspace_registration, context=context, id="ws-del-4", **PROFILE)
    wanted = {"context": context, "workspace": "ws-del-4", **TASK}
    whole = run_module(delegation, **wanted)["delegation"]["id"]
    wide = {**wanted, "task": "more", "parent": whole, "resources": [{"host": "api.example.com"}], "duration": "1h"}
    refused = run_module(delegation, **wide)
    assert refused["failure"]["code"] == "delegation_wider"
    assert f"resources[0] (api.example.com) lies within no resource of {whole}" in refused["msg"]
    assert run_module(delegation, **{**wide, "resources": TASK["resources"]})["changed"]
    assert run_module(delegation, **{**wanted, "workspace": "ws-none"})["failure"]["code"] == "unknown_workspace"
    assert (
        run_module(delegation, **{**wanted, "task": "x", "duration": "soon"})["failure"]["code"] == "duration_malformed"
    )
