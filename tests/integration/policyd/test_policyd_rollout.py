"""What the policy agent says of each release, and that it can be held on an earlier one but never be given another one."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from policyd_lab import Lab, until

from saw.policy.bundle import describe
from saw.runtime.generation import SWITCHED


def digest_of(raw: bytes) -> str:
    return describe(raw)[0]


@pytest.fixture
def loaded(lab):
    """A lab with revision 1 in force, its agent, and that bundle."""
    raw = lab.publish()
    agent = lab.agent()
    agent.cycle()
    assert lab.told()["state"] == "loaded"
    return lab, agent, raw


@pytest.mark.control("POL-02")
def test_each_release_is_told_offered_verified_loaded_with_digest_and_revision(loaded):
    lab, agent, first = loaded
    second = lab.publish()
    agent.cycle()
    agent.cycle()
    words = [(r["state"], r["policy_digest"]) for r in lab.broker.reports]
    assert words == [(state, digest_of(raw)) for raw in (first, second) for state in ("offered", "verified", "loaded")]
    assert [r["revision"] for r in lab.broker.reports if r["state"] == "loaded"] == [1, 2]


@pytest.mark.control("POL-02")
def test_a_release_that_does_not_verify_is_told_offered_and_refused_with_its_digest(loaded):
    lab, agent, before = loaded
    raw = lab.bundle()
    lab.publish(raw)
    agent._now = lambda: datetime.now(UTC) - timedelta(days=1)
    agent.cycle()
    said = [(r["state"], r["reason"], r["policy_digest"]) for r in lab.broker.reports if r["kind"] == "policy_state"]
    assert said[-2:] == [("offered", "", digest_of(raw)), ("refused", "not_yet_valid", digest_of(raw))]
    assert lab.current() == digest_of(before)
    agent._now = lambda: datetime.now(UTC)
    agent.cycle()
    assert lab.words()[-2:] == [("verified", digest_of(raw)), ("loaded", digest_of(raw))]


@pytest.mark.control("POL-02")
def test_a_held_workspace_keeps_its_policy_and_takes_the_new_one_when_it_is_offered(loaded):
    lab, agent, before = loaded
    raw = lab.publish()
    lab.broker.gives = digest_of(before)
    agent.cycle()
    agent.cycle()
    assert lab.current() == digest_of(before)
    assert lab.told()["state"] == "loaded"
    assert digest_of(raw) not in [digest for _, digest in lab.words()]
    lab.broker.gives = digest_of(raw)
    agent.cycle()
    assert lab.current() == digest_of(raw)
    assert lab.words()[-1] == ("loaded", digest_of(raw))


@pytest.mark.control("POL-03")
def test_a_policy_that_was_measured_in_vain_is_answered_by_measuring_the_one_in_force(loaded):
    lab, agent, before = loaded
    raw = lab.publish()
    lab.attestd.answer = {"ok": False, "failures": [{"code": "policy_not_current"}]}
    agent.cycle()
    assert lab.attestd.measured[-1]["policy_digest"] == digest_of(raw)
    lab.attestd.answer = {"ok": True}
    lab.broker.gives = digest_of(before)
    agent.cycle()
    agent.cycle()
    assert [m["policy_digest"] for m in lab.attestd.measured[2:]] == [digest_of(before)]
    # Offered again, the same refusal would be told again: nothing stays unsaid.
    lab.broker.gives = digest_of(raw)
    agent.cycle()
    assert lab.words()[-3:] == [(state, digest_of(raw)) for state in ("offered", "verified", "loaded")]


@pytest.mark.control("POL-02")
def test_a_fresh_workspace_in_a_halted_ring_loads_the_earlier_release_and_no_other(lab):
    first = lab.publish()
    lab.publish()
    agent = lab.agent()
    lab.broker.gives = None
    agent.cycle()
    assert lab.current() == "closed"
    # What is no earlier release of this ring is not taken, whoever signed it.
    later = lab.bundle()
    lab.broker.gives, lab.broker.bundle = digest_of(later), later
    agent.cycle()
    assert (lab.current(), lab.told()["reason"]) == ("closed", "not_released")
    unsigned = lab.bundle("/v1/unsigned", signers=1, revision=1)
    lab.broker.gives, lab.broker.bundle = digest_of(unsigned), unsigned
    agent.cycle()
    assert (lab.current(), lab.told()["reason"]) == ("closed", "threshold")
    lab.broker.gives, lab.broker.bundle = digest_of(first), first
    agent.cycle()
    assert lab.current() == digest_of(first)


@pytest.mark.control("POL-02")
def test_no_broker_can_take_a_workspace_back_below_its_floor(loaded):
    lab, agent, first = loaded
    raw = lab.publish()
    agent.cycle()
    lab.broker.gives, lab.broker.bundle = digest_of(first), first
    agent.cycle()
    # Revision 2 is the newest of the ring and in force; the earlier one is refused by the floor.
    assert (lab.current(), lab.told()["reason"]) == (digest_of(raw), "rolled_back")


@pytest.fixture
def tpm(tmp_path):
    """A software TPM on a private socket."""
    socket = tmp_path / "tpm"
    process = subprocess.Popen(
        [
            *("swtpm", "socket", "--tpm2", "--tpmstate", f"dir={tmp_path}", "--flags", "not-need-init,startup-clear"),
            *("--server", f"type=unixio,path={socket}", "--ctrl", f"type=unixio,path={socket}.ctrl"),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    until(lambda: socket.exists() and Path(f"{socket}.ctrl").exists(), "swtpm listens")
    yield f"swtpm:path={socket}"
    process.terminate()
    process.wait(10)


@pytest.mark.control("POL-02")
def test_an_older_signed_release_is_refused_by_the_tpm_when_all_of_the_disk_was_wiped(lab, tpm, tmp_path):
    lab.configure(nv_index="0x01500010", tcti=tpm)
    first = lab.publish()
    lab.agent().cycle()
    shutil.copytree(lab.store, tmp_path / "old")
    second = lab.publish()
    lab.agent().cycle()
    assert lab.current() == digest_of(second)
    # The disk of the workspace and the repository are both set back; the older release is signed and within its window.
    for path in (lab.state, lab.run / "generations", lab.store):
        shutil.rmtree(path)
    shutil.copytree(tmp_path / "old", lab.store)
    agent = lab.agent()
    agent.cycle()
    assert (lab.current(), lab.told()["reason"]) == ("closed", "rolled_back")
    assert lab.words()[-1] == ("refused", digest_of(first))
    # Its twin: the release that the TPM remembers loads on the same wiped disk.
    lab.publish(second)
    agent.cycle()
    assert lab.current() == digest_of(second)


@pytest.mark.control("POL-02")
def test_a_revision_that_the_tpm_cannot_follow_is_refused_before_anything_is_switched(lab, tpm):
    lab.configure(nv_index="0x01500010", tcti=tpm)
    lab.publish()
    agent = lab.agent()
    agent.cycle()
    near = lab.publish(lab.bundle("/near/**", revision=40))
    agent.cycle()
    assert lab.words()[-1] == ("loaded", digest_of(near))
    far = lab.publish(lab.bundle("/far/**", revision=5000))
    agent.cycle()
    assert (lab.current(), lab.told()["reason"]) == (digest_of(near), "revision_floor")
    assert ("verified", digest_of(far)) not in lab.words()


CRASH = """
import os, signal, sys, types
from pathlib import Path
from saw.cli.policyd import build
from saw.files import load_json
from saw.runtime import generation, policyd
from saw.runtime.policyd_config import PolicydConfig

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def after(done):
    def both(*values, **named):
        done(*values, **named)
        die()
    return both

