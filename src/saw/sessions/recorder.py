"""The forced command of a bastion: opens the session at the broker, goes on to the workspace, records all that is shown.

Without a recorder there is no session: nothing reaches the person before it is on the disk, and whatever stops the recorder
ends the connection.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
import tty
from collections.abc import Iterator, Mapping
from fcntl import ioctl
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from saw.errors import SawError
from saw.files import write_private
from saw.identity.sealed import SealKey
from saw.mux import NotForwarding
from saw.sessions.config import BastionConfig
from saw.sessions.forwarding import ForwardLog
from saw.sessions.legs import leg_folder
from saw.sessions.link import BrokerLink
from saw.sessions.messages import CloseReason, Closing, Granted, Redeem
from saw.sessions.presented import Presented, read_presented
from saw.sessions.pump import Pump
from saw.sessions.recording import Chunk, Ending, Event, Header, Kind, RecordingFailed, Writer
from saw.sessions.report import leave_report, send_forgotten
from saw.sessions.sftp import NotSftp, SftpLog
from saw.sessions.ssh_client import ssh_line
from saw.sessions.watch import Watch

REFUSED = 77
"""Exit code of a session that was not opened (EX_NOPERM of sysexits.h)."""
_DROPPED = 255
_ENTERED = "entered"
_TRIES = 3
_WINDOW = struct.Struct("HHHH")
_GRACE_S = 1.0
_END_AFTER = """
import select, signal, sys
server = int(sys.argv[1])
gone = select.poll()
gone.register(server, select.POLLIN)
if not gone.poll(float(sys.argv[2]) * 1000):
    signal.pidfd_send_signal(server, signal.SIGTERM)
