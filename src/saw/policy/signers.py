"""Who signs: a key file, or a program that keeps the key to itself (a token, a TPM, an HSM, a signing service).

Both are a :class:`Signer`. Each signature is verified against the signer's public key before anything uses it, so a
broken or swapped device is noticed by the officer and not by the fleet.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Protocol

from securesystemslib.signer import Key, SecretsHandler, Signature, SSlibKey  # type: ignore[attr-defined]
from securesystemslib.signer import Signer as LibrarySigner  # type: ignore[attr-defined]

from saw.policy.errors import KeyFileError
from saw.policy.keys import PublicKey, key_id, load_private_key, parse_public_key, signature_holds

SIGNER_TIMEOUT_S = 120.0
"""How long a signing program may take (seconds): a person may have to touch a token or enter a PIN."""
_MAX_ANSWER = 16 * 1024
"""Longest public key or signature that is taken from a signing program (bytes)."""
_EXEC, _PKCS11 = "exec:", "pkcs11:"


class Signer(Protocol):
    """Something that signs; an ``Ed25519PrivateKey`` is one."""

    def public_key(self) -> PublicKey:
        """Return the public half."""
        ...

    def sign(self, data: bytes, /) -> bytes:
        """Return the signature over ``data``: 64 bytes for Ed25519, DER for ECDSA."""
        ...


class CommandSigner:
    """A program that signs: ``PROGRAM --public`` prints the PEM public key; ``PROGRAM`` reads bytes and prints a signature.

    Both must exit with 0 within ``timeout_s`` seconds. The bytes to sign come on standard input; no secret is ever given
    to the program, which asks for a PIN on its own terminal if it needs one.
    """

    def __init__(self, program: Path, *, timeout_s: float = SIGNER_TIMEOUT_S) -> None:
        if not program.is_absolute():
            raise KeyFileError(f"the signer {program} is not an absolute path", cure="write exec:/path/to/program")
        if not os.access(program, os.X_OK) or program.is_dir():
            raise KeyFileError(f"the signer {program} is not a program", cure="check the path and its mode")
        self._program = program
        self._timeout = timeout_s
        self._public = parse_public_key(self._run("--public"), f"of the signer {program}")

    def public_key(self) -> PublicKey:
        """Return the public key that the program named when it was first asked."""
        return self._public

    def sign(self, data: bytes, /) -> bytes:
        """Return the program's signature over ``data``; :func:`signature_of` verifies it."""
        return self._run(given=data)

    def _run(self, *arguments: str, given: bytes = b"") -> bytes:
        try:
            done = subprocess.run(
                [str(self._program), *arguments],
                input=given,
                stdout=subprocess.PIPE,
                timeout=self._timeout,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            reason = f"the signer {self._program} did not answer within {self._timeout:g} s"
            raise KeyFileError(reason, cure="check the token, its PIN and its driver, and sign again") from error
        except OSError as error:
            reason = f"the signer {self._program} cannot be run: {error.strerror}"
            raise KeyFileError(reason, cure="check that it is an executable program") from error
        if done.returncode != 0:
            reason = f"the signer {self._program} failed with exit code {done.returncode}"
            raise KeyFileError(reason, cure="see what it wrote to standard error")
        if not 0 < len(done.stdout) <= _MAX_ANSWER:
            reason = f"the signer {self._program} answered {len(done.stdout)} bytes"
            raise KeyFileError(reason, cure="it must print the PEM public key or the raw signature, nothing else")
        return done.stdout


def open_signer(text: str, passphrase: bytes | None = None, *, timeout_s: float = SIGNER_TIMEOUT_S) -> Signer:
    """Return the signer that ``--key`` names: a private key file or ``exec:/path/to/program``.

    ``passphrase`` belongs to a key file. Raises :class:`KeyFileError` with the reason.
    """
    if text.startswith(_EXEC):
        return CommandSigner(Path(text.removeprefix(_EXEC)), timeout_s=timeout_s)
    if text.startswith(_PKCS11):
        cure = "give exec:/path/to/program that calls pkcs11-tool; docs/policy-release.md has it"
        raise KeyFileError("PKCS#11 tokens are used through a signing program", cure=cure)
    return load_private_key(text, passphrase)


def signature_of(signer: Signer, data: bytes) -> bytes:
    """Return the signature of ``signer`` over ``data``, verified; raise :class:`KeyFileError` when it is not by its key."""
    signature = signer.sign(data)
    if not signature_holds(signer.public_key(), signature, data):
        reason = f"the signature by the key {key_id(signer.public_key())[:16]}… does not verify"
        cure = "check that the signer signs the bytes as they are (Ed25519, or ECDSA P-256 with SHA-256 in DER)"
        raise KeyFileError(reason, cure=cure)
    return signature


class TufSigner(LibrarySigner):
    """A :class:`Signer` as python-tuf and the DSSE envelope call it."""

    def __init__(self, signer: Signer) -> None:
        self._signer = signer
        self._key: SSlibKey = SSlibKey.from_crypto(signer.public_key())

    @property
    def public_key(self) -> Key:
        """Return the public key under its TUF key id."""
        return self._key

    def sign(self, payload: bytes) -> Signature:
        """Return the verified signature over ``payload``."""
        return Signature(self._key.keyid, signature_of(self._signer, payload).hex())

    @classmethod
    def from_priv_key_uri(
        cls,
        priv_key_uri: str,
        public_key: Key,  # noqa: ARG003 - the library's signature
        secrets_handler: SecretsHandler | None = None,  # noqa: ARG003 - the library's signature
    ) -> LibrarySigner:
        """Refuse: signers are opened by :func:`open_signer` alone."""
        raise KeyFileError(f"{priv_key_uri.partition(':')[0]} keys are not opened here", cure="use open_signer")
