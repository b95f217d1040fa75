"""How long somebody waits for the first byte through the bastion, and how fast a live session ends, against a bare sshd (root).

Real broker, bastion, recorder and SSH servers on loopback. *First byte*: from the start of OpenSSH's client, which has its
certificate already, to what the command prints; the baseline is the same client at the workspace's own server. *Drop*: to the end
of the client; the baseline is a connection whose server is killed (signal 9) by what runs in it. It begins with the operator's
call, with the provider's word that the person signed out, with the call on which the provider is asked whether the person still
has a role, or at the time at which the session had lasted as long as it may. The provider is a real one.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from time import perf_counter

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests" / "integration"
sys.path[:0] = [str(Path(__file__).parent), str(TESTS / "sessions"), str(TESTS / "broker")]

from broker_rig import Lab  # noqa: E402 - the rigs lie with the tests
from msgspec import structs  # noqa: E402
from results import Goal, Result, quantile, result  # noqa: E402 - the modules beside this one
from session_rig import RULES, Bastion, Terminal, make_key, running  # noqa: E402
from sign_in_rig import certify, sign_in  # noqa: E402
from sso_rig import SsoLab, logout_token, sso_lab  # noqa: E402

from saw.broker.clock import iso, parse_iso  # noqa: E402
from saw.broker.signed_in import load  # noqa: E402
from saw.identity.ssh import SshAuthority  # noqa: E402

DROP = Goal("value", "most", 2.0)
LONGEST_S = 10
"""How long a session may last where it shall end by that; less is refused."""
NUMBER = 1
"""Of the rig's workspace."""


