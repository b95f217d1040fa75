"""``saw policy sign, verify, init-repo, stage, publish``: from a folder to what a ring gets."""

from __future__ import annotations

import argparse
import base64
from datetime import timedelta
from pathlib import Path

from saw.cli.answers import Add, Answer, read_file
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
from saw.policy.tuf_reach import bundle_diff, reach_between

DEFAULT_VALIDITY = "30d"


def sign(options: argparse.Namespace) -> Answer:
    """Sign a folder as a new revision, or add signatures to a bundle.

    With --base, the diff of reach against the release in force is computed and its digest signed with the bundle.
    """
    keys = signers_of(options)
    if Path(options.path).is_dir():
        if options.revision is None:
            raise ConfigError("a new bundle needs a revision", cure="give --revision, one more than the last")
        bundle = load_bundle_folder(options.path)
        Matcher.compile(bundle.policy, bundle.governance)
        reach = reach_between(read_file(options.base), bundle, bundle_diff()) if options.base else None
        start = present()
        validity = timedelta(seconds=duration(options.valid_for))
        manifest = bundles.build_manifest(bundle, options.revision, start, start + validity, reach=reach)
        raw = bundles.sign(manifest, bundle.members, keys)
    else:
        if options.base:
            raise ConfigError("the reach of a signed bundle is fixed", cure="give --base when signing the folder")
        raw = bundles.add_signatures(read_file(options.path), keys)
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
        shown = parsed.reach
        result["reach"] = {
            "base_digest": shown.base_digest,
            "diff_digest": shown.diff_digest,
            "widening": shown.widening,
        }
        kind = "WIDENS the reach" if shown.widening else "does not widen the reach"
        text += f"\n{kind} of {shown.base_digest}; diff {shown.diff_digest}"
    return result, text, 0


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
    """Make a publication, or add signatures to one, or to a change under way (rotation, delegation, rollback)."""
    keys = signers_of(options)
    if options.bundle is None and is_draft(options.out):
        draft = contribute(load_draft(options.out), keys)
        save_draft(options.out, draft)
        left = owed(draft)
        names = sorted(draft.targets)
        result = {"ok": True, "targets": names, "directory": options.out, "complete": not left, "owed": owed_json(left)}
        return result, owed_text(left, f"{options.out}: {draft.note.subject} is complete; publish it"), 0
    if options.bundle is None:
        publication = repositories.cosign_publication(load_publication(options.out), keys)
    else:
        if not options.repository or not options.ring:
            raise ConfigError("a new publication needs --repository and --ring", cure="add them")
        raw = read_file(options.bundle)
        target = repositories.target_name(options.ring, bundles.describe(raw)[1].blueprint)
        reach = None
        if options.state_reach:
            base = repositories.read_target(options.repository, target)
            reach = reach_between(base, bundles.read_content(raw), bundle_diff())
        publication = repositories.stage_publication(options.repository, target, raw, keys, present(), reach=reach)
    save_publication(options.out, publication)
    names = sorted(publication.targets)
    return {"ok": True, "targets": names, "directory": options.out}, f"{options.out}: publishes {', '.join(names)}", 0


def publish(options: argparse.Namespace) -> Answer:
    """Hand a publication to the broker and bring the officers' copy up to date."""
    if is_draft(options.path):
        draft = load_draft(options.path)
        left = owed(draft)
        if left:
            reason = f"{draft.note.subject} lacks signatures: {'; '.join(str(one) for one in left)}"
            cure = f"let them sign: saw policy stage --key KEY --out {options.path}"
            raise RepositoryError("threshold", reason, cure=cure, details={"owed": owed_json(left)})
    publication = load_publication(options.path)
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
    sub.add_argument("--revision", type=int, help="number of the revision; must grow with each release")
    sub.add_argument("--valid-for", default=DEFAULT_VALIDITY, help="how long it counts (default: %(default)s)")
    sub.add_argument("--base", help="bundle file of the release in force; the diff of reach against it is signed too")
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
    sub.add_argument("--repository", help="officers' copy of the repository")
    sub.add_argument("--ring", help="ring to release to, for example stable")
    sub.add_argument("--bundle", help="signed bundle file")
    sub.add_argument(
        "--state-reach",
        action="store_true",
        help="sign the diff of reach against this ring's release, for a bundle that was signed against another one",
    )
    sub.add_argument("--out", required=True, help="directory of the publication")
    sub = add("publish", publish, "hand a publication to the broker")
    sub.add_argument("path", help="directory of the publication")
    sub.add_argument("--repository", help="officers' copy of the repository, brought up to date afterwards")
    sub.add_argument("--install-root", help="root.json to install first, at a broker that has none")
    sub.add_argument("--context", help="context file of the broker (default: SAW_CONTEXT)")
