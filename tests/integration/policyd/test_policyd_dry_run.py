"""A candidate that one of the engines' own checkers refuses keeps what is in force, and is reported with the checker's words."""

from __future__ import annotations

from pathlib import Path

import pytest
from policyd_lab import GOVERNANCE, POLICY, Lab

from saw.policy.bundle import describe
from saw.runtime.generation import SWITCHED
from saw.runtime.landlock import abi
from saw.runtime.netns import SandboxNet
from saw.runtime.policyd_activate import Activator
from saw.runtime.policyd_dry_run import DryRun
from saw.runtime.sandbox import RuntimePaths

pytestmark = pytest.mark.control("POL-02")


@pytest.fixture
def loaded(lab):
    """A lab with revision 1 in force, its agent, and that digest."""
    raw = lab.publish()
    agent = lab.agent()
    agent.cycle()
    assert lab.told()["state"] == "loaded", lab.told()
    return lab, agent, describe(raw)[0]


def refused(lab: Lab, agent, before: str, raw: bytes) -> str:
    """Go round once; what was in force stays, nothing was measured, and the broker has the words. Return them."""
    measured = len(lab.attestd.measured)
    lab.publish(raw)
    agent.cycle()
    told = lab.told()
    assert (told["state"], told["reason"], told["policy_digest"]) == ("refused", "validate_failed", before)
    assert (lab.current(), lab.decided()["policy_digest"]) == (before, before)
    assert len(lab.attestd.measured) == measured
    said = [r for r in lab.broker.reports if r["state"] == "refused" and r["kind"] == "policy_state"][-1]
    assert (said["policy_digest"], said["detail"]) == (describe(raw)[0], told["detail"])
    assert len(said["detail"]) < 700
    assert sorted(p.name for p in (lab.run / "generations").iterdir()) == sorted(
        [before, "closed", "current", SWITCHED]
    )
    return said["detail"]


def taken(lab: Lab, agent, raw: bytes) -> None:
    """Go round once; the release must be in force."""
    lab.publish(raw)
    agent.cycle()
    assert lab.words()[-1] == ("loaded", describe(raw)[0]), lab.told()


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("/srv/work", "/run/systemd", "/run/systemd holds secrets or controls of the host"),
        ("/srv/work", "/etc/ssl", "/etc/ssl must not be writable"),
        ("/srv/work", '"/srv/a:b"', "characters that a unit file cannot carry"),
        ("run_as_user: nobody", "run_as_user: stranger", "user 'stranger' does not exist here"),
    ],
)
def test_a_sandbox_that_cannot_be_compiled(loaded, old, new, words):
    lab, agent, before = loaded
    text = refused(lab, agent, before, lab.bundle(policy=POLICY.replace(old, new)))
    assert text.startswith("the sandbox refused the candidate: ")
    assert words in text
    taken(lab, agent, lab.bundle(policy=POLICY.replace("/srv/work", "/srv/other")))


def test_a_landlock_that_this_kernel_does_not_have(loaded):
    lab, agent, before = loaded
    demanding = GOVERNANCE + "landlock: {minimum_abi: 16}\n"
    text = refused(lab, agent, before, lab.bundle(governance=demanding))
    assert f"Landlock ABI 16 is required and this kernel offers {abi()}" in text
    taken(lab, agent, lab.bundle(governance=GOVERNANCE + f"landlock: {{minimum_abi: {abi()}}}\n"))


def dry_run(lab: Lab, agent, **options) -> None:
    """Let the agent compile the sandbox with other facts of the machine."""
    activator: Activator = agent._activator
    activator._dry_run = DryRun(lab.config(), activator._settings, **options)


def test_a_packet_filter_that_nft_refuses(loaded):
    lab, agent, before = loaded
    dry_run(lab, agent, net=SandboxNet(vm_address="10.200.0.1/99"))
    text = refused(lab, agent, before, lab.bundle("/v2/**"))
    assert text.startswith("nft refused the candidate: nft refused table saw_sandbox: ")
    dry_run(lab, agent, net=SandboxNet())
    taken(lab, agent, lab.bundle("/v3/**"))


def test_units_that_systemd_refuses(loaded):
    lab, agent, before = loaded
    dry_run(
        lab, agent, paths=RuntimePaths("/usr/bin/no-such-interpreter", "/usr/lib/python3/dist-packages/saw/runtime")
    )
    text = refused(lab, agent, before, lab.bundle("/v2/**"))
    assert text.startswith("systemd refused the candidate: systemd refuses the compiled units: ")
    assert "Command /usr/bin/no-such-interpreter is not executable" in text
    dry_run(lab, agent)
    taken(lab, agent, lab.bundle("/v3/**"))


def test_a_generation_that_the_decision_service_would_not_load(loaded):
    lab, agent, before = loaded
    change = [True]

    def spoil(step: str) -> None:
        if step == "validate" and change[0]:
            candidate: Path = next((lab.run / "generations").glob(".compiling.*"))
            policy = candidate / "policy.yaml"
            policy.write_bytes(policy.read_bytes() + b"# wider\n")

    agent._activator._step = spoil
    text = refused(lab, agent, before, lab.bundle("/v2/**"))
    assert text.startswith("saw-decide refused the candidate: ")
    assert "policy.yaml was changed after it was verified" in text
    change.clear()
    change.append(False)
    taken(lab, agent, lab.bundle("/v3/**"))
