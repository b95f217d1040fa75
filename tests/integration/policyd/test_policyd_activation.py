"""From a released policy to enforcement: what loads, what is refused, and that nothing ends in between."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import threading
from datetime import UTC, datetime, timedelta

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from policyd_lab import Lab, until

from saw.policy.bundle import describe
from saw.policy.tuf_repository import init_repository
from saw.runtime.generation import SWITCHED
from saw.runtime.policyd_dry_run import DryRun


def digest_of(raw: bytes) -> str:
    return describe(raw)[0]


@pytest.mark.control("POL-02")
def test_a_released_policy_is_verified_measured_enforced_and_acknowledged_in_this_order(lab):
    steps: list[str] = []
    raw = lab.publish()
    lab.agent(steps.append).cycle()
    assert steps == ["compile", "validate", "place", "measure", "switch", "read back"]
    assert lab.current() == digest_of(raw)
    assert lab.decided()["policy_digest"] == digest_of(raw)
    assert lab.attestd.measured == [{"op": "measure", "policy_digest": digest_of(raw), "revision": 1}]
    assert lab.told() == {"state": "loaded", "policy_digest": digest_of(raw), "revision": 1, "reason": "", "detail": ""}
    assert [(r["kind"], r["state"], r["policy_digest"]) for r in lab.broker.reports] == [
        ("policy_state", state, digest_of(raw)) for state in ("offered", "verified", "loaded")
    ]
    directory = lab.run / "generations" / "current"
    index = json.loads((directory / "generation.json").read_text())
    for name, digest in index["files"].items():
        assert hashlib.sha256((directory / name).read_bytes()).hexdigest() == digest
    # The sandbox and the MCP mediator read the policy; the generation's TLS key is ring 1's alone.
    modes = {name: (directory / name).stat().st_mode & 0o7777 for name in (".", "governance.yaml", "leaf.key")}
    assert modes == {".": 0o755, "governance.yaml": 0o644, "leaf.key": 0o640}


@pytest.mark.control("POL-02")
def test_the_sandbox_trusts_the_authority_that_signed_the_leaf(lab):
    lab.publish()
    lab.agent().cycle()
    leaf = lab.run / "generations" / "current" / "leaf.pem"
    bundle = lab.run / "sandbox" / "ca-bundle.pem"
    command = ["openssl", "verify", "-verify_hostname", "api.example.com", "-CAfile", bundle, leaf]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    command[3] = "other.example.com"
    assert subprocess.run(command, capture_output=True, check=False).returncode != 0
    key = lab.run / "ring1-ca" / "ca.key"
    assert (key.stat().st_mode & 0o777, key.parent.stat().st_mode & 0o777) == (0o600, 0o700)


@pytest.fixture
def loaded(lab):
    """A lab with revision 1 in force, its agent, and that digest."""
    raw = lab.publish()
    agent = lab.agent()
    agent.cycle()
    assert lab.told()["state"] == "loaded"
    return lab, agent, digest_of(raw)


def refused(lab: Lab, agent, before: str) -> str:
    """Go round once; everything must be as before, refused and reported. Return the reason."""
    agent.cycle()
    told = lab.told()
    assert told["state"] == "refused"
    assert (told["policy_digest"], lab.current(), lab.decided()["policy_digest"]) == (before, before, before)
    assert ("refused", told["reason"]) in lab.reported()
    assert ("refused", told["reason"]) in lab.reported("finding")
    return told["reason"]


@pytest.mark.control("POL-02")
def test_a_newer_revision_replaces_the_old_one(loaded):
    lab, agent, before = loaded
    raw = lab.publish()
    agent.cycle()
    assert lab.current() == digest_of(raw) != before
    assert not (lab.run / "generations" / before).exists()


@pytest.mark.control("POL-02")
def test_a_repository_set_back_is_refused(loaded, tmp_path):
    lab, agent, _ = loaded
    shutil.copytree(lab.store, tmp_path / "old")
    raw = lab.publish()
    agent.cycle()
    shutil.rmtree(lab.store)
    shutil.copytree(tmp_path / "old", lab.store)
    assert refused(lab, agent, digest_of(raw)) == "rollback"


@pytest.mark.control("POL-02")
def test_an_old_policy_is_refused_even_when_the_tuf_state_was_wiped(loaded, tmp_path):
    lab, agent, _ = loaded
    shutil.copytree(lab.store, tmp_path / "old")
    raw = lab.publish()
    agent.cycle()
    shutil.rmtree(lab.store)
    shutil.copytree(tmp_path / "old", lab.store)
    shutil.rmtree(lab.state / "tuf")
    assert refused(lab, agent, digest_of(raw)) == "rolled_back"


@pytest.mark.control("POL-02")
def test_a_frozen_repository_is_refused(loaded):
    lab, agent, before = loaded
    lab.publish(now=datetime.now(UTC) - timedelta(hours=2))
    assert refused(lab, agent, before) == "freeze"


@pytest.mark.control("POL-02")
def test_metadata_without_enough_officers_is_refused(loaded):
    lab, agent, before = loaded
    lab.publish()
    newest = max((lab.store / "metadata").glob("*.targets.json"), key=lambda path: int(path.name.split(".")[0]))
    metadata = json.loads(newest.read_text())
    metadata["signatures"] = metadata["signatures"][:1]
    newest.write_text(json.dumps(metadata))
    assert refused(lab, agent, before) == "threshold"


@pytest.mark.control("POL-02")
def test_a_changed_bundle_is_refused(loaded):
    lab, agent, before = loaded
    lab.publish()
    newest = max((lab.store / "targets" / "rings" / "stable").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    raw = newest.read_bytes()
    newest.write_bytes(raw[:200] + bytes([raw[200] ^ 1]) + raw[201:])
    assert refused(lab, agent, before) == "mix_and_match"


@pytest.mark.control("POL-02")
def test_a_policy_of_another_blueprint_is_refused(loaded):
    lab, agent, before = loaded
    lab.publish()
    agent._workspace = type(agent._workspace)(
        **{name: getattr(agent._workspace, name) for name in agent._workspace.__struct_fields__}
        | {"blueprint": "other"}
    )
    assert refused(lab, agent, before) == "not_found"


@pytest.mark.control("POL-03")
@pytest.mark.parametrize("answer", [{"ok": False, "failures": [{"code": "pcr_mismatch"}]}, {}])
def test_what_is_not_attested_is_not_switched_to(loaded, answer):
    lab, agent, before = loaded
    lab.attestd.answer = answer
    raw = lab.publish()
    assert refused(lab, agent, before) == "not_attested"
    lab.attestd.answer = {"ok": True}
    until(lambda: agent.cycle() or lab.current() == digest_of(raw), "it is tried again")


@pytest.mark.control("POL-02")
def test_what_envoy_does_not_accept_is_refused(loaded):
    lab, agent, before = loaded
    settings = agent._activator._settings
    agent._activator._dry_run = DryRun(lab.config(), msgspec.structs.replace(settings, ring2_port=99999))
    lab.publish()
    assert refused(lab, agent, before) == "validate_failed"
    assert len(lab.attestd.measured) == 1


@pytest.mark.control("POL-02")
def test_when_enforcement_does_not_follow_the_old_generation_returns(loaded):
    lab, _, before = loaded
    lab.configure(readback_s=0.2)
    deaf = lab.agent()
    deaf.cycle()
    deaf._activator._decided = lambda: "something else"
    lab.publish()
    assert refused(lab, deaf, before) == "read_back_failed"
    assert lab.attestd.measured[-1]["policy_digest"] == before


@pytest.mark.control("POL-02")
def test_a_proxy_that_dies_on_the_new_generation_is_not_acknowledged(loaded):
    lab, _, before = loaded
    lab.configure(readback_s=0.5)
    agent = lab.agent(lambda step: lab.end_envoy() if step == "switch" else None)
    agent.cycle()  # takes over what is in force, so it knows a running proxy
    raw = lab.publish()
    agent.cycle()
    assert (lab.told()["state"], lab.told()["reason"]) == ("refused", "read_back_failed")
    assert (lab.current(), lab.decided()["policy_digest"]) == (before, before)
    assert ("loaded", digest_of(raw)) not in lab.words()
    assert ("refused", digest_of(raw)) in lab.words()
    assert lab.attestd.measured[-1]["policy_digest"] == before
    # Its twin: a proxy that is started again, as its unit does it, takes the same release.
    lab.configure()
    lab.start_envoy()
    lab.agent(lambda step: (lab.end_envoy(), lab.start_envoy()) if step == "switch" else None).cycle()
    assert (lab.current(), lab.words()[-1]) == (digest_of(raw), ("loaded", digest_of(raw)))


@pytest.mark.control("POL-02")
def test_nothing_is_acknowledged_before_the_proxy_runs_for_the_first_time(lab):
    lab.configure(readback_s=0.2, proxy_start_s=0.4)
    raw = lab.publish()
    agent = lab.agent(proxy=False)
    agent.cycle()
    assert (lab.current(), lab.told()["reason"]) == ("closed", "read_back_failed")
    assert ("loaded", digest_of(raw)) not in lab.words()
    lab.configure(readback_s=0.2)
    patient = lab.agent(lambda step: lab.start_envoy() if step == "read back" else None, proxy=False)
    patient.cycle()
    assert lab.words()[-1] == ("loaded", digest_of(raw))


@pytest.mark.control("POL-05")
def test_a_changed_generation_is_found_restored_and_reported(loaded):
    lab, agent, before = loaded
    policy = lab.run / "generations" / before / "policy.yaml"
    good = policy.read_bytes()
    policy.write_bytes(good + b"# wider\n")
    agent.cycle()
    assert policy.read_bytes() == good
    assert lab.told()["state"] == "loaded"
    assert ("refused", "generation_tampered") in lab.reported("finding")
    (lab.run / "generations" / "current").unlink()
    (lab.run / "generations" / "current").symlink_to("closed")
    agent.cycle()
    assert lab.current() == before


def test_a_finding_made_while_the_broker_is_away_is_told_once_it_answers(loaded):
    lab, agent, before = loaded
    lab.broker.stop()
    (lab.run / "generations" / before / "policy.yaml").write_bytes(b"# wider\n")
    agent.cycle()
    agent.cycle()
    assert ("refused", "generation_tampered") not in lab.reported("finding")
    lab.broker.start()
    agent.cycle()
    agent.cycle()
    assert lab.reported("finding").count(("refused", "generation_tampered")) == 1


@pytest.mark.control("POL-05")
def test_a_generation_changed_while_the_agent_was_away_is_restored(loaded):
    lab, _, before = loaded
    listeners = lab.run / "generations" / before / "lds.json"
    good = listeners.read_bytes()
    listeners.write_bytes(good.replace(b"api.example.com", b"evil.example.com") + b" ")
    lab.agent().cycle()
    assert listeners.read_bytes() == good
    assert ("refused", "generation_tampered") in lab.reported("finding")


def test_a_restart_adopts_what_is_in_force_without_compiling_again(loaded):
    lab, _, before = loaded
    steps: list[str] = []
    lab.agent(steps.append).cycle()
    assert steps == []
    assert lab.current() == before
    assert lab.told()["state"] == "loaded"


@pytest.mark.control("POL-02")
def test_without_a_broker_the_last_good_policy_is_verified_again_and_loaded(loaded):
    lab, _, before = loaded
    shutil.rmtree(lab.run / "generations")
    lab.broker.stop()
    lab.agent().cycle()
    assert lab.current() == before


@pytest.mark.control("POL-02")
def test_a_last_good_policy_that_was_changed_is_not_loaded(loaded):
    lab, _, _ = loaded
    last = lab.state / "last-good.bundle.json"
    bundle = json.loads(last.read_text())
    bundle["members"]["policy.yaml"] = bundle["members"]["governance.yaml"]
    last.write_text(json.dumps(bundle))
    shutil.rmtree(lab.run / "generations")
    lab.broker.stop()
    agent = lab.agent()
    agent.cycle()
    assert lab.current() == "closed"
    assert lab.told()["reason"] == "member_mismatch"
    lab.broker.start()
    agent.cycle()
    assert lab.told()["state"] == "loaded"


@pytest.mark.control("POL-02")
def test_a_last_good_policy_by_officers_that_somebody_left_on_the_disk_is_not_loaded(loaded):
    """Who was root once can write all of the state; what names the officers comes anew with each start."""
    lab, _, _ = loaded
    metadata = lab.state / "tuf" / "metadata"
    lab.officers = [Ed25519PrivateKey.generate() for _ in range(3)]
    usurped = init_repository(lab.directory / "usurped", lab.officers, lab.online, 2, now=datetime.now(UTC))
    for place in (metadata / "root.json", *(metadata / "root_history").iterdir()):
        place.unlink()
        place.write_bytes(usurped)
    (lab.state / "last-good.bundle.json").write_bytes(lab.bundle("/**"))
    shutil.rmtree(lab.run / "generations")
    lab.broker.stop()
    agent = lab.agent()
    agent.cycle()
    assert lab.current() == "closed"
    assert lab.told()["reason"] == "threshold"
    lab.broker.start()
    agent.cycle()
    assert lab.told()["state"] == "loaded"


CRASH = """
import os, signal, sys
from pathlib import Path
from saw.cli.policyd import build
from saw.files import load_json
from saw.runtime.policyd_config import PolicydConfig

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

