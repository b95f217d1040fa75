"""What the scanner Lynis says of a golden image's tree, before anything of it runs (docs/images.md).

The machine that builds has the scanner; the image gets nothing of it. The scan sees the tree for reading alone, in namespaces of
its own: neither network nor processes of this machine. Tests of what runs, and of the mounts that the scan itself makes, are left
out, so that the machine that builds has little part in the score.
"""

from __future__ import annotations

import time
from pathlib import Path

from saw.attest.image_record import BASELINE_REPORT, Baseline
from saw.baseline.report import Report, read_report
from saw.image.disk import ImageError, digest_of, run
from saw.image.machine import BOUND

PARTS = (
    Path("/usr/sbin/lynis"),
    Path("/usr/share/lynis/include"),
    Path("/usr/share/lynis/db"),
    Path("/etc/lynis/default.prf"),
)
"""Where Debian's package has the scanner."""
LEFT_OUT = (
    "PKGS-7392", "KRNL-5677", "KRNL-5788", "KRNL-5820", "KRNL-5830", "KRNL-6000", "FILE-6394", "FILE-6430",
    "FIRE-4508", "FIRE-4512", "FIRE-4590", "LOGG-2130", "LOGG-2138", "TIME-3104", "NAME-4028", "NAME-4404",
    "FILE-6310", "FILE-6344", "FILE-6362", "FILE-6374",
)  # fmt: skip
"""Tests of what no tree has: lists of packages that would be fetched, processor and running kernel with its modules, settings and
packet filter, services that run, a machine's name, and mounts (those of the scan are not the image's)."""
PATIENCE_S = 900
"""For one scan, seconds."""
_SCRIPT = """
tree=$1; out=$2; skipped=$3; shift 3
mount --make-rprivate /
mount --bind "$tree" "$tree"
mount -o remount,bind,ro "$tree"
mount -t proc -o ro proc "$tree/proc"
mount -t tmpfs -o mode=0755 tmpfs "$tree/run"
mount -t tmpfs -o mode=1777 tmpfs "$tree/tmp"
mount -t tmpfs -o mode=0755 tmpfs "$tree/dev"
for device in null zero urandom tty; do : > "$tree/dev/$device"; mount --bind "/dev/$device" "$tree/dev/$device"; done
hostname image
work=/run/scan
mkdir -m 0700 "$tree$work" "$tree$work/plugins"
cp -R "$@" "$tree$work/"
chown -R 0:0 "$tree$work"
for test in $skipped; do echo "skip-test=$test"; done >> "$tree$work/default.prf"
cd /
chroot "$tree" env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/run/scan LC_ALL=C.UTF-8 TZ=UTC sh -c '
  cd "$1" && sh ./lynis audit system --quick --quiet --no-colors --profile "$1/default.prf" --plugindir "$1/plugins" \
    --report-file "$1/report.dat" --log-file "$1/log" </dev/null >"$1/out" 2>&1 || true
  grep -q "^finish=true" "$1/report.dat" || { tail -n 20 "$1/out"; exit 1; } >&2' sh "$work"
cp "$tree$work/report.dat" "$out"
"""


def refuse_without_scanner() -> None:
    """Raise :class:`ImageError` where this machine has no scanner: a build would notice only at its end."""
    missing = [str(part) for part in PARTS if not part.exists()]
    if missing:
        raise ImageError(
            f"the scanner that scores an image's hardening is missing here: {missing[0]}",
            cure="install it on the machine that builds: apt-get install lynis",
        )


def score_tree(root: Path, folder: Path) -> dict[str, str]:
    """Scan the tree ``root`` and leave the report in ``folder``; return its name with its SHA-256 (hex). Needs root.

    Raises :class:`ImageError` when the scan does not end, and ReportError for a report that cannot be relied on.
    """
    target = folder / BASELINE_REPORT
    begun = time.monotonic()
    try:
        run(
            *BOUND, "--net", "--uts", "--ipc", "timeout", str(PATIENCE_S), "sh", "-ec", _SCRIPT, "sh", str(root), str(target),
            " ".join(LEFT_OUT), *map(str, PARTS),
        )  # fmt: skip
    except ImageError as error:
        if time.monotonic() - begun >= PATIENCE_S:
            raise ImageError(
                f"the scan that scores the image's hardening was ended after {PATIENCE_S} s",
                cure="build again while this machine does less",
            ) from error
        raise ImageError(
            f"the scan that scores the image's hardening failed: {error.message}",
            cure="mend what it names, then build again",
        ) from error
    read_report(target)
    return {BASELINE_REPORT: digest_of(target)}


def scored(report: Report) -> Baseline:
    """Return what a release record states of ``report``."""
    return Baseline(report.scanner, report.version, report.index, report.tests)
