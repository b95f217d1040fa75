"""Officers with their machine, the playbooks on it, and workspaces that really load: parts of the playbooks' tests."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import policyd_lab
from broker_rig import NAME, Lab
from cryptography.hazmat.primitives import serialization
from policy_parts import write_bundle

from databases import beside
from saw.broker.config import RolloutSettings
from saw.cli.main import main as saw
from saw.files import write_private
from saw.identity.x509 import Authority, new_key_and_csr
from saw.policy.loader import load_bundle_folder
from saw.policy.reach_diff import diff_bundles
from saw.policy.tuf_repository import current_releases, target_name
from warm import programs

ROOT = Path(__file__).resolve().parents[3]
NAMES = ("ada", "ben", "cleo")


RUNNABLE = """\
filesystem_policy: {read_only: [/usr], read_write: [/srv/work]}
process: {run_as_user: nobody, run_as_group: nogroup}
"""


def until(condition: Callable[[], Any], what: str, seconds: float = 180.0) -> Any:
    """Return the first true result of ``condition``; fail after ``seconds``."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.01)
    raise AssertionError(f"not within {seconds} s: {what}")


def with_descendants(pid: int) -> list[int]:
    """A process and all below it, itself first: Ansible's workers have sessions of their own, which no group's signal reaches."""
    listed = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    rows = [tuple(map(int, line.split())) for line in listed.splitlines()]
    found = [pid]
    for parent in found:
        found += [child for child, above in rows if above == parent]
    return found


class Play:
    """The end of a playbook."""

    def __init__(self, code: int, text: str) -> None:
        self.text = text
        self.words = " ".join(self.text.split())
        self.ok = code == 0
        recap = re.search(r"changed=(\d+)", self.text)
        self.changed = int(recap[1]) if recap else -1
        asked = re.search(r"policy_release_approved=([0-9a-f]{64})", self.words)
        self.approval = asked[1] if asked else ""


class Office:
    """A broker and the machine of its three officers, two of whom must sign."""

    def __init__(self, lab: Lab, base: Path) -> None:
        self.lab, self.base = lab, base
        self.copy, self.root = lab.officers.directory, lab.officers.root
        form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        (base / "keys").mkdir()
        for name, key in zip(NAMES, lab.officers.keys, strict=True):
            write_private(base / f"keys/{name}.key", key.private_bytes(*form))
        lab.operator.request("PUT", "/v1/policy/root", {"root": base64.b64encode(self.root).decode()})
        self.context = base / "context.json"
        self.context.write_text(json.dumps({"broker": {"socket": lab.config.operator_socket}}))
        link = base / "installed/ansible_collections/secure_agent/workspace"
        link.parent.mkdir(parents=True)
        link.symlink_to(ROOT)
        (base / "policies").mkdir()
        (base / "policies/invariants.yaml").write_text(
            "schema: 1\ninvariants:\n  - {id: no-metadata, kind: never_reach, hosts: [metadata.google.internal], why: secrets}\n"
        )
        self.environment = {
            **os.environ,
            "ANSIBLE_COLLECTIONS_PATH": str(base / "installed"),
            "SAW_CONTEXT": str(self.context),
            "ANSIBLE_NOCOLOR": "1",
            "ANSIBLE_PIPELINING": "1",
            "ANSIBLE_SHOW_CUSTOM_STATS": "1",
        }

    def key(self, name: str) -> str:
        """The key file of an officer."""
        return str(self.base / "keys" / f"{name}.key")

    def saw(self, *words: str) -> str:
        """Run ``saw policy`` in this process, as an officer does with the keys of ada and ben; return what it printed."""
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            assert saw(["policy", *words]) == 0, printed.getvalue() + self.lab.log()[-3000:]
        return printed.getvalue()

    def update(self) -> None:
        """Bring the officers' copy up: another copy may have published, or the broker itself rolled back, meanwhile."""
        if self.lab.operator.request("GET", "/v1/policy/state")["releases"]:
            self.saw("repository-update", "--repository", str(self.copy), "--context", str(self.context))


@contextlib.contextmanager
def open_office(base: Path, **limits: object) -> Iterator[Office]:
    """The officers of a broker with these limits for rollouts."""
    directory = Path(tempfile.mkdtemp(prefix="saw-playbooks-"))
    lab = Lab(directory, rollout=RolloutSettings(**limits))
    try:
        lab.start()
        yield Office(lab, base)
    finally:
        lab.stop()
        shutil.rmtree(directory)


def blueprint_of(test: str) -> str:
    """The name of a test's own blueprint."""
    return re.sub(r"[^a-z0-9]+", "-", test.removeprefix("test_"))[:40].strip("-")


