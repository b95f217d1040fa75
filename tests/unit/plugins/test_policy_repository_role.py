"""The role policy_repository: what its units run makes a verified copy, and what its web server is told serves just that."""

from __future__ import annotations

import http.client
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import jinja2
import pytest
import yaml
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from policy_parts import write_bundle

from saw.policy.bundle import build_manifest, sign
from saw.policy.loader import load_bundle_folder
from saw.policy.tuf_reach import bundle_diff
from saw.policy.tuf_repository import accept_publication, init_repository, install_root, stage_publication
from saw.policy.tuf_statements import state_reach

ROLE = Path(__file__).resolve().parents[3] / "roles/policy_repository"
SAW = Path(sys.executable).parent / "saw"
PATH = "rings/stable/coding.bundle.json"


def render(name: str, **values: object) -> str:
    """A template of the role with its defaults."""
    defaults = yaml.safe_load((ROLE / "defaults/main.yml").read_text())
    environment = jinja2.Environment(keep_trailing_newline=True, undefined=jinja2.StrictUndefined, trim_blocks=True)  # noqa: S701
    template = environment.from_string((ROLE / "templates" / name).read_text())
    return template.render(**{"ansible_managed": "managed", **defaults, **values})


class Published:
    """A broker's tree with one release."""

    def __init__(self, base: Path) -> None:
        self.officers, self.online = [Ed25519PrivateKey.generate() for _ in range(2)], Ed25519PrivateKey.generate()
        self.base, self.tree, self.copy = base, base / "tuf", base / "copy"
        now = datetime.now(UTC).replace(microsecond=0)
        root = init_repository(base / "officers", self.officers, self.online.public_key(), now=now)
        self.root = base / "root.json"
        self.root.write_bytes(root)
        self.tree.mkdir(parents=True)
        install_root(self.tree, root, self.online, now)
        self.publish(1)

    def publish(self, revision: int) -> None:
        now = datetime.now(UTC).replace(microsecond=0)
        bundle = load_bundle_folder(write_bundle(self.base / "coding"))
        raw = sign(build_manifest(bundle, revision, now, now + timedelta(days=1)), bundle.members, self.officers)
        reach = state_reach(self.base / "officers", PATH, raw, bundle_diff())[1]
        staged = stage_publication(self.base / "officers", PATH, raw, self.officers, now, reach=reach)
        accept_publication(self.tree, staged.metadata, staged.targets, self.online, now)

    def mirror(self) -> bool:
        """Run what the unit runs, on this test's paths; tell whether all of it succeeded."""
        unit = render("saw-policy-mirror.service.j2", policy_repository_broker_tree=str(self.tree))
        for line in unit.splitlines():
            key, _, command = line.partition("=")
            if key in {"ExecCondition", "ExecStart"}:
                for there, here in (
                    ("/opt/saw/bin/saw", SAW),
                    ("/run/saw/policy-mirror", self.base),
                    ("/var/lib/saw/policy-repository", self.copy),
                    ("/etc/saw/policy-repository.root.json", self.root),
                ):
                    command = command.replace(there, str(here))
                if subprocess.run(shlex.split(command), capture_output=True, check=False).returncode:
                    return False
        return True

    def files(self) -> dict[str, bytes]:
        return {str(p.relative_to(self.copy)): p.read_bytes() for p in self.copy.rglob("*") if p.is_file()}


@pytest.fixture
def published(tmp_path: Path) -> Published:
    return Published(tmp_path)


@pytest.mark.control("POL-01")
def test_the_mirror_copies_what_is_verified_and_nothing_else(published: Published, tmp_path: Path) -> None:
    assert published.mirror()
    first = published.files()
    assert first["metadata/timestamp.json"] == (published.tree / "metadata/timestamp.json").read_bytes()
    assert published.mirror()
    assert published.files() == first
    [target] = (published.tree / "targets").rglob("*.bundle.json")
    target.write_bytes(target.read_bytes() + b" ")
    assert not published.mirror()
    assert published.files() == first
    stranger = Published(tmp_path / "stranger")
    published.tree = stranger.tree
    assert not published.mirror()
    assert published.files() == first


def test_before_the_first_publication_nothing_is_copied(published: Published) -> None:
    published.tree = published.base / "empty"
    assert not published.mirror()
    assert not published.copy.exists()


@pytest.fixture
def served(published: Published) -> Iterator[Callable[[str, str], http.client.HTTPResponse]]:
    """The web server with the role's configuration, on this test's folders; gives a function that asks it."""
    program = shutil.which("nginx")
    if program is None:
        pytest.skip("nginx is not installed here")
    assert published.mirror()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    run = published.base / "run"
    run.mkdir()
    for folder in (published.base, *published.base.parents[:3]):  # started as root, its workers are nobody
        folder.chmod(0o755)
    configuration = render("nginx.conf.j2", policy_repository_listen=f"127.0.0.1:{port}")
    configuration = configuration.replace("/run/saw/policy-repository", str(run))
    configuration = configuration.replace("/var/lib/saw/policy-repository", str(published.copy))
    (published.base / "nginx.conf").write_text(configuration)
    options = ["-e", "stderr", "-g", f"pid {run}/pid;", "-c", published.base / "nginx.conf"]
    subprocess.run([program, "-t", "-q", *options], check=True)
    process = subprocess.Popen([program, *options])

    def ask(method: str, path: str) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        connection.request(method, path)
        return connection.getresponse()

    try:
        deadline = time.monotonic() + 10
        while True:
            try:
                ask("GET", "/")
                break
            except ConnectionRefusedError:
                assert process.poll() is None and time.monotonic() < deadline
        yield ask
    finally:
        process.terminate()
        process.wait(10)


def test_the_web_server_serves_the_copy_below_tuf_for_reading_alone(published: Published, served) -> None:
    for name, raw in published.files().items():
        answer = served("GET", f"/tuf/{name}")
        assert (answer.status, answer.read()) == (200, raw)
        assert ("no-cache" in answer.headers["Cache-Control"]) == (name == "metadata/timestamp.json")
    assert served("HEAD", "/tuf/metadata/timestamp.json").status == 200
    for method in ("PUT", "POST", "DELETE"):
        assert served(method, "/tuf/metadata/timestamp.json").status in {403, 405}
        assert served(method, "/tuf/metadata/1.root.json").status in {403, 405}
    for path in ("/", "/tuf/../root.json", "/tuf/%2e%2e/root.json", "/tuf/metadata/", "/tuf/targets"):
        assert served("GET", path).status in {301, 400, 403, 404}, path


def test_a_low_port_and_https_are_told_to_unit_and_server() -> None:
    values = {
        "policy_repository_listen": "[::]:443",
        "policy_repository_certificate": "/etc/ssl/cert.pem",
        "policy_repository_certificate_key": "/etc/ssl/private/key.pem",
    }
    unit, server = render("saw-policy-repository.service.j2", **values), render("nginx.conf.j2", **values)
    assert "CapabilityBoundingSet=CAP_NET_BIND_SERVICE\n" in unit
    assert "LoadCredential=key.pem:/etc/ssl/private/key.pem\n" in unit
    assert "listen [::]:443 ssl;" in server
    assert "ssl_certificate_key /run/credentials/saw-policy-repository.service/key.pem;" in server
    plain = render("saw-policy-repository.service.j2")
    assert "CapabilityBoundingSet=\n" in plain
    assert "LoadCredential" not in plain
