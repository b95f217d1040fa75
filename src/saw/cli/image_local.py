"""``saw image local`` and ``saw image prune``: the images on this machine, how old their packages are, and what uses them."""

from __future__ import annotations

import argparse
import os
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from saw.cli.operator_options import show, table
from saw.errors import ConfigError, SawError

if TYPE_CHECKING:
    from saw.image.finished import GoldenImage
    from saw.image.inputs import Inputs
    from saw.image.packages import PackageSet

_COLUMNS = ("name", "created", "packages", "age_days", "newer", "security", "used")


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add both commands to those of ``saw image``."""
    local = commands.add_parser("local", help="list the images built on this machine, and how old their packages are")
    prune = commands.add_parser(
        "prune", help="remove images that nothing uses; the broker says which records are in force"
    )
    for one in (local, prune):
        one.add_argument("--repository", type=Path, default=Path(), help="checkout that images are built from")
        one.add_argument(
            "--build",
            type=Path,
            default=Path(os.environ.get("SAW_BUILD", "build")),
            help="build directory (default: %(default)s)",
        )  # fmt: skip
        one.add_argument("--json", action="store_true", help="print JSON")
    prune.add_argument("--keep", action="append", default=[], metavar="NAME", help="an image to keep; may be repeated")
    prune.add_argument("--dry-run", action="store_true", help="only say what would go")
    prune.add_argument(
        "--context", help="context file (default: the file named by SAW_CONTEXT, else this machine's broker)"
    )


def local(options: argparse.Namespace) -> int:
    """List finished images; what is newer is as the archive was last asked."""
    from saw.image.finished import finished_in, packages_of
    from saw.image.packages import compare
    from saw.image.usage import RECORD, by_disks

    now = datetime.now(UTC)
    rows: list[dict[str, Any]] = []
    reading = by_disks(options.build)
    for image, inputs in sorted(finished_in(options.build / "images"), key=lambda item: item[0].created, reverse=True):
        have, last = packages_of(image), _last(options, image, inputs)
        waiting = [one for one in compare(have, last) if one.new and not one.older] if have and last else []
        record = ["release record"] if Path(image.directory, RECORD).exists() else []
        rows.append(
            {
                "name": image.name,
                "created": image.created,
                "packages": have.asked if have else "",
                "age_days": (now - datetime.fromisoformat(have.asked)).days if have else None,
                "newer": len(waiting) if have and last else None,
                "security": sum(one.security for one in waiting) if have and last else None,
                "asked": last.asked if last else "",
                "used": [*reading.get(image.name, ()), *record],
            }
        )
    shown = [
        {**{name: "-" if value in {None, ""} else value for name, value in row.items() if name != "used"},
         "used": "; ".join(row["used"]) or "-"}
        for row in rows
    ]  # fmt: skip
    show(
        {"ok": True, "images": rows},
        table(shown, _COLUMNS) if rows else "no image was built here",
        as_json=options.json,
    )
    return 0


def prune(options: argparse.Namespace) -> int:
    """Remove what no VM reads from, no record in force names, and nobody asked to keep."""
    from saw.broker.client import OperatorClient, listed_workspaces
    from saw.image.finished import kinds_in
    from saw.image.usage import prune as prune_kind
    from saw.lab.exclusive import exclusive
    from saw.patching.images import in_force

    if not (options.build / "images").is_dir():
        raise ConfigError(f"there are no images in {options.build}", cure="name the build directory: --build DIR")
    client = OperatorClient.from_context(options.context)
    with client.session():
        images = client.request("GET", "/v1/images")["images"]
        listed = in_force(images, listed_workspaces(client))
    records = {
        one.name: f"its record is {one.state}" + (f", and {' '.join(ids)} made of it" if ids else "")
        for one, ids in listed
    }
    with exclusive(options.build.resolve(), _aside):
        found = [
            one
            for kind in kinds_in(options.build / "images")
            for one in prune_kind(
                options.build, [image.name for image, _ in kind], _aside, named=options.keep, in_force=records,
                registered={str(row["name"]) for row in images}, dry=options.dry_run,
            )
        ]  # fmt: skip
    gone = [one.name for one in found if not one.why]
    answer = {
        "ok": True,
        "changed": bool(gone) and not options.dry_run,
        "removed": gone,
        "images": msgspec.to_builtins(found),
    }
    kept = [f"{one.name}: kept, {'; '.join(one.why)}" for one in found if one.why]
    went = [f"{name}: {'would be removed' if options.dry_run else 'removed'}, nothing uses it" for name in gone]
    show(answer, "\n".join([*kept, *went]) or "no image was built here", as_json=options.json)
    return 0


def _last(options: argparse.Namespace, image: GoldenImage, inputs: Inputs) -> PackageSet | None:
    """Return what the archive said last of such an image; None where it was not asked, or this is no checkout."""
    from saw.image.build import ImageBuild
    from saw.image.edr import ImageEdr
    from saw.image.variant import variant_of

    try:
        edr = ImageEdr(inputs.options.get("edr", "none"))
        asked = ImageBuild(options.repository, options.build, variant=variant_of(image.variant), edr=edr).base.asked()
    except (SawError, OSError):
        return None
    return asked.packages if asked else None


def _aside(text: str) -> None:
    print(text, file=sys.stderr)
