"""What the commands share that sign: the options which name signers, and how drafts and publications lie on disk."""

from __future__ import annotations

import argparse
import base64
import secrets
import shutil
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from saw.errors import ConfigError
from saw.files import write_atomic
from saw.policy.keys import read_passphrase
from saw.policy.signers import Signer, open_signer
from saw.policy.tuf_draft import Owed
from saw.policy.tuf_repository import Publication


def present() -> datetime:
    """Return the time in whole seconds, as signed files state it."""
    return datetime.now(UTC).replace(microsecond=0)


def add_signing(sub: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Add ``--key`` and ``--passphrase-file``."""
    sub.add_argument(
        "--key",
        action="append",
        required=required,
        default=None if required else [],
        help="private key file, or exec:/path/to/program that signs; repeat for more officers",
    )
    sub.add_argument("--passphrase-file", action="append", help="file with the passphrase: one for all, or per --key")


def signers_of(options: argparse.Namespace) -> list[Signer]:
    """Open the signers that the options name."""
    passphrases = options.passphrase_file or []
    if len(passphrases) not in {0, 1, len(options.key)}:
        raise ConfigError("the number of passphrase files fits no reading", cure="give none, one, or one per --key")
    files: list[str | None] = [*passphrases] if len(passphrases) == len(options.key) else []
    files = files or [passphrases[0] if passphrases else None] * len(options.key)
    pairs = zip(options.key, files, strict=True)
    return [open_signer(name, read_passphrase(passphrase)) for name, passphrase in pairs]


def owed_json(owed: Sequence[Owed]) -> list[dict[str, Any]]:
    """Return what ``--json`` says of signatures that are still missing."""
    return [{"item": one.item, "threshold": one.threshold, "by": [*one.by], "may": [*one.may]} for one in owed]


def owed_text(owed: Sequence[Owed], done: str) -> str:
    """Return what people read: what is still to be signed, or ``done`` when nothing is."""
    return "\n".join(["still to be signed:", *(f"  {one}" for one in owed)]) if owed else done


def save_publication(directory: str, publication: Publication) -> None:
    """Write a publication to a folder. A new folder is there as a whole or not at all; in an old one files are replaced."""
    out = Path(directory)
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.is_dir() and any(out.iterdir()):
        _write_publication(out, publication)
        return
    made = out.with_name(f".{out.name}.{secrets.token_hex(8)}")
    made.mkdir()
    try:
        _write_publication(made, publication)
        made.replace(out)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise


def _write_publication(out: Path, publication: Publication) -> None:
    """Write bundles before what lists them, and last the file by which a publication is known."""
    last = "targets.json"
    metadata = sorted(publication.metadata.items(), key=lambda item: item[0] == last)
    for folder, files in (("targets", publication.targets.items()), ("metadata", metadata)):
        for name, content in files:
            path = out / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, content)


def load_publication(directory: str) -> Publication:
    """Read a publication from a folder."""
    base = Path(directory)
    metadata = {path.name: path.read_bytes() for path in sorted((base / "metadata").glob("*.json"))}
    if "targets.json" not in metadata:
        raise ConfigError(f"{directory} holds no publication", cure="make one with saw policy stage")
    files = sorted(path for path in (base / "targets").rglob("*.bundle.json") if path.is_file())
    return Publication(metadata, {str(p.relative_to(base / "targets")): p.read_bytes() for p in files})


def encoded(publication: Publication) -> dict[str, dict[str, str]]:
    """Return the body of ``POST /v1/policy/publish``."""
    return {
        "metadata": {name: base64.b64encode(raw).decode() for name, raw in publication.metadata.items()},
        "targets": {name: base64.b64encode(raw).decode() for name, raw in publication.targets.items()},
    }