for line in sys.stdin:
    config, wanted = line.rstrip().split(",")
    child = os.fork()
    if child == 0:
        agent = build(load_json(Path(config), PolicydConfig), lambda name: die() if name == wanted else None)
        if wanted == "acknowledge":
            agent._report = lambda kind, state, *_, **__: die() if state == "loaded" else None
        if wanted == "keep":
            agent._floor = type("Floor", (), {"get": lambda _: 0, "check": lambda *_: None, "raise_to": die})()
        agent.cycle()
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def crash():
    """Run one cycle of an agent, in a process of its own, that is killed at the named step; return its exit code."""
    process = subprocess.Popen(
        [sys.executable, "-c", CRASH],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )

    def run(lab: Lab, step: str) -> int:
        process.stdin.write(f"{lab.directory / 'policyd.json'},{step}\n")
        process.stdin.flush()
        return int(process.stdout.readline())

    yield run
    process.stdin.close()
    process.wait(10)
    process.stdout.close()


@pytest.mark.thorough
@pytest.mark.control("POL-02")
@pytest.mark.parametrize(
    ("step", "in_force"),
    [
        ("compile", "old"),
        ("validate", "old"),
        ("place", "old"),
        ("measure", "old"),
        ("switch", "old"),
        ("read back", "new"),
        ("keep", "new"),
        ("acknowledge", "new"),
    ],
)
def test_a_kill_at_any_step_leaves_the_old_or_the_new_generation(loaded, crash, step, in_force):
    lab, _, before = loaded
    raw = lab.publish()
    assert crash(lab, step) == -9
    expected = before if in_force == "old" else digest_of(raw)
    assert lab.current() == expected
    assert until(lambda: lab.decided()["policy_digest"] == expected, "saw-decide has it whole")
    lab.agent().cycle()
    assert lab.current() == digest_of(raw)
    assert lab.broker.reports[-1]["policy_digest"] == digest_of(raw)
    assert sorted(p.name for p in (lab.run / "generations").iterdir()) == sorted(
        [digest_of(raw), "closed", "current", SWITCHED]
    )


