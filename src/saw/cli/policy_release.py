"""``saw policy sign, verify, init-repo, stage, publish``: from a folder to what a ring gets."""

from __future__ import annotations

import argparse
import base64
from datetime import timedelta
from pathlib import Path

from saw.cli.answers import Add, Answer, read_file
from saw.cli.policy_review import (
    add_base,
    base_for,
    base_of_signed,
    compare_for,
    line,
    review_for,
    show,
    told,
    told_all,
)
from saw.cli.policy_signing import (
    add_signing,
    encoded,
    load_publication,
    owed_json,
    owed_text,
    present,
    save_publication,
    signers_of,
)
from saw.errors import ConfigError
from saw.files import write_atomic
from saw.policy import bundle as bundles
from saw.policy import tuf_repository as repositories
from saw.policy.errors import RepositoryError
from saw.policy.governance import duration
from saw.policy.keys import load_public_key
from saw.policy.loader import load_bundle_folder
from saw.policy.matcher import Matcher
from saw.policy.tuf_draft import contribute, is_draft, load_draft, owed, save_draft
from saw.policy.tuf_reach import ReachReport, bundle_diff
from saw.policy.tuf_statements import check_stated, copy_of, review, state_reach

DEFAULT_VALIDITY = "30d"


def sign(options: argparse.Namespace) -> Answer:
    """Sign a folder as a new revision, or add signatures to a bundle.

    What it changes of the reach in force is computed here and shown, and its digest is signed with the bundle. Who adds a
    signature computes it again, and signs only when the bundle states the same.
    """
    if Path(options.path).is_dir():
        report, raw = _sign_folder(options)
    else:
        if options.revision is not None:
            raise ConfigError("a signed bundle has its revision", cure="leave --revision out")
        held = read_file(options.path)
        report, reach = compare_for(options, base_of_signed(options, held), bundles.read_content(held))
        check_stated(held, reach)
        raw = bundles.add_signatures(held, signers_of(options))
    write_atomic(options.out, raw)
    value, parsed, signers = bundles.describe(raw)
    result: dict[str, object] = {
        "ok": True,
        "policy_digest": value,
        "revision": parsed.revision,
        "signatures": len(signers),
    }
    text = f"{options.out}: revision {parsed.revision}, {len(signers)} signatures, digest {value}"
    if parsed.reach is not None:
        result |= told(report, parsed.reach)
        text += f"\n{line(parsed.reach)}"
    return result, text, 0


def _sign_folder(options: argparse.Namespace) -> tuple[ReachReport, bytes]:
    """Return the diff of reach that is signed, and the bundle file."""
    bundle = load_bundle_folder(options.path)
    Matcher.compile(bundle.policy, bundle.governance)
    if options.revision is None and not options.repository:
        raise ConfigError("a new bundle needs a revision", cure="give --revision, or --repository and --ring")
    base = base_for(options, bundle.governance.blueprint.name, first=options.revision == 1)
    follows = bundles.describe(base)[1].revision if base is not None else 0
    revision = options.revision if options.revision is not None else follows + 1
    if revision <= follows:
        reason = f"revision {revision} does not follow revision {follows}, which is in force"
        raise ConfigError(reason, cure=f"sign it as revision {follows + 1}")
    report, reach = compare_for(options, base, bundle)
    validity = timedelta(seconds=duration(options.valid_for))
    manifest = bundles.build_manifest(bundle, revision, *bundles.window(present(), validity), reach=reach)
    return report, bundles.sign(manifest, bundle.members, signers_of(options))


def verify(options: argparse.Namespace) -> Answer:
    """Verify a bundle under a trusted root."""
    keys, threshold = repositories.trusted_policy_keys(read_file(options.root))
    good = bundles.verify_bundle(read_file(options.path), keys, threshold, present(), min_revision=options.min_revision)
    result = {
        "ok": True,
        "blueprint": good.blueprint,
        "version": good.version,
        "revision": good.revision,
        "policy_digest": good.digest,
        "not_after": good.not_after.isoformat(),
        "signers": list(good.signers),
    }
    return result, f"{options.path}: good; {good.blueprint} revision {good.revision}, digest {good.digest}", 0


def init_repo(options: argparse.Namespace) -> Answer:
    """Make the officers' root and empty targets."""
    online = load_public_key(options.online_pub)
    officers = signers_of(options)
    further = [load_public_key(path) for path in options.officer_pub]
    repositories.init_repository(
        options.dir, officers, online, options.threshold, now=present(), further_officers=further
    )
    path = Path(options.dir) / "metadata" / "1.root.json"
    officer_count = len(officers) + len(further)
    return (
        {"ok": True, "root": str(path), "threshold": options.threshold, "officers": officer_count},
        f"{path}: {options.threshold} of {officer_count} officers; install it at the broker and in every workspace",
        0,
    )