class Desk:
    """One blueprint of one test, in rings of its own: whatever else the broker holds is not its business."""

    def __init__(self, office: Office, name: str) -> None:
        self.office, self.lab, self.name = office, office.lab, name
        self.releases = office.base / "releases" / name
        self.folder = office.base / "policies" / name
        self.ring = f"{name}-canary"
        self.more = ""
        office.update()
        self.write()

    def write(self, access: str = "read-only", place: Path | None = None) -> Path:
        """Write the policy; ``read-write`` reaches more than ``read-only``."""
        folder = place or self.folder
        write_bundle(folder, access)
        governance = folder / "governance.yaml"
        governance.write_text(governance.read_text().replace("name: coding", f"name: {self.name}"))
        policy = folder / "policy.yaml"
        policy.write_text(policy.read_text() + self.more)
        return folder

    def command(
        self, name: str, *options: str, keys: tuple[str, ...] = ("ada", "ben"), warm: bool = True, **more: object
    ) -> list[str]:
        """The command that runs a playbook with these variables (without the playbook's prefix).

        ``warm``: its modules and commands begin with their imports made (:mod:`warm`).
        """
        values: dict[str, object] = {
            "ring": self.ring,
            "repository": str(self.office.copy),
            "directory": str(self.releases),
            "keys": [self.office.key(key) for key in keys],
            "watch_seconds": 0,
            **({"folder": str(self.folder)} if name == "policy_release" else {}),
            **({"saw": str(programs() / "saw")} if warm else {}),
            **more,
        }
        program = str(Path(sys.executable).parent / "ansible-playbook")
        told = json.dumps({f"{name}_{key}": value for key, value in values.items()})
        with_python = ["-e", f"ansible_python_interpreter={programs() / 'python'}"] if warm else []
        return [program, "-i", "localhost,", str(ROOT / f"playbooks/{name}.yml"), "-e", told, *with_python, *options]

    def play(self, name: str, *options: str, **more: Any) -> Play:
        """Run a playbook and return what came of it."""
        done = subprocess.run(
            self.command(name, *options, **more),
            env=self.office.environment,
            capture_output=True,
            text=True,
            check=False,
            cwd=self.office.base,
        )
        return Play(done.returncode, done.stdout + done.stderr)

    def release(self, *options: str, **more: Any) -> Play:
        """Release the folder to the ring."""
        return self.play("policy_release", *options, **more)

    def release_killed(self, when: Callable[[], Any], what: str, **more: Any) -> None:
        """Release, and kill the play with all that it started as soon as ``when`` holds."""
        process = subprocess.Popen(
            self.command("policy_release", warm=False, **more),  # all that it starts is below it
            env=self.office.environment,
            cwd=self.office.base,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            until(lambda: when() or process.poll() is not None, what, 300)
            assert process.poll() is None, f"the play ended before: {what}"
        finally:
            for pid in with_descendants(process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait(10)

    def publish(self, access: str, revision: int, ring: str = "") -> None:
        """Release a form of the policy without a playbook, by commands."""
        ring = ring or self.ring
        with tempfile.TemporaryDirectory() as scratch:
            folder = self.write(access, Path(scratch) / "policy")
            bundle, out = f"{scratch}/bundle.json", f"{scratch}/publication"
            keys = ["--key", self.office.key("ada"), "--key", self.office.key("ben")]
            copy = str(self.office.copy)
            self.office.update()
            base = ["--base", self.bundle(ring)] if self.released(ring) else []
            self.office.saw("sign", str(folder), *keys, "--revision", str(revision), *base, "--out", bundle)
            self.office.saw("stage", *keys, "--repository", copy, "--ring", ring, "--bundle", bundle, "--out", out)
            self.office.saw("publish", out, "--repository", copy, "--context", str(self.office.context))

    def bundle(self, ring: str) -> str:
        """The file of the release in force."""
        found = (self.office.copy / f"targets/rings/{ring}").glob(f"*.{self.name}.bundle.json")
        return str(max(found, key=lambda path: path.stat().st_mtime_ns))

    def released(self, ring: str = "") -> int:
        """The revision that the broker releases to the ring, 0 for none."""
        found = self.lab.operator.request("GET", "/v1/policy/state")["releases"]
        return next((one["revision"] for one in found if one["ring"] == (ring or self.ring)), 0)

    def adopted(self) -> int:
        """The revision that the officers' copy has as released to the ring, 0 for none."""
        held = current_releases(self.office.copy)
        path = target_name(self.ring, self.name)
        return next((one.revision for one in held if one.path == path), 0)

    def rollouts(self) -> list[dict[str, Any]]:
        """The rollouts of the ring, newest first."""
        return list(self.lab.operator.request("GET", f"/v1/policy/rollouts/{self.ring}")["rollouts"])

    def change(self, new: str = "read-only", old: str = "") -> str:
        """The digest of the change of reach from one form of the policy to another; ``old`` empty: from nothing."""
        from saw.policy.tuf_reach import nothing_like

        with tempfile.TemporaryDirectory() as scratch:
            after = load_bundle_folder(self.write(new, Path(scratch) / "new"))
            before = load_bundle_folder(self.write(old, Path(scratch) / "old")) if old else nothing_like(after)
            return diff_bundles(before, after).digest

    def fingerprint(self) -> str:
        """What the officers' machine holds: every file and its content."""
        parts = [self.office.copy, self.releases, self.folder]
        files = sorted(path for part in parts for path in part.rglob("*") if path.is_file())
        return hashlib.sha256(b"".join(str(path).encode() + path.read_bytes() for path in files)).hexdigest()

    def workspace(self, name: str) -> Workspace:
        """A workspace of the ring that counts as attested."""
        self.lab.workspace(name, to="attesting", ring=self.ring, blueprint=self.name)
        return Workspace(self.lab, name)


class Workspace:
    """A workspace as the broker knows it; the attestation of its TPM is written straight into the register."""

    def __init__(self, lab: Lab, name: str) -> None:
        self.lab, self.name = lab, name
        self._authority = Authority.load(lab.config.keys / "x509")
        self.attest(None)

    def attest(self, digest: str | None) -> tuple[bytes, bytes]:
        """Let the workspace count as attested with a policy; return key and certificate that it would be given."""
        with beside(self.lab.config) as store:
            store.execute("UPDATE workspaces SET state = 'active', policy_digest = ? WHERE id = ?", (digest, self.name))
        key, csr = new_key_and_csr(self.name)
        return key, self._authority.issue_svid(csr, self.name, digest or "0" * 64, datetime.now(UTC))

    def attested(self) -> str | None:
        """The digest that it is attested with."""
        with beside(self.lab.config) as store:
            [[digest]] = store.execute("SELECT policy_digest FROM workspaces WHERE id = ?", (self.name,))
        return digest

    def say(self, state: str, digest: str, revision: int, reason: str = "") -> None:
        """Report under the workspace's identity."""
        body = {"workspace_id": self.name, "kind": "policy_state", "state": state, "reason": reason}
        with self.lab.tls(pair=self.attest(self.attested())) as client:
            answer = client.post("/v1/workspace/report", json={**body, "policy_digest": digest, "revision": revision})
        assert answer.status_code == 200, answer.text


class Attestd(policyd_lab.FarAttestd):
    """The attestation agent's socket: what is measured counts as attested, and gets its identity."""

    def __init__(self, path: Path, workspace: Workspace, place: Path) -> None:
        self._workspace, self._place = workspace, place
        super().__init__(path)

    @property
    def answer(self) -> dict[str, Any]:
        """Attest what was measured last."""
        key, certificate = self._workspace.attest(self.measured[-1]["policy_digest"])
        (self._place / "key.pem").write_bytes(key)
        (self._place / "svid.pem").write_bytes(certificate)
        return {"ok": True}

    @answer.setter
    def answer(self, value: dict[str, Any]) -> None:
        """The base class's answer is not used."""


class RunningWorkspace(policyd_lab.Lab):
    """A workspace with its real policy agent, decision service and proxy, at a real broker."""

    def __init__(self, desk: Desk, name: str) -> None:
        # The policy agent that runs here checks the sandbox too: its account must exist on this machine.
        desk.more = RUNNABLE
        desk.write()
        self.known = desk.workspace(name)
        self.directory = Path(tempfile.mkdtemp(prefix="saw-pw-"))
        self.run, self.state = self.directory / "run", self.directory / "state"
        self.journal = self.directory / "journal"
        for part in ("attest", "decide", "svid", "policy"):
            (self.run / part).mkdir(parents=True)
        self.journal.mkdir()
        authority = desk.lab.ca_file.read_text()
        (self.run / "ca.pem").write_text(authority)
        told = {
            "workspace_id": name,
            "number": 1,
            "trust_domain": "saw.example",
            "broker_url": f"https://127.0.0.1:{desk.lab.port}",
            "broker_name": NAME,
            "ring2": "127.0.0.1:1",
            "ring2_name": "ring2.saw.internal",
            "ca_pem": authority,
            "tuf_root": json.loads(desk.office.root),
            "blueprint": desk.name,
            "ring": desk.ring,
        }
        (self.run / "workspace.json").write_text(json.dumps(told))
        self.attestd = Attestd(self.run / "attest/attest.sock", self.known, self.run / "svid")
        with policyd_lab.socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.proxy_port = free.getsockname()[1]
        self.processes: list[subprocess.Popen[bytes]] = []
        self.checker = self.directory / "envoy"
        self.break_checker(broken=False)
        self.configure(envoy=str(self.checker), poll_s=1.0)
        self._start_decide()
        command = [sys.executable, "-m", "saw.cli.main", "policyd", "--config", str(self.directory / "policyd.json")]
        self.processes.append(subprocess.Popen(command, stderr=(self.directory / "policyd.log").open("wb")))
        # The agent makes the closed generation that the proxy starts with.
        until((self.run / "generations/current").is_symlink, "a first generation")
        self.start_envoy()

    def break_checker(self, *, broken: bool) -> None:
        """Let the proxy refuse every policy that it is asked about, or judge them as it does."""
        new = self.directory / "envoy.new"
        new.symlink_to("/bin/false" if broken else policyd_lab.ENVOY)
        new.rename(self.checker)

    def stop(self) -> None:
        """End every part."""
        for process in reversed(self.processes):
            process.send_signal(signal.SIGKILL)
            process.wait(10)
            if process.stderr:
                process.stderr.close()
        self.attestd.stop()
        self._decide.should_exit = self._decide.force_exit = True
        self._decide_thread.join(10)
        self.decisions.close()
        policyd_lab.shutil.rmtree(self.directory, ignore_errors=True)