config, wanted = sys.argv[1:]
own = types.SimpleNamespace(**vars(os))  # what generations alone use
agent = build(load_json(Path(config), PolicydConfig))
generation.os = own
if wanted in ("offered", "verified", "loaded"):
    agent._report = lambda kind, state, *_, **__: die() if state == wanted else None
elif wanted == "half written":
    own.fchmod = after(os.fchmod)
elif wanted == "exchanged":
    own.rename = after(os.rename)
elif wanted == "link made":
    own.replace = die
elif wanted == "link in place":
    own.replace = after(os.replace)
elif wanted == "before cleaning":
    generation.prune = die
elif wanted == "floor raised":
    agent._floor.raise_to = after(agent._floor.raise_to)
elif wanted == "last good":
    policyd.write_private = die
agent.cycle()
"""


@pytest.mark.thorough
@pytest.mark.control("POL-02")
@pytest.mark.parametrize(
    ("moment", "in_force"),
    [
        ("offered", "old"),
        ("verified", "old"),
        ("half written", "old"),
        ("exchanged", "old"),
        ("link made", "old"),
        ("link in place", "new"),
        ("before cleaning", "new"),
        ("floor raised", "new"),
        ("last good", "new"),
        ("loaded", "new"),
    ],
)
def test_a_kill_between_the_steps_leaves_the_old_or_the_new_generation(loaded, moment, in_force):
    lab, _, before = loaded
    raw = lab.publish()
    command = [sys.executable, "-c", CRASH, str(lab.directory / "policyd.json"), moment]
    assert subprocess.run(command, capture_output=True, check=False).returncode == -signal.SIGKILL
    expected = digest_of(before) if in_force == "old" else digest_of(raw)
    assert lab.current() == expected
    assert until(lambda: lab.decided()["policy_digest"] == expected, "saw-decide has it whole")
    restarted: Lab = lab
    restarted.agent().cycle()
    assert lab.current() == digest_of(raw)
    assert lab.words()[-1] == ("loaded", digest_of(raw))
    assert sorted(p.name for p in (lab.run / "generations").iterdir()) == sorted(
        [digest_of(raw), "closed", "current", SWITCHED]
    )
    assert json.loads((lab.state / "floor.json").read_text()) == {"revision": 2}
