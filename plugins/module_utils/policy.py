# Copyright: Secure Agent Workspace maintainers
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the plugins about policy files share: one form of failure, who signs, and a change of reach as people read it."""

from __future__ import annotations

import glob
import hashlib
import os
import traceback
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from typing import Any, Iterator

from ansible.module_utils.basic import AnsibleModule, missing_required_lib
from ansible_collections.secure_agent.workspace.plugins.module_utils.broker import fail

try:
    from saw.errors import ConfigError, SawError
    from saw.files import write_atomic
    from saw.policy.bundle import describe, good_signers, read_content
    from saw.policy.errors import BundleRefused
    from saw.policy.keys import key_id, read_passphrase
    from saw.policy.loader import load_bundle_folder
    from saw.policy.reach_html import table
    from saw.policy.signers import open_signer
    from saw.policy.tuf_reach import bundle_diff, compare, statement
    from saw.policy.tuf_repository import target_name
    from saw.policy.tuf_rings import held_revision as held_bundle

    IMPORT_ERROR = None
except ImportError:
    IMPORT_ERROR = traceback.format_exc()

    class SawError(Exception):
        """Stands in where the package is missing; every plugin then fails before it could be raised."""


SIGNING = {
    "keys": {"type": "list", "elements": "str", "required": True, "no_log": False},
    "passphrase_files": {"type": "list", "elements": "path", "default": [], "no_log": False},
}
"""Argument specification of who signs. These are names of files and programs; what is in them stays there."""


CLOCKS = timedelta(hours=1)
"""How far the clocks of two officers may be apart."""


@contextmanager
def reporting(module: AnsibleModule) -> Iterator[None]:
    """Run the module's work; end it with a ``failure`` that names code, details and cure when it is refused."""
    if IMPORT_ERROR is not None:
        module.fail_json(msg=missing_required_lib("secure-agent-workspace"), exception=IMPORT_ERROR)
    try:
        yield
    except SawError as error:
        fail(module, error)


def present() -> datetime:
    """Return the time in whole seconds, as signed files state it."""
    return datetime.now(timezone.utc).replace(microsecond=0)


def read_file(path: str) -> bytes:
    """Return the content of a file that an argument names."""
    try:
        with open(path, "rb") as stream:
            return stream.read()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", cure="check the path") from error


def write_file(path: str, raw: bytes) -> None:
    """Write a signed file, whole or not at all."""
    try:
        write_atomic(path, raw)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}", cure="make its folder first") from error


def open_signers(module: AnsibleModule) -> list[Any]:
    """Open what ``keys`` and ``passphrase_files`` name."""
    keys, files = module.params["keys"], module.params["passphrase_files"]
    if not keys:
        raise ConfigError("nobody signs", cure="name at least one key in keys")
    if len(files) not in {0, 1, len(keys)}:
        reason = f"{len(files)} passphrase files for {len(keys)} keys fit no reading"
        raise ConfigError(reason, cure="give none, one for all keys, or one for each")
    each = files if len(files) == len(keys) else (files or [None]) * len(keys)
    return [open_signer(key, read_passphrase(file)) for key, file in zip(keys, each, strict=True)]


def unsigned_by(raw: bytes, signers: list[Any]) -> list[Any]:
    """Return those of ``signers`` who have not signed the bundle file ``raw`` yet."""
    keys = {key_id(signer.public_key()): signer.public_key() for signer in signers}
    good = good_signers(raw, keys)
    return [signer for signer in signers if key_id(signer.public_key()) not in good]


def load_any(path: str) -> Any:
    """Return the bundle in a folder, or the content of a bundle file (its signatures are not looked at)."""
    return load_bundle_folder(path) if os.path.isdir(path) else read_content(read_file(path))


def member_digests(members: Any) -> dict[str, str]:
    """Return the SHA-256 of each file of a bundle, by name."""
    return {name: hashlib.sha256(raw).hexdigest() for name, raw in sorted(members.items())}


