"""A thousand bundles, good and bad: each ends acknowledged or refused with a reason, and the last good one is in force.

`make test` sends 250, among them each kind; with `SAW_BUNDLES=1000`, as `make test-properties` says, it is the thousand.
"""

from __future__ import annotations

import base64
import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from tuf.api.exceptions import DownloadHTTPError
from tuf.ngclient.fetcher import FetcherInterface

from saw.audit.workspace_decisions import Decisions
from saw.audit.workspace_usage import Usage
from saw.policy.bundle import build_manifest, policy_digest, sign
from saw.policy.handed_tools import HandedTools
from saw.policy.loader import load_members
from saw.policy.tuf_accept import sign_online
from saw.policy.tuf_metadata import Metadata, TargetFile, Targets, parse, sign_metadata
from saw.policy.tuf_repository import init_repository, target_file
from saw.runtime import generation, ring1
from saw.runtime.decide_counts import Counted
from saw.runtime.leaf import LeafAuthority
from saw.runtime.policyd import Policyd
from saw.runtime.policyd_activate import ActivationRefused, Activator
from saw.runtime.policyd_broker import Offer
from saw.runtime.policyd_config import PolicydConfig, Workspace, ring1_settings
from saw.runtime.policyd_floor import FileFloor

BUNDLES = int(os.environ.get("SAW_BUNDLES", "250"))
TARGET = "rings/stable/coding.bundle.json"
#: The TUF client goes by the wall clock.
START = datetime.now(UTC).replace(microsecond=0)
POLICY = """version: 1
process: {run_as_user: nobody, run_as_group: nogroup}
network_policies:
  api:
    endpoints: [{host: HOST, port: 443, protocol: rest, access: ACCESS}]
    binaries: [{path: /usr/bin/curl}]
"""
GOVERNANCE = "schema: 1\nblueprint: {name: BLUEPRINT, version: 1.0.0, owner: team}\n"

#: What may be wrong → the reasons that the agent may give for it; none for a good bundle.
KINDS: dict[str, set[str]] = {
    "good": set(),
    "one signature": {"threshold"},
    "no signature": {"unsigned"},
    "a stranger signed": {"threshold"},
    "expired": {"expired"},
    "not yet": {"not_yet_valid"},
    "older revision": {"rolled_back"},
    "another blueprint": {"wrong_blueprint"},
    "a policy that does not load": {"policy_invalid"},
    "a member that was changed": {"member_mismatch"},
    "noise": {"malformed"},
    "another digest stated": {"member_mismatch"},
    "metadata of one officer": {"threshold"},
    "a file that is not the signed one": {"mix_and_match"},
    "an envoy that refuses": {"validate_failed"},
    "a broker that does not attest": {"not_attested"},
    "nothing that follows the switch": {"read_back_failed"},
}


class Files(FetcherInterface):
    """Gives the repository's files without a network."""

    def __init__(self, store: Path) -> None:
        self._store = store

    def _fetch(self, url: str) -> Iterator[bytes]:
        path = self._store / url.removeprefix("https://far/tuf/")
        if not path.is_file():
            raise DownloadHTTPError(url, 404)
        yield path.read_bytes()


class FarBroker:
    """The broker's side of the conversation: what is given, and what was said."""

    tuf_url = "https://far/tuf"

    def __init__(self, store: Path) -> None:
        self.fetcher = Files(store)
        self.digest = ""
        self.said: list[tuple[str, str, str]] = []

    def offer(self) -> Offer:
        return Offer(1, self.digest, 0)

    def handed_tools(self) -> HandedTools:
        return HandedTools(bound=False)

    def report(self, kind: str, state: str, *, reason: str, policy_digest: str, **_further: object) -> None:
        if kind == "policy_state":
            self.said.append((state, reason, policy_digest))

    def report_decisions(self, said: Decisions) -> None:
        raise AssertionError(f"nothing was decided, {said}")

    def report_usage(self, usage: Usage) -> None:
        raise AssertionError(f"no agent ran, {usage}")

    def report_calls(self, digest: str, _counted: Counted, _window: float) -> None:
        raise AssertionError(f"no call was decided, {digest}")


class Enforcement(Activator):
    """The real activation; the two programs that enforce are asked in process, and can be told to fail."""

    trouble = ""

    def _measure(self, content: generation.Content) -> None:
        if self.trouble == "a broker that does not attest" and content is not self.active:
            raise ActivationRefused("not_attested", "told to")

    def _decided(self) -> str:
        name = generation.current(self._root)
        if self.trouble == "nothing that follows the switch" or name is None:
            return ""
        return generation.load(self._root, name).digest

    def _proxied(self) -> str:
        return generation.current(self._root) or ""