"""
"""Ends the process of a descriptor that does not end by itself in so many seconds; started beside a recorder that leaves."""
_NOTICE = {
    "max_duration": "it has lasted as long as a session may",
    "broker_unreachable": "the broker does not answer",
    "recording_failed": "it cannot be recorded any more",
    "recording_full": "its recording has reached the limit",
}


def record(config: BastionConfig, environ: Mapping[str, str]) -> int:
    """Run one session on the descriptors 0 to 2 and return its exit code. Raises :class:`SawError` when it is refused."""
    who = read_presented(environ)
    terminal = os.isatty(0) and not who.sftp
    path = config.recordings / f"{who.session_id}.sawrec"
    link = BrokerLink(config)
    with leg_folder(Path(config.runtime_dir)) as folder:
        # Before the certificate is used up: what cannot be recorded is not opened.
        descriptor = _reserve(path)
        try:
            granted = _open(link, who, folder, terminal=terminal)
        except SawError:
            if descriptor is not None:
                path.unlink()
            raise
        try:
            if descriptor is None:
                raise RecordingFailed(f"{path} exists", cure="tell the operator")
            key = SealKey(granted.recording_key, os.urandom)
            writer = Writer(descriptor, granted.session_id, key, config.max_bytes)
        except RecordingFailed:
            leave_report(config, granted.session_id, Closing("recording_failed"))
            raise
        send_forgotten(config)
        return _Session(config, who, granted, writer, terminal=terminal).run(link, folder, environ)


def _reserve(path: Path) -> int | None:
    """Return the new file for a recording; None when there is one, which means that this is no first login."""
    try:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except FileExistsError:
        return None  # the broker refuses it, and says so in the audit trail
    except OSError as error:
        raise RecordingFailed(f"the session cannot be recorded: {error.strerror}", cure="tell the operator") from error


def _open(link: BrokerLink, who: Presented, folder: Path, *, terminal: bool) -> Granted:
    """Redeem the session with a key of its own for the way on, and put what ssh needs into ``folder``."""
    key = Ed25519PrivateKey.generate()
    public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
    granted = link.redeem(
        Redeem(
            session_id=who.session_id,
            key_sha256=who.key_sha256,
            address=who.address,
            leg_key=public,
            command="sftp" if who.sftp else who.command,
            terminal=terminal,
        )
    )
    write_private(folder / "key", key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    write_private(folder / "key-cert.pub", granted.certificate + "\n")
    write_private(folder / "known_hosts", f"@cert-authority * {granted.host_ca}\n")
    return granted


class _Session:
    """One live session."""

    def __init__(
        self, config: BastionConfig, who: Presented, granted: Granted, writer: Writer, *, terminal: bool
    ) -> None:
        self._config = config
        self._who = who
        self._granted = granted
        self._writer = writer
        self._terminal = terminal
        self._began = time.monotonic()
        self._in, self._out = hashlib.sha256(), hashlib.sha256()
        self._bytes_in = self._bytes_out = 0
        self._forward = granted.forward_port
        self._log: SftpLog | ForwardLog | None = None
        """Where the content is not kept: what is noted of it."""
        if self._forward is not None:
            self._log = ForwardLog(self._forward)
        elif who.sftp:
            self._log = SftpLog()
        self._signalled: set[int] = set()
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def run(self, link: BrokerLink, folder: Path, environ: Mapping[str, str]) -> int:
        """Record until it ends; leave the report of the end to be sent; return the exit code."""
        code, reason, notice = _DROPPED, "failed", ""
        kept = termios.tcgetattr(0) if self._terminal else None
        try:
            with self._signals():
                self._begin(environ)
                watch = Watch(link, self._granted.session_id, self._granted.lease_s, self._wake_write, time.monotonic)
                watch.start()
                try:
                    code, reason, notice = self._through(watch, folder)
                finally:
                    watch.stop()
                self._end(reason, notice, code)
        except RecordingFailed as error:
            code, reason, notice = _DROPPED, "recording_failed", error.message
        finally:
            if kept is not None:
                with contextlib.suppress(termios.error):
                    termios.tcsetattr(0, termios.TCSANOW, kept)
        if reason not in {"closed", "client_gone"}:
            _tell(f"saw: the session has ended: {_NOTICE.get(reason, notice or reason)}")
        said = Closing(
            reason=_close_reason(reason),
            exit_code=code & 0xFF,
            bytes_in=self._bytes_in,
            bytes_out=self._bytes_out,
            chunks=self._writer.chunks,
            digest=self._writer.digest,
        )
        leave_report(self._config, self._granted.session_id, said)
        if reason not in {"closed", "client_gone"}:
            _drop()
        return code

    def _begin(self, environ: Mapping[str, str]) -> None:
        rows, columns = _window(0) if self._terminal else (24, 80)
        term = environ.get("TERM", "") if self._terminal else ""
        self._writer.write(
            Chunk(
                header=Header(
                    session=self._granted.session_id,
                    workspace=self._granted.workspace_id,
                    principal=self._granted.principal,
                    started=time.time(),
                    command=self._called(),
                    terminal=self._terminal,
                    columns=columns,
                    rows=rows,
                    term=term if term.isascii() and term.isprintable() else "",
                )
            )
        )

    def _called(self) -> str:
        """Return what the session is for, as its recording says."""
        if self._forward is not None:
            return f"forward {self._forward}"
        return "sftp" if self._who.sftp else self._who.command

    def _end(self, reason: str, notice: str, code: int) -> None:
        remark = f"{reason}: {notice}" if notice else reason
        remarks = [*(self._log.finish() if self._log is not None else []), remark]
        last = tuple(self._event("m", text.encode()) for text in remarks)
        self._writer.write(
            Chunk(
                events=last,
                ending=Ending(
                    reason, code, self._bytes_in, self._bytes_out, self._in.hexdigest(), self._out.hexdigest()
                ),
            )
        )

    def _through(self, watch: Watch, folder: Path) -> tuple[int, str, str]:
        """Go to the workspace and move bytes until something ends it; return exit code, reason and what it means.

        A way that broke before the login is tried again: nothing has run there, and nothing that was typed is lost.
        """
        entered, tries = folder / _ENTERED, 1
        while True:
            found = self._once(watch, folder)
            before_login = found[:2] == (_DROPPED, "closed") and not entered.exists() and not self._bytes_in
            if not before_login:
                return found
            if tries == _TRIES or not self._pause(watch):
                _tell("saw: the workspace's SSH server let nobody in; try again in a minute")
                return found
            tries += 1

    def _pause(self, watch: Watch) -> bool:
        """Wait a second; tell whether the session still counts then."""
        select.select([self._wake_read], [], [], 1.0)
        return not (watch.reason or self._signalled & {signal.SIGHUP, signal.SIGTERM})

    def _once(self, watch: Watch, folder: Path) -> tuple[int, str, str]:
        child, pumps, master = self._start(folder)
        exited = os.pidfd_open(child.pid)
        try:
            reason, notice = self._loop(watch, child, pumps, master, exited)
        finally:
            # A failed recorder must not leave the way open behind it.
            if child.poll() is None:
                child.kill()
            child.wait()
            os.close(exited)
        if reason == "closed":
            return (child.returncode if child.returncode >= 0 else _DROPPED), reason, notice
        return _DROPPED, reason, notice

    def _loop(
        self, watch: Watch, child: subprocess.Popen[bytes], pumps: list[Pump], master: int | None, exited: int
    ) -> tuple[str, str]:
        outputs = pumps[1:]
        while True:
            if watch.reason:
                return "ended", watch.reason
            left = min(self._began + self._granted.ends_in_s - time.monotonic(), watch.lease_left_s)
            if left <= 0:
                return ("broker_unreachable" if watch.lease_left_s <= 0 else "max_duration"), ""
            if self._writer.full:
                return "recording_full", ""
            if signal.SIGHUP in self._signalled or signal.SIGTERM in self._signalled:
                return "client_gone", ""
            if signal.SIGWINCH in self._signalled and master is not None:
                self._signalled.discard(signal.SIGWINCH)
                self._resize(master, child)
            if child.poll() is not None and all(pump.done for pump in outputs):
                return "closed", ""
            if any(pump.sink_gone for pump in outputs):
                return "client_gone", ""
            waited = select.poll()
            waited.register(self._wake_read, select.POLLIN)
            if child.returncode is None:
                waited.register(exited, select.POLLIN)
            watched = {1: 0}  # a client that is gone shows as an error of its output
            for pump in pumps:
                if (wanted := pump.interest()) is not None:
                    watched[wanted[0]] = watched.get(wanted[0], 0) | wanted[1]
            for descriptor, mask in watched.items():
                waited.register(descriptor, mask)
            found = dict(waited.poll(min(left, 3600.0) * 1000))
            if found.pop(self._wake_read, 0):
                with contextlib.suppress(BlockingIOError):
                    os.read(self._wake_read, 4096)
            if found.get(1, 0) & (select.POLLERR | select.POLLHUP):
                return "client_gone", ""
            for pump in pumps:
                if (wanted := pump.interest()) is not None and wanted[0] in found:
                    try:
                        pump.step()
                    except (NotSftp, NotForwarding) as error:
                        return error.code, error.message

    def _start(self, folder: Path) -> tuple[subprocess.Popen[bytes], list[Pump], int | None]:
        """Start ssh to the workspace; its death comes with ours."""
        command = ["sftp"] if self._who.sftp else [self._who.command] if self._who.command else []
        if self._forward is not None:
            command = [str(self._forward)]
        line = ssh_line(
            folder,
            self._granted.workspace_id,
            self._config.workspace_user if self._forward is None else self._config.forward_user,
            self._config.address(self._granted.number),
            command,
            terminal=self._terminal,
            subsystem=self._who.sftp,
            entered=folder / _ENTERED,
        )
        line = ["setpriv", "--pdeathsig", "KILL", "--", *line]
        environment = {name: os.environ[name] for name in ("PATH", "TERM", "HOME") if name in os.environ}
        if not self._terminal:
            child = subprocess.Popen(
                line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0, env=environment
            )
            assert child.stdin and child.stdout and child.stderr  # noqa: S101 - Popen was asked for pipes
            # The pump closes what goes in; the object must not close the number again.
            into = os.dup(child.stdin.fileno())
            child.stdin.close()
            pumps = [
                Pump(0, into, self._typed, closes=True),
                Pump(child.stdout.fileno(), 1, lambda piece: self._shown("o", piece)),
                Pump(child.stderr.fileno(), 2, lambda piece: self._shown("e", piece)),
            ]
            return child, pumps, None
        master, slave = pty.openpty()
        termios.tcsetattr(slave, termios.TCSANOW, termios.tcgetattr(0))
        tty.setraw(0, termios.TCSANOW)  # what was typed already stays
        rows, columns = _window(0)
        ioctl(slave, termios.TIOCSWINSZ, _WINDOW.pack(rows, columns, 0, 0))
        child = subprocess.Popen(line, stdin=slave, stdout=slave, stderr=slave, start_new_session=True, env=environment)
        os.close(slave)
        out = lambda piece: self._shown("o", piece)  # noqa: E731
        return child, [Pump(0, master, self._typed), Pump(master, 1, out)], master

    def _typed(self, piece: bytes) -> None:
        self._in.update(piece)
        self._bytes_in += len(piece)
        if self._log is not None:
            self._note(self._log.asked(piece))
        if self._config.record_input and self._forward is None:
            self._writer.write(Chunk(events=(self._event("i", piece),)))

    def _shown(self, kind: Kind, piece: bytes) -> None:
        self._out.update(piece)
        self._bytes_out += len(piece)
        if self._log is not None and kind == "o":
            self._note(self._log.answered(piece))
            return
        self._writer.write(Chunk(events=(self._event(kind, piece),)))

    def _note(self, remarks: list[str]) -> None:
        if remarks:
            self._writer.write(Chunk(events=tuple(self._event("m", remark.encode()) for remark in remarks)))

    def _resize(self, master: int, child: subprocess.Popen[bytes]) -> None:
        rows, columns = _window(0)
        ioctl(master, termios.TIOCSWINSZ, _WINDOW.pack(rows, columns, 0, 0))
        self._writer.write(Chunk(events=(self._event("r", f"{columns}x{rows}".encode()),)))
        child.send_signal(signal.SIGWINCH)

    def _event(self, kind: Kind, data: bytes) -> Event:
        return Event(round(time.monotonic() - self._began, 6), kind, data)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Note signals and wake the loop; the old handling comes back afterwards."""

        def note(number: int, _frame: object) -> None:
            self._signalled.add(number)
            with contextlib.suppress(OSError):
                os.write(self._wake_write, b"s")

        wanted = (signal.SIGHUP, signal.SIGTERM, signal.SIGWINCH)
        before = {number: signal.signal(number, note) for number in wanted}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, signal.SIG_IGN if number == signal.SIGHUP else handler)