def stage(options: argparse.Namespace) -> Answer:
    """Make a publication, or add signatures to one, or to a change under way (rotation, delegation, rollback).

    What it changes of a ring's reach is computed here and shown. It is signed with the publication when the bundle states
    another change, and whoever adds a signature computes it again.
    """
    if options.bundle is None and is_draft(options.out):
        held = load_draft(options.out)
        changes = review_for(options, held)
        draft = contribute(held, signers_of(options))
        save_draft(options.out, draft)
        left = owed(draft)
        names = sorted(draft.targets)
        result = {"ok": True, "targets": names, "directory": options.out, "complete": not left, "owed": owed_json(left)}
        text = owed_text(left, f"{options.out}: {draft.note.subject} is complete; publish it")
        return {**result, "changes": told_all(changes)}, text, 0
    if options.bundle is None:
        offered = load_publication(options.out)
        changes = review_for(options, offered)
        publication = repositories.cosign_publication(offered, signers_of(options))
    else:
        if not options.repository or not options.ring:
            raise ConfigError("a new publication needs --repository and --ring", cure="add them")
        raw = read_file(options.bundle)
        target = repositories.target_name(options.ring, bundles.describe(raw)[1].blueprint)
        change, reach = state_reach(options.repository, target, raw, bundle_diff())
        show(options, change.report, change.path)
        changes, keys = (change,), signers_of(options)
        publication = repositories.stage_publication(options.repository, target, raw, keys, present(), reach=reach)
    save_publication(options.out, publication)
    names = sorted(publication.targets)
    value = {"ok": True, "targets": names, "directory": options.out, "changes": told_all(changes)}
    text = "".join(f"\n{change.path}: {line(change.reach)}" for change in changes)
    return value, f"{options.out}: publishes {', '.join(names)}{text}", 0


def publish(options: argparse.Namespace) -> Answer:
    """Hand a publication to the broker and bring the officers' copy up to date.

    With a copy, a change of reach that was not signed is refused before anything is sent; the broker refuses it in any case.
    """
    if is_draft(options.path):
        draft = load_draft(options.path)
        left = owed(draft)
        if left:
            reason = f"{draft.note.subject} lacks signatures: {'; '.join(str(one) for one in left)}"
            cure = f"let them sign: saw policy stage --repository COPY --key KEY --out {options.path}"
            raise RepositoryError("threshold", reason, cure=cure, details={"owed": owed_json(left)})
    publication = load_publication(options.path)
    if options.repository:
        review(publication, copy_of(options.repository), bundle_diff())
    answer = hand_over(publication, options.context, options.install_root)
    if options.repository:
        repositories.adopt_publication(options.repository, publication)
    released = ", ".join(sorted(publication.targets)) or "new metadata"
    return {"ok": True, "answer": answer}, f"the broker released {released}", 0


def hand_over(publication: repositories.Publication, context: str | None, root: str | None = None) -> dict[str, object]:
    """Send a publication to the broker of ``context``, after the first root when one is given; return the answer."""
    from saw.broker.client import OperatorClient

    client = OperatorClient.from_context(context)
    if root:
        client.request("PUT", "/v1/policy/root", {"root": base64.b64encode(read_file(root)).decode()})
    return client.request("POST", "/v1/policy/publish", encoded(publication))


def register(add: Add) -> None:
    """Add the commands to ``saw policy``."""
    sub = add("sign", sign, "sign a bundle folder, or add signatures to a bundle file")
    sub.add_argument("path")
    add_signing(sub)
    sub.add_argument(
        "--revision",
        type=int,
        help="number of the revision; must grow (default: one more than in force, with --repository)",
    )
    sub.add_argument("--valid-for", default=DEFAULT_VALIDITY, help="how long it counts (default: %(default)s)")
    add_base(sub)
    sub.add_argument("--out", required=True, help="bundle file to write")
    sub = add("verify", verify, "verify a bundle file")
    sub.add_argument("path")
    sub.add_argument("--root", required=True, help="trusted root.json")
    sub.add_argument("--min-revision", type=int, default=0, help="lowest revision that counts")
    sub = add("init-repo", init_repo, "make the root of trust: officers, threshold, the broker's online key")
    sub.add_argument("--dir", required=True, help="empty directory for the officers' copy of the repository")
    add_signing(sub)
    sub.add_argument(
        "--officer-pub", action="append", default=[], help="public key of an officer who does not sign now"
    )
    sub.add_argument("--online-pub", required=True, help="public key file of the broker's online key")
    sub.add_argument("--threshold", type=int, default=2, help="how many officers must sign (default: %(default)s)")
    sub = add("stage", stage, "make the publication of a bundle, or add signatures to it (without --bundle)")
    add_signing(sub)
    sub.add_argument("--repository", help="officers' copy of the repository, which the reach is compared with")
    sub.add_argument("--ring", help="ring to release to, for example stable")
    sub.add_argument("--bundle", help="signed bundle file")
    sub.add_argument("--base", help="bundle file of the release in force, for who adds a signature and has no copy")
    sub.add_argument("--out", required=True, help="directory of the publication")
    sub = add("publish", publish, "hand a publication to the broker")
    sub.add_argument("path", help="directory of the publication")
    sub.add_argument("--repository", help="officers' copy of the repository, brought up to date afterwards")
    sub.add_argument("--install-root", help="root.json to install first, at a broker that has none")
    sub.add_argument("--context", help="context file of the broker (default: SAW_CONTEXT)")
