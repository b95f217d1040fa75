"""``saw policy way-back``: the rollback of a release that is not published yet, so that both are signed before either counts."""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from saw.cli.answers import Add, Answer
from saw.cli.policy_release import DEFAULT_VALIDITY
from saw.cli.policy_rings import rollback
from saw.cli.policy_signing import add_signing, load_publication, present
from saw.errors import ConfigError
from saw.policy.bundle import verify_bundle
from saw.policy.tuf_delegation import check_delegations
from saw.policy.tuf_draft import is_draft, load_draft
from saw.policy.tuf_metadata import Root, Targets, check_role, parse, policy_keys
from saw.policy.tuf_repository import Publication, adopt_publication, current_root
from saw.policy.tuf_store import current_state, read_role, split_target


def _check_signed(copy: Path, publication: Publication, now: datetime) -> tuple[str, str]:
    """Return ring and blueprint of the one release that the publication makes; raise unless enough officers signed it."""
    if len(publication.targets) != 1:
        reason = f"the publication makes {len(publication.targets)} releases"
        raise ConfigError(
            reason, cure="prepare the way back of one release; see saw policy rollback for what is published"
        )
    [(path, raw)] = publication.targets.items()
    root = parse(Root, current_root(copy), "root.json").signed
    targets = check_role(root, "targets", Targets, publication.metadata["targets.json"], now)
    for role in check_delegations(targets):
        if (own := publication.metadata.get(f"{role}.json")) is not None:
            check_role(targets, role, Targets, own, now)
    verify_bundle(raw, *policy_keys(root), now)
    return split_target(path)


@contextmanager
def _published(repository: str, publication: Publication) -> Iterator[Path]:
    """Give a scratch copy of the officers' copy in which ``publication`` is released."""
    with tempfile.TemporaryDirectory(prefix="saw-way-back-") as name:
        copy = Path(name)
        for part in ("metadata", "targets"):
            if (source := Path(repository) / part).is_dir():
                shutil.copytree(source, copy / part)
        # The online key's snapshot knows nothing of the publication yet.
        (copy / "metadata/timestamp.json").unlink(missing_ok=True)
        adopt_publication(copy, publication)
        yield copy


def _drop_outdated(out: str, copy: Path) -> bool:
    """Remove a way back that starts from another state than ``copy``: nobody takes it any more. Tell whether there was one."""
    state = current_state(copy)
    if state is None or not is_draft(out) or load_draft(out).note.kind != "rollback":
        return False
    roles = {f"{role}.json": read_role(copy, role, version) for role, version in state.versions.items()}
    if load_draft(out).base == {"root.json": current_root(copy), **roles}:
        return False
    Path(out, "draft.json").unlink()
    for part in ("base", "metadata", "targets"):
        shutil.rmtree(Path(out, part), ignore_errors=True)
    return True


def way_back(options: argparse.Namespace) -> Answer:
    """Prepare the rollback of a release that is signed and not published yet; repeat it with each officer's key.

    Nothing is published: once the release is out, saw policy escrow hands it to the broker. A way back that was begun from
    another state of the repository is begun again. Ends 0 when it is complete, or says who must still sign (1).
    """
    publication = load_publication(options.publication)
    ring, blueprint = _check_signed(Path(options.repository), publication, present())
    with _published(options.repository, publication) as copy:
        again = _drop_outdated(options.out, copy)
        place = {"repository": str(copy), "ring": ring, "blueprint": blueprint, "prepare_only": True}
        result, text, code = rollback(argparse.Namespace(**{**vars(options), **place}))
    if code == 0:
        text = f"{options.out}: complete; publish the release, then saw policy escrow {options.out} --ring {ring}"
    return {**result, "begun_again": again}, text, code


def register(add: Add) -> None:
    """Add the command to ``saw policy``."""
    sub = add("way-back", way_back, "prepare the rollback of a release before it is published")
    sub.add_argument("publication", help="directory of the signed publication")
    sub.add_argument("--repository", required=True, help="officers' copy of the repository")
    sub.add_argument("--to", type=int, required=True, help="revision whose content is wanted")
    sub.add_argument("--valid-for", default=DEFAULT_VALIDITY, help="how long it counts (default: %(default)s)")
    add_signing(sub)
    sub.add_argument("--out", required=True, help="folder of the way back; the same for each officer")
