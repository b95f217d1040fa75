"""What the provider said of sessions while the disk was full: kept in memory until there is room to write it down.

A refresh token may be used once. Whoever throws the answer away throws the session away, and with it the next kill.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

from saw.broker.clock import iso
from saw.broker.context import Caller
from saw.broker.errors import StorageFull
from saw.broker.people import Identity, Person, PersonRefused

MOST = 10_000
"""Most sessions of which something is kept; of others the provider is not asked until there is room."""


@dataclass(frozen=True)
class Word:
    """What the provider said at ``at``, asked by ``caller``, about the session whose secret has this ``digest``.

    ``lost`` is why it speaks for the session no more. Without that, ``who`` is whom it named, or ``refused`` why that is nobody;
    ``gone`` is why the person may not come in any more. ``over`` is what the database said of the person before: when it says
    something else, that came later. ``refresh`` is the next refresh token, encrypted.
    """

    digest: str
    person: str
    at: datetime
    caller: Caller
    over: Person | None = None
    lost: str = ""
    who: Identity | None = None
    refused: PersonRefused | None = None
    gone: str = ""
    refresh: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Held:
    """All words at one moment, by session and by person. Take it before the database is read: what is written down in between
    is in the database then."""

    words: Mapping[str, Word]
    people: Mapping[str, tuple[Word, ...]]

    def about(self, person: str) -> Word | None:
        """Return the newest word about ``person``, of two at one moment what was kept last, or None. It holds for all sessions
        of theirs."""
        found = [word for word in reversed(self.people.get(person, ())) if not word.lost]
        return max(found, key=lambda word: word.at, default=None)

    def ended(self, person: str) -> str:
        """Return until when sessions of ``person`` must have begun to be over; empty: none is."""
        return max((iso(word.at) for word in self.people.get(person, ()) if word.gone), default="")


class Unwritten:
    """The words of this broker; safe for several threads."""

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._changing = threading.Lock()
        self.held = Held({}, {})

    def require_room(self, digest: str) -> None:
        """Raise :class:`StorageFull` when a word about this session could not be kept."""
        words = self.held.words
        if digest not in words and len(words) >= self._most:
            raise StorageFull

    def keep(self, word: Word) -> None:
        """Keep ``word`` in place of the one before; a session that has ended stays so. Raises as :meth:`require_room`."""
        with self._changing:
            self.require_room(word.digest)
            before = self.held.words.get(word.digest)
            if before is None or not (before.lost or before.gone):
                self._set(before, word)

    def drop(self, word: Word) -> None:
        """Forget ``word``, which is written down or out of date; another one in its place stays."""
        with self._changing:
            if self.held.words.get(word.digest) is word:
                self._set(word, None)

    def _set(self, before: Word | None, after: Word | None) -> None:
        words, persons = dict(self.held.words), dict(self.held.people)
        if before is not None:
            del words[before.digest]
            persons[before.person] = tuple(word for word in persons[before.person] if word is not before)
            if not persons[before.person]:
                del persons[before.person]
        if after is not None:
            words[after.digest] = after
            persons[after.person] = (*persons.get(after.person, ()), after)
        self.held = Held(words, persons)