def _window(descriptor: int) -> tuple[int, int]:
    rows, columns, _, _ = _WINDOW.unpack(ioctl(descriptor, termios.TIOCGWINSZ, bytes(_WINDOW.size)))
    return rows or 24, columns or 80


def _close_reason(reason: str) -> CloseReason:
    known: dict[str, CloseReason] = {
        "closed": "closed",
        "client_gone": "client_gone",
        "ended": "ended",
        "max_duration": "max_duration",
        "broker_unreachable": "broker_unreachable",
        "recording_failed": "recording_failed",
        "recording_full": "recording_full",
        "not_sftp": "not_sftp",
        "not_forwarding": "not_forwarding",
    }
    return known.get(reason, "failed")


def _tell(text: str) -> None:
    """Say why, if the client still listens; never wait for it."""
    with contextlib.suppress(OSError):
        os.set_blocking(2, False)
        os.write(2, f"\r\n{text}\r\n".encode())


def _drop() -> None:
    """End the connection itself, not only what runs in it: the process of sshd that serves it is our parent, and ours.

    It ends by itself once it has passed on what was told; a client that holds the connection open or does not read is given
    :data:`_GRACE_S`.
    """
    parent = os.getppid()
    with contextlib.suppress(OSError):
        name = Path(f"/proc/{parent}/comm").read_text("ascii").strip()
        if not name.startswith("sshd") or Path(f"/proc/{parent}").stat().st_uid != os.geteuid():
            return
        server = os.pidfd_open(parent)
        line = [sys.executable, "-I", "-S", "-c", _END_AFTER, str(server), str(_GRACE_S)]
        try:
            subprocess.Popen(
                line,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                pass_fds=[server],
            )
        except OSError:
            signal.pidfd_send_signal(server, signal.SIGTERM)
