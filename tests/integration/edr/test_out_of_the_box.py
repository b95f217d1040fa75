"""The six detections that are promised, each from what an attacker does to a finding that left the host, within a stated time.

The time is BOUND_S (docs/edr.md, "Within which time"). What each took is noted in the results of the run.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from edr_rig import BOUND_S, EICAR, Host, until
from test_watcher import reverse_shell

pytestmark = pytest.mark.control("P0-03")


def left(host: Host, kind: str, subject: str) -> bool:
    """Whether a finding is in the host's log, which is its way out: an RFC 5424 line with the kind and the event."""
    return any(f'kind="{kind}"' in line and subject in line for line in host.log.lines())


def write(path: Path, text: bytes, mode: int = 0o644) -> None:
    path.write_bytes(text)
    path.chmod(mode)


#: Kind, what is done below the host's tree, and a part of what the finding is about.
DEEDS: tuple[tuple[str, Callable[[Path], Any], str], ...] = (
    ("malware", lambda root: write(root / "home/ann/e.com", EICAR), "/home/ann/e.com"),
    ("system_file_changed", lambda root: shutil.copyfile("/bin/false", root / "usr/bin/tool"), "/usr/bin/tool"),
    ("setuid_file", lambda root: write(root / "tmp/door", b"#!", 0o4755), "/tmp/door"),
    ("persistence", lambda root: write(root / "etc/cron.d/door", b"* * * * * root true\n"), "/etc/cron.d/door"),
    ("tampering", lambda root: write(root / "etc/audit/rules.d/saw.rules", b"-D\n"), "/etc/audit/rules.d/saw.rules"),
)


@pytest.mark.thorough
@pytest.mark.parametrize(("kind", "deed", "subject"), DEEDS, ids=[kind for kind, _, _ in DEEDS])
def test_what_is_done_to_files_leaves_the_host(
    host: Host, kind: str, deed: Callable[[Path], Any], subject: str, record_property: Callable[[str, object], None]
) -> None:
    host.saw("integrity", "--init")
    assert host.saw("scan").returncode == 0
    with host.watching():
        assert not left(host, kind, subject)
        began = time.monotonic()
        deed(host.root)
        if kind in {"malware", "system_file_changed"}:
            assert host.saw("scan").returncode == 0
        until(lambda: left(host, kind, subject), f"{kind} outside the host")
        record_property("seconds", round(time.monotonic() - began, 1))
    others = {one for one, _, _ in DEEDS if one != kind}
    assert not [one for one in others if host.found(one)], "and nothing else is told of it"


def test_a_reverse_shell_leaves_the_host(host: Host, record_property: Callable[[str, object], None]) -> None:
    with host.watching():
        began = time.monotonic()
        with reverse_shell() as (pid, _):  # others of this machine may have shells of their own
            until(lambda: left(host, "reverse_shell", f'"pid":{pid}'), "the reverse shell outside the host")
        record_property("seconds", round(time.monotonic() - began, 1))


def test_the_page_states_the_time() -> None:
    page = (Path(__file__).resolve().parents[3] / "docs/edr.md").read_text(encoding="utf-8")
    assert f"within {BOUND_S:.0f} s" in page


def test_an_alert_of_another_engine_leaves_the_host(host: Host, tmp_path: Path) -> None:
    alerts = tmp_path / "alerts.json"
    host.configure(
        provider="falco", vendor={"service": "falco.service", "health": ["true"]}, malware=None, integrity=None,
        alerts={"format": "falco", "file": str(alerts)}, setuid_roots=[], persistence=[],
    )  # fmt: skip
    alert = {"rule": "Terminal shell in container", "priority": "Notice", "time": "2026-11-30T08:00:00Z"}
    with host.watching():
        alerts.write_text(
            json.dumps({**alert, "output_fields": {"proc.exepath": "/bin/sh", "proc.cmdline": "sh -c secret"}}) + "\n"
        )
        until(lambda: left(host, "engine_alert", "/bin/sh"), "the alert outside the host")
    assert not any("sh -c secret" in line for line in host.log.lines())
    with host.watching():
        host.looked_again()
    assert host.subjects("engine_alert") == ["/bin/sh"], "a watcher that starts again tells nothing twice"
