"""Bundles, good and bad, through a real broker's publish call: each is refused with a reason, or published and answered for.

:mod:`test_policyd_thousand` goes past the broker to show what the agent bears; here the broker and the agent do both halves.
"""

from __future__ import annotations

import base64
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from test_policyd_thousand import GOVERNANCE, POLICY, TARGET, Enforcement

from databases import beside

sys.path.append(str(Path(__file__).parents[1] / "broker"))

from broker_rig import NAME, Lab, encode

from saw.broker.config import RolloutSettings
from saw.errors import SawError
from saw.identity.x509 import Authority, new_key_and_csr
from saw.policy.bundle import build_manifest, policy_digest, read_content, sign
from saw.policy.loader import load_members
from saw.policy.tuf_metadata import Metadata, Targets, parse, sign_metadata
from saw.policy.tuf_reach import bundle_diff, reach_between
from saw.policy.tuf_repository import (
    Publication,
    adopt_publication,
    current_releases,
    next_targets,
    read_target,
    target_file,
)
from saw.runtime import generation
from saw.runtime.generation import Content
from saw.runtime.leaf import LeafAuthority
from saw.runtime.policyd import Policyd
from saw.runtime.policyd_broker import PolicyBroker
from saw.runtime.policyd_config import PolicydConfig, Workspace, ring1_settings
from saw.runtime.policyd_floor import FileFloor

BUNDLES = 60
#: What may be wrong in what is published → the code with which the broker refuses it.
REFUSED = {
    "one signature": "threshold",
    "no signature": "unsigned",
    "a stranger signed": "threshold",
    "expired": "expired",
    "not yet": "not_yet_valid",
    "older revision": "rolled_back",
    "another blueprint": "target_name",
    "a policy that does not load": "policy_invalid",
    "a member that was changed": "member_mismatch",
    "noise": "malformed",
    "another digest stated": "bundle",
    "metadata of one officer": "threshold",
    "a file that is not the signed one": "malformed",
    "an older base": "stale_base",
}
#: What may go wrong at the workspace → the reason that it gives; none where it loads.
TAKEN: dict[str, str] = {
    "good": "",
    "an envoy that refuses": "validate_failed",
    "a broker that does not attest": "not_attested",
    "nothing that follows the switch": "read_back_failed",
}


class Attested(Enforcement):
    """What is measured counts as attested at the broker, and gets the identity under which the agent reports."""

    def __init__(self, lab: Lab, config: PolicydConfig, *arguments: object) -> None:
        super().__init__(config, *arguments)
        self._lab, self._svid = lab, config.run / "svid"
        self._identity = Authority.load(lab.config.keys / "x509")

    def _measure(self, content: Content) -> None:
        self.identify(
            content.digest, attested=self.trouble != "a broker that does not attest" or content is self.active
        )
        super()._measure(content)

    def identify(self, digest: str, *, attested: bool = True) -> None:
        key, csr = new_key_and_csr("ws")
        (self._svid / "svid.pem").write_bytes(self._identity.issue_svid(csr, "ws", digest, datetime.now(UTC)))
        (self._svid / "key.pem").write_bytes(key)
        with beside(self._lab.config) as store:
            if attested:
                store.execute("UPDATE workspaces SET state = 'active', policy_digest = ? WHERE id = 'ws'", (digest,))


