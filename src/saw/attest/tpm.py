"""The workspace's side of the TPM: tpm2-tools run as subprocesses, as few as possible.

Each start of a tool costs a large part of a second in an emulated machine. So keys stay as saved contexts in a private
directory of the run file system (they lose their meaning at the next TPM reset, as that directory does), one tool makes
quote and PCR values together, and transient objects are flushed only when the TPM says that its memory is full, which a
kernel resource manager (``/dev/tpmrm0``) makes needless.
"""

from __future__ import annotations

import os
import secrets
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from saw.attest.policy_log import POLICY_PCR, measurement
from saw.attest.verifier import QUOTED_PCRS
from saw.errors import SawError
from saw.files import write_private

#: Default TCTI: the kernel's resource manager when it is there.
_DEVICES = ("/dev/tpmrm0", "/dev/tpm0")
_MEMORY_FULL = ("0x902", "0x903")
_AK_ATTRIBUTES = "fixedtpm|fixedparent|sensitivedataorigin|userwithauth|restricted|sign|noda"
_CREDENTIAL_MAGIC = bytes.fromhex("badcc0de00000001")


class TpmError(SawError):
    """A TPM command failed."""

    code = "tpm_failed"


class TpmQuote(msgspec.Struct, frozen=True):
    """A quote: TPMS_ATTEST, TPMT_SIGNATURE and the SHA-256 PCR values it covers."""

    attest: bytes
    signature: bytes
    pcrs: dict[int, bytes]


def run_tool(
    arguments: Sequence[str], environment: dict[str, str], directory: Path
) -> subprocess.CompletedProcess[str]:
    """Run one tpm2 tool with a bounded time (60 s: an emulated machine is slow)."""
    return subprocess.run(
        list(arguments), env=environment, cwd=directory, capture_output=True, text=True, check=False, timeout=60
    )


