"""How long somebody waits for the first byte through the bastion, and how fast a live session ends, against a bare sshd (root).

Real broker, bastion, recorder and SSH servers on loopback. *First byte*: from the start of OpenSSH's client, which has its
certificate already, to what the command prints; the baseline is the same client at the workspace's own server. *Drop*: from the
operator's call to the end of the client; the baseline is a connection whose server is killed (signal 9) by what runs in it.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests" / "integration"
sys.path[:0] = [str(Path(__file__).parent), str(TESTS / "sessions"), str(TESTS / "broker")]

from broker_rig import Lab  # noqa: E402 - the rigs lie with the tests
from results import Goal, Result, quantile, result  # noqa: E402 - the modules beside this one
from session_rig import RULES, Bastion, Terminal, make_key, running  # noqa: E402

from saw.identity.ssh import SshAuthority  # noqa: E402

DROP = Goal("value", "most", 2.0)
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


def measure(count: int) -> list[Result]:
    """Measure both, ``count`` samples each."""
    directory = Path(tempfile.mkdtemp(prefix="saw-bench-"))
    lab = Lab(directory, sessions=RULES)
    bare, through, ended, cut = [], [], [], []
    try:
        lab.start()
        with running(lab, directory) as bastion:
            for number in range(count):
                plain = direct(bastion, directory / "direct")
                bare.append(first_byte([*plain, "echo x"]))
                through.append(first_byte(bastion.line(bastion.certify()[0], "echo x")))
                client = live([*plain[:-1], "-tt", plain[-1]])
                # The shell's parent is the server's process of this connection.
                cut.append(dropped(client, lambda one=client: one.type("kill -9 $PPID\n")))  # type: ignore[misc]
                folder, session = bastion.certify()
                client = live(bastion.line(folder, extra=("-tt",)))
                path = f"/v1/sessions/{session}/end"
                with lab.operator.session() as operator:
                    ended.append(
                        dropped(client, lambda: operator.request("POST", path, {"reason": f"benchmark {number}"}))  # noqa: B023
                    )
                bastion.closed(session)
    finally:
        lab.stop()
        shutil.rmtree(directory)
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
                f"session_drop_p{share * 100:.0f}", quantile(ended, share), "s", baseline=quantile(cut, share), goal=goal,
                note=f"{count} live sessions; baseline: a plain connection whose sshd is killed",
            )
            for share, goal in shares
        ),
    ]  # fmt: skip
