"""A real TPM in software (swtpm) for the attestation tests: private ports, private state, ended by its process id."""

from __future__ import annotations

import hashlib
import secrets
import shutil
import socket
import subprocess
from collections.abc import Iterable
from pathlib import Path
from time import monotonic

from attest_lab import NONCE, Event, boot_events, boot_pcrs, entries, event_log, release, spki

from saw.attest.messages import Evidence
from saw.attest.tpm import Tpm, TpmQuote
from saw.attest.verifier import Expectation, quote_binding
from saw.identity.x509 import new_key_and_csr


class SwTpm:
    """One swtpm. :meth:`reset` is a power cycle; :meth:`boot` extends the PCRs as a firmware would."""

    def __init__(self, directory: Path, template: Path) -> None:
        self.state = directory / "state"
        shutil.copytree(template, self.state)
        self.directory = directory
        self.process: subprocess.Popen[bytes] | None = None
        self.port = 0

    @property
    def tcti(self) -> str:
        return f"swtpm:host=127.0.0.1,port={self.port}"

    def start(self) -> None:
        deadline = monotonic() + 20
        while monotonic() < deadline:
            # tpm2-tss expects the control channel on the port after the data channel.
            self.port = 20000 + 2 * secrets.randbelow(6000)
            if not (free(self.port) and free(self.port + 1)):
                continue
            self.process = subprocess.Popen(
                [
                    *("swtpm", "socket", "--tpm2", "--tpmstate", f"dir={self.state}"),
                    *("--server", f"type=tcp,port={self.port},bindaddr=127.0.0.1"),
                    *("--ctrl", f"type=tcp,port={self.port + 1},bindaddr=127.0.0.1"),
                    *("--flags", "not-need-init,startup-clear"),
                ],
                stderr=subprocess.DEVNULL,
            )
            while self.process.poll() is None and monotonic() < deadline:
                try:
                    socket.create_connection(("127.0.0.1", self.port + 1), timeout=1).close()
                except OSError:
                    continue
                return
            self.stop()
        raise AssertionError("swtpm did not start")

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait(10)
            self.process = None

    def reset(self) -> None:
        self.stop()
        self.start()

    def lose_power(self) -> None:
        """End without TPM2_Shutdown and without a word, as when the VM is killed; then on again."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(10)
        self.process = None
        self.start()

    def boot(self, events: Iterable[Event]) -> None:
        extensions = [f"{pcr}:sha256={hashlib.sha256(data).hexdigest()}" for pcr, _, data in events]
        self.tool("tpm2_pcrextend", *extensions)

    def tool(self, *arguments: str) -> None:
        environment = {"PATH": "/usr/bin:/bin", "TPM2TOOLS_TCTI": self.tcti}
        subprocess.run(arguments, env=environment, check=True, capture_output=True, timeout=30)


def free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


class Machine:
    """A workspace's TPM after a boot, with its keys made: what an attestation needs."""

    def __init__(self, swtpm: SwTpm, directory: Path) -> None:
        self.swtpm = swtpm
        self.tpm = Tpm(directory, swtpm.tcti)
        self.events = boot_events()
        swtpm.boot(self.events)
        self.ek_pem, self.ak_pub = self.tpm.create_keys()

    def quote(self, nonce: bytes = NONCE) -> tuple[TpmQuote, str]:
        _, csr = new_key_and_csr("ws-demo")
        return self.tpm.quote(quote_binding(nonce, spki(csr))), csr.decode()

    def evidence(self, *digests: str, nonce: bytes = NONCE) -> Evidence:
        """Fresh evidence that claims ``digests`` as policy log."""
        quote, csr = self.quote(nonce)
        return Evidence(
            workspace_id="ws-demo",
            nonce=nonce,
            quote=quote.attest,
            signature=quote.signature,
            pcrs={str(pcr): value.hex() for pcr, value in quote.pcrs.items()},
            event_log=event_log(self.events),
            policy_log=entries(*digests),
            csr_pem=csr,
        )

    def expectation(self, *released: str, nonce: bytes = NONCE) -> Expectation:
        return Expectation(
            ak_pub=self.ak_pub,
            nonce=nonce,
            pcrs=release(boot_pcrs(boot_events())),
            released=set(released),
            current=released[-1],
        )