class World:
    def __init__(self, directory: Path) -> None:
        self.store = directory / "store"
        self.officers = [Ed25519PrivateKey.generate() for _ in range(3)]
        self.stranger, self.online = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
        root = init_repository(self.store, self.officers, self.online, 2, now=START)
        self.config = PolicydConfig(
            run_dir=str(directory / "run"),
            state_dir=str(directory / "state"),
            attest_socket=None,
            envoy=str(directory / "envoy"),
            listen_address="127.0.0.1",
            listen_port=9,
            readback_s=0.05,
        )
        for path in (self.config.run / "policy", self.config.generations, self.config.state):
            path.mkdir(parents=True)
        self.envoy = Path(self.config.envoy)
        self.envoy_says(good=True)
        workspace = Workspace(
            workspace_id="ws",
            number=1,
            trust_domain="saw.example",
            broker_url="https://far",
            broker_name="broker",
            ring2="127.0.0.1:1",
            ring2_name="ring2",
            ca_pem="",
            tuf_root=json.loads(root),
            blueprint="coding",
            ring="stable",
        )
        settings: ring1.Ring1 = ring1_settings(self.config, workspace)
        authority = LeafAuthority.ensure(self.config.run / "ring1-ca", START)
        generation.write_closed(self.config.generations, settings, group=None)
        self.broker = FarBroker(self.store)
        self.enforcement = Enforcement(self.config, settings, authority, lambda: START)
        self.clock = 0.0
        self.agent = Policyd(
            self.config,
            workspace,
            self.broker,
            self.enforcement,
            FileFloor(self.config.state / "floor.json"),
            now=lambda: START,
            boottime=lambda: self.clock,
            log=lambda _: None,
        )
        self.targets = parse(Targets, (self.store / "metadata" / "1.targets.json").read_bytes(), "targets.json").signed

    def envoy_says(self, *, good: bool) -> None:
        self.envoy.unlink(missing_ok=True)
        self.envoy.symlink_to(shutil.which("true" if good else "false"))

    def bundle(self, kind: str, revision: int, chance: random.Random) -> tuple[bytes, str]:
        """Return a bundle file with that wrong in it, and its digest."""
        host = f"h{chance.randrange(10**9)}.example.com"
        policy = POLICY.replace("HOST", host).replace("ACCESS", chance.choice(["read-only", "read-write", "full"]))
        name = "other" if kind == "another blueprint" else "coding"
        members = {"policy.yaml": policy.encode(), "governance.yaml": GOVERNANCE.replace("BLUEPRINT", name).encode()}
        bundle = load_members(members)
        if kind == "a policy that does not load":
            members["policy.yaml"] += b"surprise: 1\n"
            bundle = type(bundle)(members, bundle.policy, bundle.governance)
        begin, end = START - timedelta(days=1), START + timedelta(days=1)
        if kind == "expired":
            end = START
        if kind == "not yet":
            begin = START + timedelta(seconds=1)
        manifest = build_manifest(bundle, 1 if kind == "older revision" else revision, begin, end)
        signers = {"one signature": self.officers[:1], "no signature": [], "a stranger signed": [self.stranger] * 2}
        raw = sign(manifest, members, signers.get(kind, chance.sample(self.officers, 2)))
        if kind == "a member that was changed":
            file = json.loads(raw)
            file["members"]["policy.yaml"] = base64.b64encode(members["policy.yaml"] + b" ").decode()
            raw = json.dumps(file).encode()
        if kind == "noise":
            raw = chance.randbytes(chance.randrange(1, 2000))
        return raw, policy_digest(manifest)

    def publish(self, kind: str, raw: bytes, digest: str, revision: int) -> None:
        """Write the publication past every check that a good broker makes."""
        stated = digest[::-1] if kind == "another digest stated" else digest
        file: TargetFile = target_file(TARGET, raw, stated, revision)
        version = self.targets.version + 1
        expires = START + timedelta(days=30)
        self.targets = Targets(version=version, expires=expires, targets={TARGET: file})
        signers = self.officers[:1] if kind == "metadata of one officer" else self.officers[:2]
        path = self.store / "metadata" / f"{version}.targets.json"
        path.write_bytes(sign_metadata(Metadata(self.targets), signers))
        place = self.store / "targets" / "rings" / "stable" / f"{file.hashes['sha256']}.coding.bundle.json"
        place.parent.mkdir(parents=True, exist_ok=True)
        content = raw[:-1] + b"!" if kind == "a file that is not the signed one" else raw
        place.write_bytes(content)
        sign_online(self.store, {"targets": version}, self.online, START, timedelta(hours=1))
        self.broker.digest = stated

    def forget(self) -> None:
        """Keep the repository small: only its newest files matter to the agent."""
        for folder, pattern in (
            ("metadata", "*.targets.json"),
            ("metadata", "*.snapshot.json"),
            ("targets", "**/*.json"),
        ):
            for path in sorted((self.store / folder).glob(pattern), key=lambda p: p.stat().st_mtime_ns)[:-3]:
                path.unlink()


@pytest.mark.control("POL-02")
def test_of_a_thousand_bundles_none_is_silent_and_the_last_good_one_is_in_force(tmp_path) -> None:
    chance = random.Random(20261123)  # noqa: S311 - a test's chance, the same each time
    world = World(tmp_path)
    seen: Counter[str] = Counter()
    in_force, revision = generation.CLOSED, 1
    kinds = [*KINDS, *chance.choices([*KINDS, *["good"] * 8], k=BUNDLES - len(KINDS))]
    chance.shuffle(kinds)
    kinds.remove("good")
    for number, kind in enumerate(["good", *kinds]):
        revision += 1
        raw, digest = world.bundle(kind, revision, chance)
        world.envoy_says(good=kind != "an envoy that refuses")
        world.enforcement.trouble = kind
        world.publish(kind, raw, digest, revision)
        before = len(world.broker.said)
        world.clock += 1000.0
        world.agent.cycle()
        said = world.broker.said[before:]
        place = f"bundle {number}, {kind}: {said}"
        assert said, place
        state, reason, about = said[-1]
        assert about == world.broker.digest, place
        if kind == "good":
            assert (state, reason) == ("loaded", ""), place
            in_force = digest
        else:
            assert state == "refused", place
            assert reason in KINDS[kind], place
        assert generation.current(world.config.generations) == in_force, place
        assert json.loads((world.config.run / "policy" / "state.json").read_text())["policy_digest"] == in_force
        seen[kind] += 1
        if number % 50 == 0:
            world.forget()
    assert sum(seen.values()) == BUNDLES
    assert seen.keys() == KINDS.keys()
    assert generation.load(world.config.generations, in_force).digest == in_force