def held_revision(dest: str, bundle: Any, revision: int, offered: bytes | None, valid_for: timedelta) -> bytes | None:
    """Return the bundle file that further signatures go on, or None when one is to be made.

    ``offered`` is the bundle file that was given, None for a folder. ``dest`` counts when it holds the same revision. It is
    refused when that has another content, or a window that nobody who asks for ``valid_for`` would have made.
    """
    held = read_file(dest) if os.path.exists(dest) else None
    if held is None:
        return offered
    digest, manifest, signed_by = describe(held)
    if (manifest.blueprint, manifest.revision) != (bundle.governance.blueprint.name, revision):
        return offered
    if offered is not None:
        same = digest == describe(offered)[0]
    else:
        same = member_digests(read_content(held).members) == member_digests(bundle.members)
    if not same:
        reason = f"{dest} holds revision {revision} of {manifest.blueprint} with another content"
        raise BundleRefused("revision_taken", reason, cure="sign it as the next revision")
    if offered is not None:
        return held if set(describe(offered)[2]) <= set(signed_by) else offered
    end = datetime.strptime(manifest.not_after, "%Y-%m-%dT%H:%M:%S%z")
    if end <= present():
        reason = f"revision {revision} in {dest} counted until {manifest.not_after}"
        raise BundleRefused("expired", reason, cure="sign the next revision")
    if end > present() + valid_for + CLOCKS:
        reason = f"revision {revision} in {dest} counts until {manifest.not_after}, longer than valid_for says"
        raise BundleRefused("window_differs", reason, cure="agree on valid_for, or sign the next revision")
    return held


def released_bundle(directory: str, ring: str, blueprint: str, revision: int) -> dict[str, Any]:
    """Return where the bundle file of a release lies in a copy of the repository, and the digests of its files."""
    return located(directory, ring, blueprint, held_bundle(directory, ring, blueprint, revision))


def located(directory: str, ring: str, blueprint: str, raw: bytes) -> dict[str, Any]:
    """Return path and member digests of the bundle file ``raw`` of a copy (consistent snapshots: its hash is in its name)."""
    folder, name = os.path.split(target_name(ring, blueprint))
    path = os.path.join(directory, "targets", folder, f"{hashlib.sha256(raw).hexdigest()}.{name}")
    return {"bundle": path, "members": member_digests(read_content(raw).members)}


def earlier_bundles(directory: str, ring: str, blueprint: str) -> dict[str, dict[str, Any]]:
    """Return the same for every bundle file of a ring and blueprint that the copy holds, by policy digest; each is read once."""
    folder, name = os.path.split(target_name(ring, blueprint))
    found = {}
    for path in sorted(glob.glob(os.path.join(glob.escape(directory), "targets", folder, f"*.{name}"))):
        raw = read_file(path)
        found[describe(raw)[0]] = located(directory, ring, blueprint, raw)
    return found


def reach_between(base: str | None, new: Any) -> tuple[Any, Any]:
    """Return the diff of reach of ``new`` against the file or folder ``base`` (or nothing), and what signers state of it.

    Nothing is stated against a folder: only a signed bundle can be in force.
    """
    if base is not None and os.path.isdir(base):
        return bundle_diff()(load_any(base), new), None
    raw = None if base is None else read_file(base)
    report = compare(raw, new, bundle_diff())
    return report, statement(raw, report)


def reach_result(diff: Any) -> dict[str, Any]:
    """Return a diff of reach as a result: for programs, and as ``lines`` for people."""
    return {**diff.to_builtins(), "lines": reach_lines(diff)}


def reach_lines(diff: Any) -> list[str]:
    """Return a diff of reach as lines of text: what is gained by risk, what is lost, and the digest to approve."""
    return table(diff).splitlines()


def prepared(diff: Any) -> dict[str, str]:
    """Return what ``--diff`` shows: the change of reach, not of text."""
    return {"prepared": "\n".join(reach_lines(diff)) + "\n"}
