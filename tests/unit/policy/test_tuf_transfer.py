"""A repository crosses a gap as one archive, judged completely before anything is replaced; any web server can serve it."""

from __future__ import annotations

import functools
import http.server
import io
import json
import shutil
import ssl
import tarfile
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tuf_world import CANARY, STABLE, World, code_of, signed_by

from saw.cli.main import main
from saw.identity.x509 import Authority, new_key_and_csr
from saw.policy.bundle import describe
from saw.policy.keys import create_key
from saw.policy.loader import load_members
from saw.policy.tuf_accept import sign_online
from saw.policy.tuf_changes import RootChange, change_root, delegate_ring
from saw.policy.tuf_client import fetch_target, refresh
from saw.policy.tuf_fetcher import PinnedFetcher
from saw.policy.tuf_metadata import Metadata, Root, parse, sign_metadata
from saw.policy.tuf_repository import current_releases, current_root, read_target, resign_timestamp, target_file
from saw.policy.tuf_store import stored_target
from saw.policy.tuf_transfer import export_repository, import_repository

pytestmark = [pytest.mark.control("POL-01"), pytest.mark.control("POL-02")]


@pytest.fixture
def archive(world: World, tmp_path: Path) -> Path:
    """An archive of three roots, two rings (one with an officer of its own) and three releases."""
    world.release(1)
    world.release(1, CANARY)
    for _ in range(2):
        world.publish(signed_by(change_root(world.copy, RootChange(), world.now), world.officers[:2]))
    held = [world.officers[2].public_key()]
    draft = delegate_ring(world.copy, "canary", held, 1, world.now)
    world.publish(signed_by(draft, world.officers))
    world.publish(world.staged(world.bundle(2), CANARY, signers=[world.officers[2]]))
    path = tmp_path / "export.tar"
    path.write_bytes(export_repository(world.store, world.now))
    return path


def test_the_longest_names_that_are_allowed_travel(world: World, tmp_path: Path) -> None:
    name, ring = "b" * 63, "r" * 63
    members = {
        file: raw.replace(b"name: coding", b"name: " + name.encode()) for file, raw in world.content.members.items()
    }
    world.publish(world.staged(world.bundle(1, content=load_members(members)), f"rings/{ring}/{name}.bundle.json"))
    path = tmp_path / "long.tar"
    path.write_bytes(export_repository(world.store, world.now))
    done = import_repository(path, tmp_path / "island", world.root, world.clock)
    assert [(one.ring, one.blueprint) for one in done.releases] == [(ring, name)]