class Chain:
    """Officers, a real broker, and the agent of one workspace whose two enforcing programs are asked in process."""

    def __init__(self, lab: Lab, directory: Path) -> None:
        self.lab, self.officers = lab, lab.officers
        self.stranger = Ed25519PrivateKey.generate()
        lab.operator.request("PUT", "/v1/policy/root", {"root": base64.b64encode(self.officers.root).decode()})
        lab.workspace("ws", to="attesting")
        config = PolicydConfig(
            run_dir=str(directory / "run"),
            state_dir=str(directory / "state"),
            attest_socket=None,
            envoy=str(directory / "envoy"),
            listen_address="127.0.0.1",
            listen_port=9,
            readback_s=0.05,
        )
        for path in (config.run / "policy", config.run / "svid", config.generations, config.state):
            path.mkdir(parents=True)
        authority = lab.ca_file.read_text()
        (config.run / "ca.pem").write_text(authority)
        workspace = Workspace(
            workspace_id="ws",
            number=1,
            trust_domain="saw.example",
            broker_url=f"https://127.0.0.1:{lab.port}",
            broker_name=NAME,
            ring2="127.0.0.1:1",
            ring2_name="ring2",
            ca_pem=authority,
            tuf_root=json.loads(self.officers.root),
            blueprint="coding",
            ring="stable",
        )
        settings = ring1_settings(config, workspace)
        leaf = LeafAuthority.ensure(config.run / "ring1-ca", datetime.now(UTC))
        generation.write_closed(config.generations, settings, group=None)
        self.config, self.envoy = config, Path(config.envoy)
        self.enforcement = Attested(lab, config, settings, leaf, lambda: datetime.now(UTC))
        self.enforcement.identify("0" * 64)
        self.clock = 0.0
        self.agent = Policyd(
            config,
            workspace,
            PolicyBroker(workspace, config.run),
            self.enforcement,
            FileFloor(config.state / "floor.json"),
            now=lambda: datetime.now(UTC),
            boottime=lambda: self.clock,
            log=lambda _: None,
        )

    def publication(self, kind: str, revision: int, chance: random.Random) -> tuple[str, Publication]:
        """Return a publication with that wrong in it, and the digest of its bundle."""
        host = f"h{chance.randrange(10**9)}.example.com"
        policy = POLICY.replace("HOST", host).replace("ACCESS", chance.choice(["read-only", "read-write", "full"]))
        name = "other" if kind == "another blueprint" else "coding"
        members = {"policy.yaml": policy.encode(), "governance.yaml": GOVERNANCE.replace("BLUEPRINT", name).encode()}
        bundle = load_members(members)
        copy = self.officers.directory
        held = any(release.path == TARGET for release in current_releases(copy))
        reach = reach_between(read_target(copy, TARGET) if held else None, bundle, bundle_diff())
        if kind == "a policy that does not load":
            members["policy.yaml"] += b"surprise: 1\n"
            bundle = type(bundle)(members, bundle.policy, bundle.governance)
        now = datetime.now(UTC).replace(microsecond=0)
        begin = now + timedelta(hours=1) if kind == "not yet" else now - timedelta(days=1)
        end = now - timedelta(hours=1) if kind == "expired" else now + timedelta(days=1)
        number = 1 if kind == "older revision" else revision
        manifest = build_manifest(bundle, number, begin, end, reach=reach)
        signers = {
            "one signature": self.officers.keys[:1],
            "no signature": [],
            "a stranger signed": [self.stranger] * 2,
        }.get(kind, chance.sample(self.officers.keys, 2))
        raw, digest = sign(manifest, members, signers), policy_digest(manifest)
        if kind == "a member that was changed":
            file = json.loads(raw)
            file["members"]["policy.yaml"] = base64.b64encode(members["policy.yaml"] + b" ").decode()
            raw = json.dumps(file).encode()
        if kind == "noise":
            raw = chance.randbytes(chance.randrange(1, 2000))
        newest = max((copy / "metadata").glob("*.targets.json"), key=lambda path: int(path.name.split(".")[0]))
        present = parse(Targets, newest.read_bytes(), "targets.json").signed
        successor = next_targets(present, now)
        if kind == "an older base":
            successor.version = present.version
        stated = digest[::-1] if kind == "another digest stated" else digest
        successor.targets[TARGET] = target_file(TARGET, raw, stated, number)
        count = 1 if kind == "metadata of one officer" else 2
        signed = sign_metadata(Metadata(successor), self.officers.keys[:count])
        content = raw[:-1] + b"!" if kind == "a file that is not the signed one" else raw
        return digest, Publication({"root.json": self.officers.root, "targets.json": signed}, {TARGET: content})

    def published(self) -> str:
        """The digest that the broker releases, empty for none."""
        found = self.lab.operator.request("GET", "/v1/policy/state")["releases"]
        return str(found[0]["policy_digest"]) if found else ""

    def words(self) -> list[dict[str, str]]:
        """What the broker holds of what the workspace said, newest first."""
        return list(self.lab.operator.request("GET", "/v1/workspaces/ws/policy")["history"])

    def cycle(self, kind: str) -> None:
        """Let the agent go round with that wrong around it."""
        self.envoy.unlink(missing_ok=True)
        self.envoy.symlink_to(shutil.which("false" if kind == "an envoy that refuses" else "true"))
        self.enforcement.trouble = kind
        self.clock += 1000.0
        self.agent.cycle()

    def answer(self, kind: str, digest: str) -> list[dict[str, str]]:
        """Let the agent go round until its last word about ``digest`` is there: the broker hears a few words a second."""
        deadline = time.monotonic() + 60
        while True:
            self.cycle(kind)
            said = [word for word in self.words() if word["policy_digest"] == digest]
            if (said and said[0]["state"] in {"loaded", "refused"}) or time.monotonic() > deadline:
                return said
            time.sleep(0.1)


@pytest.fixture
def chain(tmp_path: Path) -> Iterator[Chain]:
    directory = Path(tempfile.mkdtemp(prefix="saw-chain-"))
    # Refusals are what this test is about: they halt nothing here.
    lab = Lab(directory, rollout=RolloutSettings(max_refused=1_000_000))
    try:
        lab.start()
        made = Chain(lab, tmp_path)
        yield made
        made.agent.close()
    finally:
        lab.stop()
        shutil.rmtree(directory)


@pytest.mark.control("POL-02")
def test_every_bundle_that_is_published_is_refused_with_a_reason_or_answered_for(chain: Chain) -> None:
    chance = random.Random(20261125)  # noqa: S311 - a test's chance, the same each time
    kinds = [
        *REFUSED,
        *TAKEN,
        *chance.choices([*REFUSED, *["good"] * 10, *TAKEN], k=BUNDLES - len(REFUSED) - len(TAKEN) - 1),
    ]
    chance.shuffle(kinds)
    in_force, released, revision = generation.CLOSED, "", 1
    seen: Counter[str] = Counter()
    for number, kind in enumerate(["good", *kinds]):
        digest, publication = chain.publication(kind, revision + 1, chance)
        place = f"bundle {number}, {kind}"
        if kind in REFUSED:
            with pytest.raises(SawError) as refused:
                chain.lab.operator.request("POST", "/v1/policy/publish", encode(publication))
            assert refused.value.code == REFUSED[kind], f"{place}: {refused.value.code}"
            assert refused.value.message, place
            assert chain.published() == released, place
        else:
            chain.lab.operator.request("POST", "/v1/policy/publish", encode(publication))
            adopt_publication(chain.officers.directory, publication)
            revision, released = revision + 1, digest
            said = chain.answer(kind, digest)
            assert said, f"{place}: silent"
            assert all(word["verified"] for word in said), f"{place}: {said}"
            assert (said[0]["state"], said[0]["reason"]) == ("refused" if TAKEN[kind] else "loaded", TAKEN[kind]), place
            if kind == "good":
                in_force = digest
        assert generation.current(chain.config.generations) == in_force, place
        seen[kind] += 1
    assert (sum(seen.values()), seen.keys()) == (BUNDLES, REFUSED.keys() | TAKEN.keys())
    assert read_content(read_target(chain.officers.directory, TARGET)).governance.blueprint.name == "coding"
