"""The workspace's side of the TUF repository: refresh, fetch, and errors that say what an attacker (or a fault) did.

The work is python-tuf's ``Updater``; this module turns exceptions into codes. How it downloads is :mod:`saw.policy.tuf_fetcher`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from securesystemslib.exceptions import UnverifiedSignatureError
from tuf.api import exceptions
from tuf.ngclient import Updater, UpdaterConfig  # type: ignore[attr-defined]
from tuf.ngclient.fetcher import FetcherInterface

from saw.policy.bundle import MAX_BUNDLE
from saw.policy.errors import RepositoryError
from saw.policy.tuf_metadata import check_root, check_successor


@contextmanager
def _coded() -> Iterator[None]:
    """Turn the exceptions of python-tuf into :class:`RepositoryError` with a code."""
    try:
        yield
    except exceptions.ExpiredMetadataError as error:
        cure = "the repository is frozen or the clock is wrong; check the broker and the time"
        raise RepositoryError("freeze", f"the repository's metadata is too old: {error}", cure=cure) from error
    except exceptions.BadVersionNumberError as error:
        cure = "somebody serves an old state; restore the broker's repository"
        raise RepositoryError("rollback", f"the repository went backwards: {error}", cure=cure) from error
    except (exceptions.UnsignedMetadataError, UnverifiedSignatureError) as error:
        cure = "the trusted officers did not sign this; find out who did"
        raise RepositoryError("threshold", f"the metadata lacks good signatures: {error}", cure=cure) from error
    except exceptions.LengthOrHashMismatchError as error:
        cure = "the repository is inconsistent or a file was changed"
        raise RepositoryError("mix_and_match", f"a file is not the one that was signed: {error}", cure=cure) from error
    except exceptions.DownloadLengthMismatchError as error:
        raise RepositoryError("malformed", f"the answer is too long: {error}", cure="check the broker") from error
    except exceptions.DownloadError as error:
        cure = "check the link to the broker"
        raise RepositoryError("unreachable", f"the repository cannot be reached: {error}", cure=cure) from error
    except (exceptions.RepositoryError, ValueError, KeyError) as error:
        raise RepositoryError("malformed", f"the metadata cannot be used: {error}", cure="check the broker") from error


def refresh(
    metadata_dir: Path | str, targets_dir: Path | str, base_url: str, root: bytes, fetcher: FetcherInterface
) -> Updater:
    """Return an ``Updater`` whose metadata is verified, fresh, and not older than what ``metadata_dir`` remembers.

    ``base_url`` is the URL below which ``metadata/`` and ``targets/`` lie; ``root`` the trusted root. Raises
    :class:`RepositoryError` with code ``freeze``, ``rollback``, ``threshold``, ``mix_and_match``, ``unreachable`` or
    ``malformed``.
    """
    for directory in (metadata_dir, targets_dir):
        Path(directory).mkdir(parents=True, exist_ok=True)
    base = base_url.rstrip("/")
    with _coded():
        updater = Updater(
            metadata_dir=str(metadata_dir),
            metadata_base_url=f"{base}/metadata/",
            target_dir=str(targets_dir),
            target_base_url=f"{base}/targets/",
            fetcher=fetcher,
            config=UpdaterConfig(max_delegations=1),
            bootstrap=root,
        )
        updater.refresh()
    return updater


def kept_root(metadata_dir: Path, root: bytes) -> bytes:
    """Return the newest root kept in ``metadata_dir`` that ``root`` leads to, each signed by the officers of the one before.

    For a start without the repository: :func:`refresh` keeps the roots that it verified there, and who could write that folder
    once may have left others. Those are passed over. Raises :class:`RepositoryError` when ``root`` itself cannot be used.
    """
    trusted, version = root, check_root(root, None).version
    while True:
        try:
            following = (metadata_dir / "root_history" / f"{version + 1}.root.json").read_bytes()
            version = check_successor(trusted, following).version
        except (OSError, RepositoryError):
            return trusted
        trusted = following


def fetch_target(updater: Updater, path: str) -> tuple[bytes, dict[str, object]]:
    """Return the target's bytes, verified against the signed metadata, and its ``custom`` data.

    Raises :class:`RepositoryError`: ``not_found`` when the repository does not release ``path``, else as :func:`refresh`.
    """
    with _coded():
        info = updater.get_targetinfo(path)
        if info is None:
            raise RepositoryError("not_found", f"the repository does not release {path}", cure="publish it first")
        if info.length > MAX_BUNDLE:
            raise RepositoryError("malformed", f"{path} is larger than a bundle may be", cure="check the release")
        local = updater.find_cached_target(info) or updater.download_target(info)
        raw = Path(local).read_bytes()
        info.verify_length_and_hashes(raw)
    custom = info.custom
    return raw, dict(custom) if isinstance(custom, dict) else {}