class Tpm:
    """One TPM, with the endorsement and attestation key contexts of this boot in ``directory`` (private, made if absent).

    ``tcti`` is a tpm2-tss TCTI such as ``device:/dev/tpmrm0`` or ``swtpm:host=127.0.0.1,port=2321``; by default the one of
    ``TPM2TOOLS_TCTI``, else the kernel's device.
    """

    def __init__(
        self,
        directory: Path | str,
        tcti: str | None = None,
        run: Callable[[Sequence[str], dict[str, str], Path], subprocess.CompletedProcess[str]] = run_tool,
    ) -> None:
        self.directory = Path(directory)
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self.directory.stat().st_mode & 0o077:
            raise TpmError(f"{self.directory} is open to group or others", cure=f"chmod 0700 {self.directory}")
        self._environment = {
            "PATH": os.environ.get("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"),
            "TPM2TOOLS_TCTI": tcti or os.environ.get("TPM2TOOLS_TCTI") or _default_tcti(),
            "TSS2_LOG": "all+ERROR",
        }
        self._runner = run

    def create_keys(self) -> tuple[bytes, bytes]:
        """Create the RSA endorsement key's context and a fresh attestation key.

        Returns the endorsement key as PEM and the attestation key as TPM2B_PUBLIC. The endorsement key is derived from
        the TPM's seed and so always the same; the attestation key, a primary key of the endorsement hierarchy whose
        template has a random unique field, is new. It has noDA: after an end without TPM2_Shutdown, as of a VM that is
        killed, a TPM counts each use of another key as a failed authorization (Part 1, dictionary attack protection)
        and locks itself after three.
        """
        ek_pem = self._create_ek()
        with self._workplace() as work:
            unique = Path(work) / "unique"
            unique.write_bytes(b"".join((32).to_bytes(2, "little") + secrets.token_bytes(32) for _ in ("x", "y")))
            self._tool(
                f"tpm2_createprimary -Q -C e -c ak.ctx -G ecc256:ecdsa-sha256:null -g sha256 -a {_AK_ATTRIBUTES} -f tss",
                ["-u", str(unique), "-o", f"{work}/ak.pub"],
            )
            ak_pub = _read(Path(work) / "ak.pub")
        write_private(self.directory / "ak.pub", ak_pub)
        return ek_pem, ak_pub

    def read_ek(self) -> bytes:
        """Return the RSA endorsement key as PEM."""
        return self._create_ek()

    def has_attestation_key(self) -> bool:
        """Tell whether this boot's attestation key context is there."""
        return all((self.directory / name).is_file() for name in ("ek.ctx", "ak.ctx", "ak.pub"))

    def forget_keys(self) -> None:
        """Drop the contexts, for example because the TPM was reset and refuses them."""
        for name in ("ek.ctx", "ak.ctx", "ak.pub"):
            (self.directory / name).unlink(missing_ok=True)

    def activate_credential(self, id_object: bytes, encrypted_secret: bytes) -> bytes:
        """Recover the secret of TPM2B_ID_OBJECT and TPM2B_ENCRYPTED_SECRET (TPM2_ActivateCredential)."""
        with self._workplace() as work:
            blob, secret, session = Path(work) / "credential", Path(work) / "secret", f"{work}/session.ctx"
            blob.write_bytes(_CREDENTIAL_MAGIC + id_object + encrypted_secret)
            self._tool("tpm2_startauthsession -Q --policy-session", ["-S", session])
            try:
                self._tool("tpm2_policysecret -Q -c e", ["-S", session])
                self._tool(
                    "tpm2_activatecredential -Q -c ak.ctx -C ek.ctx",
                    ["-i", str(blob), "-o", str(secret), "-P", f"session:{session}"],
                )
            finally:
                self._tool("tpm2_flushcontext -Q", [session], check=False)
            return _read(secret)

    def quote(self, extra_data: bytes) -> TpmQuote:
        """Quote PCRs 0–5, 7–9, 11 and 14 with the attestation key and ``extra_data`` (32 bytes)."""
        selection = "sha256:" + ",".join(str(pcr) for pcr in QUOTED_PCRS)
        with self._workplace() as work:
            self._tool(
                f"tpm2_quote -Q -c ak.ctx -l {selection} -q {extra_data.hex()} -g sha256 -f tss -F values",
                ["-m", f"{work}/quote", "-s", f"{work}/signature", "-o", f"{work}/pcrs"],
            )
            raw = _read(Path(work) / "pcrs")
            if len(raw) != 32 * len(QUOTED_PCRS):
                raise TpmError("the TPM gave another set of PCRs than asked for", cure="enable its SHA-256 bank")
            values = {pcr: raw[32 * index : 32 * (index + 1)] for index, pcr in enumerate(QUOTED_PCRS)}
            return TpmQuote(_read(Path(work) / "quote"), _read(Path(work) / "signature"), values)

    def extend_policy(self, policy_digest: str) -> None:
        """Extend PCR 14 of the SHA-256 bank by the measurement of ``policy_digest``."""
        self._tool(f"tpm2_pcrextend -Q {POLICY_PCR}:sha256={measurement(policy_digest).hex()}")

    def read_policy_pcr(self) -> bytes:
        """Return the 32 bytes of PCR 14."""
        with self._workplace() as work:
            self._tool(f"tpm2_pcrread -Q sha256:{POLICY_PCR}", ["-o", f"{work}/pcr"])
            value = _read(Path(work) / "pcr")
        if len(value) != 32:
            raise TpmError(f"the TPM has no SHA-256 PCR {POLICY_PCR}", cure="enable its SHA-256 bank")
        return value

    def _create_ek(self) -> bytes:
        with self._workplace() as work:
            pem = Path(work) / "ek.pem"
            self._tool("tpm2_createek -Q -G rsa -c ek.ctx -f pem", ["-u", str(pem)])
            return _read(pem)

    def _workplace(self) -> tempfile.TemporaryDirectory[str]:
        return tempfile.TemporaryDirectory(prefix=".work.", dir=self.directory)

    def _tool(self, command: str, paths: Sequence[str] = (), *, check: bool = True) -> None:
        arguments = [*command.split(), *paths]
        done = self._run(arguments)
        if done.returncode and any(code in done.stderr for code in _MEMORY_FULL):
            # Without a resource manager, objects and sessions of earlier commands stay loaded.
            self._run(["tpm2_flushcontext", "-t"])
            if "0x903" in done.stderr:
                self._run(["tpm2_flushcontext", "-l"])
                self._run(["tpm2_flushcontext", "-s"])
            done = self._run(arguments)
        if done.returncode and check:
            lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
            raise TpmError(
                f"{arguments[0]} failed: {(lines or ['no message'])[0][:300]}",
                cure="check that the TPM device is there and that tpm2-tools can reach it",
                details={"exit_code": done.returncode},
            )

    def _run(self, arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
        try:
            return self._runner(arguments, self._environment, self.directory)
        except FileNotFoundError as error:
            raise TpmError(f"{arguments[0]} is not installed", cure="install tpm2-tools") from error
        except subprocess.TimeoutExpired as error:
            raise TpmError(f"{arguments[0]} did not end in time", cure="check the TPM device") from error


def read_ek(tcti: str | None) -> str:
    """Return the RSA endorsement key (PEM) of the TPM behind ``tcti``; nothing stays behind. Raises :class:`TpmError`.

    Used once, from outside the workspace, when its virtual TPM is made.
    """
    with tempfile.TemporaryDirectory(prefix="saw-ek.") as directory:
        return Tpm(directory, tcti).read_ek().decode()


def _default_tcti() -> str:
    for device in _DEVICES:
        if Path(device).exists():
            return f"device:{device}"
    raise TpmError("there is no TPM device", cure="give the machine a TPM 2.0, or name a TCTI in the configuration")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise TpmError(
            f"the TPM tool wrote no {path.name}", cure="check the version of tpm2-tools (5.4 or newer)"
        ) from error
