"""Which package set the next image is made of: asked of the archive, kept from before, or named by somebody.

A choice is made by ``make image`` (FRESH=1, REUSE=1, PACKAGES=FILE) or the environment variables below. ``make image`` asks by
default, and goes on with what is known where the archive is away; ``make workspace`` does not ask (docs/decisions/0059).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec

from saw import jsontext
from saw.errors import ConfigError
from saw.files import write_atomic
from saw.image.base import ask_base, base_kind, base_path, base_tar, known_bases
from saw.image.base_os import BaseOs
from saw.image.disk import ImageError
from saw.image.packages import IndexAway, IndexOlder, PackageSet, compare, read_set, refuse_older, words
from saw.image.variant import CPU, Variant

VARIABLE = "SAW_IMAGE_PACKAGES"
"""Environment variable: one of the modes, or the path of a package set."""
OLDER = "SAW_IMAGE_OLDER"
"""Environment variable: 1 takes packages that are older than those of the newest image."""
MODES = ("ask", "fresh", "reuse")
QUICK_S = 20.0
"""Longest time that ``make workspace`` waits for the archive, once a day."""


@dataclass(frozen=True)
class Choice:
    """``ask``: newer packages are taken where the archive answers; ``fresh``: it has to answer; ``reuse``: it is not asked.

    ``pinned`` names a package set instead. ``older`` lets a package be older than it is in the newest image.
    """

    mode: str = "ask"
    pinned: Path | None = None
    older: bool = False


def chosen(default: str = "ask", environment: Mapping[str, str] | None = None) -> Choice:
    """Return what the environment chooses; raises :class:`ConfigError`."""
    values = os.environ if environment is None else environment
    value, older = values.get(VARIABLE) or default, values.get(OLDER, "")
    if older not in {"", "0", "1"}:
        raise ConfigError(f"{OLDER} is {older!r}", cure="set it to 1, or leave it out")
    if value in MODES:
        return Choice(value, older=older == "1")
    if "/" not in value:
        raise ConfigError(
            f"packages of an image are not chosen by {value!r}",
            cure=f"take one of {', '.join(MODES)}, or the path of an image's packages.json",
        )
    return Choice("reuse", Path(value).absolute(), older == "1")


class Asked(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The last time that the archive was asked: when (RFC 3339), its answer or the last one before, and why there was none."""

    tried: str
    packages: PackageSet | None = None
    failed: str = ""


@dataclass(frozen=True)
class Base:
    """What a base tree is made of, and the cache where its tars lie."""

    listing: Path
    cache: Path
    system: BaseOs
    variant: Variant = CPU
    more: Path | None = None

    @property
    def memory(self) -> Path:
        """File with the last answer of the archive."""
        return self.cache / f"{base_kind(self.listing, self.system, self.variant, self.more)}asked.json"

    def asked(self) -> Asked | None:
        """Return the last time that the archive was asked, None where that is not known."""
        try:
            return jsontext.decode(self.memory.read_bytes(), kind=Asked)
        except (OSError, msgspec.DecodeError):
            return None

    def ask(self, **limits: float) -> PackageSet:
        """Ask the archive, and remember when and what; raises :class:`IndexAway`."""
        self.cache.mkdir(parents=True, exist_ok=True)
        try:
            found = ask_base(self.listing, self.cache, self.system, self.variant, self.more, **limits)
        except IndexAway as error:
            before = self.asked()
            self._remember(Asked(_now(), before.packages if before else None, error.message))
            raise
        self._remember(Asked(found.asked, found))
        return found

    def known(self) -> list[PackageSet]:
        """Return the package sets of the finished tars, the newest first."""
        return known_bases(self.listing, self.cache, self.system, self.variant, self.more)

    def there(self, packages: PackageSet) -> bool:
        """Whether the tar with these packages is there."""
        return base_path(self.listing, self.cache, self.system, packages, self.variant, more=self.more).exists()

    def tar(self, packages: PackageSet) -> Path:
        """Return the tar with these packages, made now where it is not there."""
        return base_tar(self.listing, self.cache, self.system, packages, self.variant, more=self.more)

    def _remember(self, asked: Asked) -> None:
        write_atomic(self.memory, msgspec.json.encode(asked))


def settle(
    base: Base, choice: Choice, newest: PackageSet | None = None, matching: PackageSet | None = None
) -> tuple[PackageSet, str]:
    """Return the package set to take, and a note on it in words; raises :class:`ImageError`.

    ``newest`` is that of the newest image, and ``matching`` that of an image which is there for the present sources.
    """
    if choice.pinned:
        found = read_set(choice.pinned)
        if found.suite != base.system.suite:
            raise ImageError(
                f"{choice.pinned} is of {found.suite}, the image of {base.system.suite}",
                cure="name another package set",
            )
        return found, f"pinned to {choice.pinned}, {found.age(_moment())}"
    held = _held(base, newest, matching)
    if choice.mode == "reuse" and held:
        return held, f"the archive was not asked: {held.age(_moment())}"
    try:
        found = base.ask()
    except IndexAway as error:
        if choice.mode == "fresh" or held is None:
            raise
        return held, f"the archive is away, {held.age(_moment())} are kept: {error.message}"
    changes = compare(newest, found) if newest else []
    if not choice.older:
        try:
            refuse_older(changes)
        except IndexOlder as error:
            if choice.mode == "fresh" or held is None:
                raise
            return held, f"{held.age(_moment())} are kept: {error}"
    return found, f"{found.age(_moment())}, {words(changes)}" if newest else found.age(_moment())


def _held(base: Base, newest: PackageSet | None, matching: PackageSet | None) -> PackageSet | None:
    """Return the set that needs no archive: that of an image which is there, else one whose tar is there."""
    if matching:
        return matching
    candidates: Iterable[PackageSet] = [*([newest] if newest else []), *base.known()]
    return next((one for one in candidates if base.there(one)), None)


def news(base: Base, have: PackageSet | None, say: Callable[[str], None], every: timedelta = timedelta(days=1)) -> None:
    """Say what an image with ``have`` lacks. The archive is asked when it was not for ``every``, and for seconds only."""
    if have is None:
        say("the packages of this image are of an unknown day; `make image` builds a newer one")
        return
    last = base.asked()
    if last is None or _moment() - datetime.fromisoformat(last.tried) >= every:
        try:
            base.ask(patience=QUICK_S)
        except ImageError as error:
            say(f"the archive cannot be asked what is newer: {error.message}")
        last = base.asked()
    age = have.age(_moment())
    changes = compare(have, last.packages) if last and last.packages else []
    waiting = [one for one in changes if one.new and not one.older]
    if not waiting:
        say(f"{age}; none newer is known" + (f" (asked {last.packages.asked[:10]})" if last and last.packages else ""))
    elif any(one.security for one in waiting):
        say(f"SECURITY UPDATES wait for a newer image; {age}; {words(changes)}; build one: make image")
    else:
        say(f"{age}; {words(changes)}; build a newer image: make image")


def _moment() -> datetime:
    return datetime.now(UTC)


def _now() -> str:
    return _moment().isoformat(timespec="seconds")


__all__ = ["MODES", "OLDER", "VARIABLE", "Asked", "Base", "Choice", "chosen", "news", "settle"]