def contents(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as archive:
        return {member.name: archive.extractfile(member).read() for member in archive}  # type: ignore[union-attr]


def pack(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, raw in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(raw)
            archive.addfile(member, io.BytesIO(raw))
    return path


def test_export_is_the_same_every_time_and_import_brings_the_same_state(
    world: World, archive: Path, tmp_path: Path
) -> None:
    assert archive.read_bytes() == export_repository(world.store, world.now)
    done = import_repository(archive, tmp_path / "island", world.root, world.clock)
    assert done.changed and done.root_version == 3 and len(done.releases) == 2
    assert current_releases(tmp_path / "island") == current_releases(world.store)
    assert not import_repository(archive, tmp_path / "island", world.root, world.clock).changed


NAME = "static.example"


@pytest.fixture
def trusted(tmp_path: Path, now: datetime) -> tuple[ssl.SSLContext, str]:
    """A server's TLS settings under :data:`NAME`, and the authority that vouches for it."""
    authority = Authority.create(tmp_path / "ca", "saw.example", now)
    key, csr = new_key_and_csr(NAME, dns=(NAME,))
    pem = authority.issue_server(csr, [NAME], datetime.now(UTC), timedelta(hours=1))
    (tmp_path / "server.pem").write_bytes(pem + key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "server.pem")
    return context, authority.ca_pem.decode()


@pytest.fixture
def web(tmp_path: Path, trusted: tuple[ssl.SSLContext, str]) -> Iterator[tuple[str, PinnedFetcher, Path]]:
    """A plain static web server with TLS, the client's pinned downloads, and the folder that is served."""
    folder = tmp_path / "www"
    folder.mkdir()
    context, ca = trusted
    handler = functools.partial(Quiet, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    fetcher = PinnedFetcher(ca, NAME)
    try:
        yield f"https://127.0.0.1:{server.server_address[1]}/policy", fetcher, folder / "policy"
    finally:
        fetcher.close()
        server.shutdown()
        thread.join()
        server.server_close()


class Quiet(http.server.SimpleHTTPRequestHandler):
    """The standard library's file server without its log lines."""

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""


def test_any_web_server_serves_what_was_imported(
    world: World, archive: Path, web: tuple[str, PinnedFetcher, Path], tmp_path: Path
) -> None:
    url, fetcher, folder = web
    import_repository(archive, folder, world.root, world.clock)
    updater = refresh(tmp_path / "m", tmp_path / "t", url, world.root, fetcher)
    for target in (STABLE, CANARY):
        assert fetch_target(updater, target)[0] == read_target(world.store, target)
    stored = next((folder / "targets" / "rings" / "stable").iterdir())
    stored.write_bytes(stored.read_bytes()[:-1] + b" ")
    shutil.rmtree(tmp_path / "t")
    updater = refresh(tmp_path / "m", tmp_path / "t", url, world.root, fetcher)
    assert code_of(lambda: fetch_target(updater, STABLE)) == "mix_and_match"


class Bucket(http.server.BaseHTTPRequestHandler):
    """An object store without listing: flat keys, compared byte by byte; whatever is no key is ``absent``."""

    protocol_version = "HTTP/1.1"
    keys: dict[str, bytes]
    absent: int
    asked: list[str]

    def do_GET(self) -> None:
        """Answer with the object under exactly this key."""
        self.asked.append(self.path)
        found = self.keys.get(self.path)
        body = b"<Error/>" if found is None else found
        self.send_response(self.absent if found is None else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""


@pytest.mark.parametrize("absent", [404, 403])
def test_an_object_store_serves_the_archive_by_key(
    world: World, archive: Path, tmp_path: Path, trusted: tuple[ssl.SSLContext, str], absent: int
) -> None:
    context, ca = trusted
    keys = {f"/bucket/policy/{name}": raw for name, raw in members(archive).items()}
    handler = type("Store", (Bucket,), {"keys": keys, "absent": absent, "asked": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    fetcher = PinnedFetcher(ca, NAME)
    url = f"https://127.0.0.1:{server.server_address[1]}/bucket/policy"
    try:
        updater = refresh(tmp_path / "m", tmp_path / "t", url, world.root, fetcher)
        for target in (STABLE, CANARY):
            assert fetch_target(updater, target)[0] == read_target(world.store, target)
        # Nobody asked for a folder, an index, or anything else than whole keys and the root after the newest one.
        strange = {path for path in handler.asked if path not in keys}
        assert strange == {"/bucket/policy/metadata/4.root.json"}
        del keys["/bucket/policy/metadata/timestamp.json"]
        assert code_of(lambda: refresh(tmp_path / "m", tmp_path / "t", url, world.root, fetcher)) == "unreachable"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)
        fetcher.close()


def test_an_archive_of_other_officers_is_refused(world: World, archive: Path, tmp_path: Path) -> None:
    strangers = [Ed25519PrivateKey.generate() for _ in range(3)]
    other = World(tmp_path / "other", world.content, strangers, world.online, world.now)
    assert code_of(lambda: import_repository(archive, tmp_path / "island", other.root, world.clock)) == "threshold"
    assert not (tmp_path / "island").exists()
    assert import_repository(archive, tmp_path / "island", current_root(world.store), world.clock).changed


def test_a_repository_that_forked_from_the_pinned_root_is_refused(world: World, archive: Path, tmp_path: Path) -> None:
    """The same officers and keys, and yet another first root than the one that was pinned."""
    fork = parse(Root, world.root, "root.json")
    fork.signed.expires += timedelta(days=1)
    fork.signatures.clear()
    pinned = sign_metadata(fork, world.officers)
    assert code_of(lambda: import_repository(archive, tmp_path / "island", pinned, world.clock)) == "threshold"
    assert import_repository(archive, tmp_path / "island", world.root, world.clock).changed


def test_a_bundle_that_officers_did_not_sign_is_refused_whatever_the_metadata_says(
    world: World, tmp_path: Path
) -> None:
    world.release(1)
    raw = world.bundle(2, world.officers[:1])
    targets = Metadata.from_bytes((world.store / "metadata" / "2.targets.json").read_bytes())
    targets.signed.version = 3
    targets.signed.targets[STABLE] = target_file(STABLE, raw, describe(raw)[0], 2)
    targets.signatures.clear()
    signed = sign_metadata(targets, world.officers)
    (world.store / "metadata" / "3.targets.json").write_bytes(signed)
    stored_target(world.store, STABLE, targets.signed.targets[STABLE]).write_bytes(raw)
    sign_online(world.store, {"targets": 3}, world.online, world.now, timedelta(hours=1))
    path = tmp_path / "x.tar"
    path.write_bytes(export_repository(world.store, world.now))
    assert code_of(lambda: import_repository(path, tmp_path / "island", world.root, world.clock)) == "bundle"
    assert not (tmp_path / "island").exists()


def test_an_officers_copy_that_is_ahead_is_not_taken_back(world: World, archive: Path, tmp_path: Path) -> None:
    world.release(7)
    before = contents(world.copy)
    assert code_of(lambda: import_repository(archive, world.copy, world.root, world.clock)) == "rollback"
    assert contents(world.copy) == before


def test_an_older_archive_does_not_replace_a_newer_state(world: World, archive: Path, tmp_path: Path) -> None:
    island = tmp_path / "island"
    world.publish(world.staged(world.bundle(7)))
    newer = tmp_path / "newer.tar"
    newer.write_bytes(export_repository(world.store, world.now))
    import_repository(newer, island, world.root, world.clock)
    before = contents(island)
    assert code_of(lambda: import_repository(archive, island, world.root, world.clock)) == "rollback"
    assert contents(island) == before


def test_an_archive_that_travelled_too_long_needs_a_timestamp_of_its_own(world: World, tmp_path: Path) -> None:
    world.now -= timedelta(hours=3)
    world.release(1)
    resign_timestamp(world.store, world.online, world.now)
    path = tmp_path / "x.tar"
    path.write_bytes(export_repository(world.store, world.now))
    later = datetime.now(UTC)
    assert code_of(lambda: import_repository(path, tmp_path / "island", world.root, later)) == "freeze"
    stranger = Ed25519PrivateKey.generate()
    with pytest.raises(Exception, match="not signed"):
        export_repository(world.store, world.now, online_key=stranger, lifetime=timedelta(days=7))
    path.write_bytes(export_repository(world.store, later, online_key=world.online, lifetime=timedelta(days=7)))
    assert import_repository(path, tmp_path / "island", world.root, later).changed


def test_the_officers_copy_stays_a_copy(world: World, archive: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(world.copy, copy)
    world.publish(world.staged(world.bundle(7)))
    archive.write_bytes(export_repository(world.store, world.now))
    assert import_repository(archive, copy, world.root, world.clock).changed
    assert not (copy / "metadata" / "timestamp.json").exists()
    assert current_releases(copy) == current_releases(world.store)


def damaged(files: dict[str, bytes], how: str) -> dict[str, bytes]:
    """The members of an archive with one fault."""
    name = {
        "no timestamp": "metadata/timestamp.json",
        "no root": "metadata/1.root.json",
        "no middle": "metadata/2.root.json",
    }.get(how)
    files = dict(files)
    bundle = next(entry for entry in files if "stable" in entry)
    if name is not None:
        del files[name]
    elif how == "no bundle":
        del files[bundle]
    elif how == "changed bundle":
        files[bundle] = files[bundle].replace(b"a", b"b", 1)
    elif how == "changed targets":
        targets = max(entry for entry in files if entry.endswith(".targets.json"))
        document = json.loads(files[targets])
        document["signed"]["version"] += 0
        document["signed"]["expires"] = "2099-01-01T00:00:00Z"
        files[targets] = json.dumps(document).encode()
    elif how == "spare file":
        files["metadata/99.snapshot.json"] = b"{}"
    elif how == "spare bundle":
        files[f"targets/rings/beta/{'0' * 64}.coding.bundle.json"] = b"{}"
    else:
        files[how] = b"x"
    return files


@pytest.mark.thorough
@pytest.mark.parametrize(
    "how",
    [
        "no timestamp", "no root", "no middle", "no bundle", "changed bundle", "changed targets", "spare file",
        "spare bundle", "../escape", "/etc/absolute", "metadata/../x.json", "metadata/private.key", "targets/a.bundle.json",
    ],
)  # fmt: skip
def test_a_damaged_archive_changes_nothing(world: World, archive: Path, tmp_path: Path, how: str) -> None:
    island = tmp_path / "island"
    bad = pack(tmp_path / "bad.tar", damaged(members(archive), how))
    assert code_of(lambda: import_repository(bad, island, world.root, world.clock)) != "error"
    assert not island.exists()
    assert import_repository(archive, island, world.root, world.clock).changed


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_refused(world: World, archive: Path, tmp_path: Path, kind: bytes) -> None:
    with tarfile.open(archive, "a") as stream:
        member = tarfile.TarInfo("metadata/7.targets.json")
        member.type, member.linkname = kind, "/etc/passwd"
        stream.addfile(member)
    assert code_of(lambda: import_repository(archive, tmp_path / "i", world.root, world.clock)) == "malformed"


def test_compressed_and_doubled_archives_are_refused(world: World, archive: Path, tmp_path: Path) -> None:
    files = members(archive)
    with tarfile.open(tmp_path / "z.tar", "w:gz") as stream:
        stream.add(archive, "metadata/timestamp.json")
    assert (
        code_of(lambda: import_repository(tmp_path / "z.tar", tmp_path / "i", world.root, world.clock)) == "malformed"
    )
    with tarfile.open(archive, "a") as stream:
        member = tarfile.TarInfo("metadata/timestamp.json")
        member.size = len(files["metadata/timestamp.json"])
        stream.addfile(member, io.BytesIO(files["metadata/timestamp.json"]))
    assert code_of(lambda: import_repository(archive, tmp_path / "i", world.root, world.clock)) == "malformed"


@given(st.binary(max_size=3000), st.integers(0, 60_000))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)
def test_no_change_of_bytes_gets_other_content_in(
    world: World, archive: Path, tmp_path: Path, noise: bytes, at: int
) -> None:
    raw = archive.read_bytes()
    place = at % len(raw)
    bad = tmp_path / "noise.tar"
    bad.write_bytes(raw[:place] + noise + raw[place + len(noise) :])
    island = tmp_path / "noise"
    shutil.rmtree(island, ignore_errors=True)
    try:
        import_repository(bad, island, world.root, world.clock)
    except Exception as error:  # noqa: BLE001 - every refusal is one of ours
        assert hasattr(error, "cure"), repr(error)
        assert not island.exists()
    else:
        assert current_releases(island) == current_releases(world.store)


def test_the_commands_export_and_import(world: World, archive: Path, tmp_path: Path, capsys) -> None:
    def run(*arguments: object) -> tuple[int, dict]:
        code = main(["policy", *map(str, arguments), "--json"])
        return code, json.loads(capsys.readouterr().out)

    root = tmp_path / "root.json"
    root.write_bytes(world.root)
    out = tmp_path / "out.tar"
    assert run("repository-export", "--repository", world.store, "--out", out)[0] == 0
    code, answer = run("repository-import", out, "--repository", tmp_path / "island", "--root", root)
    assert code == 0 and answer["changed"] and len(answer["releases"]) == 2
    code, answer = run("repository-export", "--repository", world.copy, "--out", out)
    assert code == 1 and answer["error"]["code"] == "not_found"
    create_key(tmp_path, "other")
    signed = ("repository-export", "--repository", world.store, "--out", out, "--timestamp-key", tmp_path / "other.key")
    assert run(*signed)[1]["error"]["code"] == "config_invalid"
    assert run(*signed, "--valid-for", "7d")[1]["error"]["code"] == "threshold"


def test_one_command_exports_for_every_other_place(world: World, archive: Path, tmp_path: Path, capsys) -> None:
    def run(*arguments: object) -> tuple[int, dict]:
        code = main(["policy", *map(str, arguments), "--json"])
        return code, json.loads(capsys.readouterr().out)

    root = tmp_path / "root.json"
    root.write_bytes(world.root)
    out, old = tmp_path / "new.tar", tmp_path / "old.tar"
    assert run("export", "--repository", world.store, out)[0] == 0
    assert run("repository-export", "--repository", world.store, "--out", old)[0] == 0
    assert out.read_bytes() == old.read_bytes()
    code, answer = run("import", out, "--repository", tmp_path / "island", "--root", root)
    assert code == 0 and answer["changed"] and len(answer["releases"]) == 2
    for wrong in (
        ("export",),
        ("export", "--repository", world.store),
        ("export", tmp_path, "--openshell", "a", "--repository", world.store),
        ("export", "--openshell", tmp_path / "o.yaml"),
        ("export", tmp_path, "--openshell", "a", "--valid-for", "7d"),
        ("import", out, "--repository", tmp_path / "island"),
        ("import", out, "--repository", tmp_path / "island", "--root", root, "--owner", "team"),
        ("import", out),
    ):
        code, answer = run(*wrong)
        assert (code, answer["error"]["code"]) == (1, "config_invalid"), wrong