@pytest.mark.control("POL-02")
def test_each_of_several_releases_is_enforced_in_both_parts_by_the_time_it_is_acknowledged(lab):
    lab.publish()
    agent = lab.agent()
    thread = threading.Thread(target=agent.run, daemon=True)
    thread.start()
    try:
        until(lambda: any(r["state"] == "loaded" for r in lab.broker.reports), "the first policy is in force")
        for number in range(5):
            raw = lab.bundle(f"/v{number}/**")
            digest = digest_of(raw)
            lab.publish(raw)
            until(lambda d=digest: ("loaded", d) in lab.words(), "it is acknowledged")
            probe = subprocess.run(
                ["curl", "-s", "-x", f"http://127.0.0.1:{lab.proxy_port}", "http://ring1.saw.internal/generation"],
                capture_output=True,
                check=True,
                text=True,
            )
            assert probe.stdout == digest == lab.decided()["policy_digest"]
    finally:
        agent.stop()
        lab.broker.sequence += 1
        thread.join(20)
    assert not thread.is_alive()
    assert json.loads((lab.run / "policy" / "heartbeat").read_text())["boottime"] > 0


@pytest.mark.control("POL-05")
def test_the_heartbeat_stops_when_the_loop_stands_still(lab):
    lab.publish()
    agent = lab.agent()
    clock = [1000.0]
    agent._boottime = lambda: clock[0]
    heartbeat = lab.run / "policy" / "heartbeat"
    agent.cycle()
    agent.beat()
    assert json.loads(heartbeat.read_text()) == {"boottime": 1000.0}
    clock[0] += lab.config().stall_s + 1
    agent.beat()
    assert json.loads(heartbeat.read_text()) == {"boottime": 1000.0}
    agent.cycle()
    agent.beat()
    assert json.loads(heartbeat.read_text()) == {"boottime": clock[0]}