def first_byte(line: list[str]) -> float:
    """Return seconds from the client's start to the first byte that its command prints."""
    begun = perf_counter()
    with subprocess.Popen(line, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as client:
        assert client.stdout is not None
        first = client.stdout.read(1)
        took = perf_counter() - begun
        client.stdout.read()
    if first != b"x":
        raise RuntimeError("the command printed nothing")
    return took


def direct(bastion: Bastion, folder: Path, *more: str) -> list[str]:
    """Return the client's command line to the workspace's server itself, with a certificate as a recorder gets one."""
    folder.mkdir(exist_ok=True)
    if not (folder / "key").exists():
        make_key(folder / "key")
        authority = SshAuthority.load(bastion.lab.config.keys / "ssh")
        public = (folder / "key.pub").read_text()
        issued = authority.issue_user(public, "ws-a", "bench", datetime.now(UTC), 300)
        (folder / "key-cert.pub").write_text(issued + "\n")
        (folder / "known_hosts").write_text(f"@cert-authority * {authority.host_ca}\n")
    options = bastion.options(folder)
    options[options.index("HostKeyAlias=saw-bastion")] = "HostKeyAlias=ws-a"
    return ["ssh", *options, "-p", str(bastion.base + NUMBER), *more, "root@127.0.0.1"]


def live(line: list[str]) -> Terminal:
    """Return a session that has shown that it works."""
    client = Terminal(line)
    client.type("stty -echo; echo live-$((40+2))\n")
    client.until("live-42")
    return client


def dropped(client: Terminal, drop: Callable[[], object]) -> float:
    """Return seconds from ``drop`` to the end of the client."""
    begun = perf_counter()
    drop()
    client.ends()
    return perf_counter() - begun


@contextmanager
def served(longest_s: int = RULES.max_duration_s) -> Iterator[Bastion]:
    """The bastion of a broker whose sessions last at most ``longest_s``."""
    directory = Path(tempfile.mkdtemp(prefix="saw-bench-"))
    lab = Lab(directory, sessions=structs.replace(RULES, max_duration_s=longest_s))
    try:
        lab.start()
        with running(lab, directory) as bastion:
            yield bastion
    finally:
        lab.stop()
        shutil.rmtree(directory)


def ended_as(bastion: Bastion, session: str, reason: str) -> None:
    """Wait for the report of the end; one for another reason is no sample of this one."""
    if (said := bastion.closed(session)["reason"]) != reason:
        raise RuntimeError(f"{session} ended as {said}, not as {reason}")


def operated(count: int) -> tuple[list[float], ...]:
    """Return seconds to the first byte at the workspace itself and through the bastion, of the plain drop, of the operator's."""
    bare, through, cut, ended = [], [], [], []
    with served() as bastion:
        for number in range(count):
            plain = direct(bastion, bastion.directory / "direct")
            bare.append(first_byte([*plain, "echo x"]))
            through.append(first_byte(bastion.line(bastion.certify()[0], "echo x")))
            client = live([*plain[:-1], "-tt", plain[-1]])
            # The shell's parent is the server's process of this connection.
            cut.append(dropped(client, partial(client.type, "kill -9 $PPID\n")))
            folder, session = bastion.certify()
            client = live(bastion.line(folder, extra=("-tt",)))
            asked = "POST", f"/v1/sessions/{session}/end", {"reason": f"benchmark {number}"}
            with bastion.lab.operator.session() as operator:
                ended.append(dropped(client, partial(operator.request, *asked)))
            ended_as(bastion, session, "ended_by_operator")
    return bare, through, cut, ended


def disentitled(count: int) -> tuple[list[float], list[float]]:
    """Return seconds from the provider's word that somebody signed out, and from the question that finds no role any more."""
    logged_out, roleless = [], []
    directory = Path(tempfile.mkdtemp(prefix="saw-bench-"))
    with sso_lab(directory, sessions=RULES) as lab, running(lab, directory) as bastion, lab.browser() as provider:
        for number in range(2 * count):
            home = directory / f"home{number}"
            person = sign_in(lab, home, "u-ada")
            client = live(bastion.line(certify(bastion, person, home / "kept"), extra=("-tt",)))
            session = str(lab.operator.request("GET", "/v1/sessions?live=1")["sessions"][0]["id"])
            if number % 2:
                said = {"logout_token": logout_token(lab, "u-ada")}
                logged_out.append(dropped(client, partial(provider.http.post, "/logout/backchannel", data=said)))
                ended_as(bastion, session, "sign_in_ended")
            else:
                roleless.append(asked_again(lab, bastion, client, home))
                ended_as(bastion, session, "not_entitled")
    return logged_out, roleless


def asked_again(lab: SsoLab, bastion: Bastion, client: Terminal, home: Path) -> float:
    """Take the role of who is signed in below ``home``, and return seconds from the call on which the provider is asked again."""
    bearer = {"authorization": f"Bearer {load(home / 'saw/session.json').token}"}
    lab.provider.change("u-ada", groups=["auditors"])
    bastion.sql("UPDATE sso_sessions SET checked_at = ?", iso(datetime.now(UTC) - timedelta(hours=1)))
    try:
        with lab.browser() as browser:
            return dropped(client, lambda: browser.http.get("/v1/sso/whoami", headers=bearer).raise_for_status())
    finally:
        lab.provider.change("u-ada", groups=["staff", "approvers", "maintainers"])


def expired(count: int) -> list[float]:
    """Return seconds from the time at which a session had to end to the end of its client."""
    taken = []
    with served(LONGEST_S) as bastion:
        for _ in range(count):
            folder, session = bastion.certify()
            client = live(bastion.line(folder, extra=("-tt",)))
            client.ends()
            over = datetime.now(UTC)
            ended_as(bastion, session, "max_duration")
            ends = parse_iso(bastion.show(session)["started_at"]) + timedelta(seconds=LONGEST_S)
            taken.append((over - ends).total_seconds())
    return taken


def measure(count: int) -> list[Result]:
    """Measure all of it, ``count`` samples each."""
    bare, through, cut, ended = operated(count)
    logged_out, roleless = disentitled(count)
    drops = {
        "session_drop": (ended, "live sessions, from the operator's call"),
        "session_drop_logged_out": (logged_out, "live sessions, from the provider's word that the person signed out"),
        "session_drop_role_lost": (roleless, "live sessions, from the call on which the provider is asked again"),
        "session_drop_expired": (expired(count), f"live sessions, from the {LONGEST_S} s that they may last"),
    }
    shares = ((0.5, None), (0.99, DROP))
    return [
        *(
            result(
                f"first_byte_through_bastion_p{share * 100:.0f}", quantile(through, share), "s",
                baseline=quantile(bare, share), note=f"{count} connections; baseline: the workspace's sshd itself",
            )
            for share, _ in shares
        ),
        *(
            result(
                f"{name}_p{share * 100:.0f}", quantile(taken, share), "s", baseline=quantile(cut, share), goal=goal,
                note=f"{count} {what}; baseline: a plain connection whose sshd is killed",
            )
            for name, (taken, what) in drops.items()
            for share, goal in shares
        ),
    ]  # fmt: skip
