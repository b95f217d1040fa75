"""JSON text into typed values, with one error for every text that is none.

``msgspec.json.decode`` tells of three things by three unrelated errors: a text that is no JSON or does not fit
(``msgspec.DecodeError``), bytes within a string that are no UTF-8 (``UnicodeDecodeError``, which holds all the bytes), and values
nested deeper than the interpreter goes (``RecursionError``). Who reads what others wrote catches the first; so all come as
that here.
"""

from __future__ import annotations

from typing import Any, TypeVar, overload

import msgspec

T = TypeVar("T")


@overload
def decode(raw: bytes | str, kind: type[T]) -> T: ...
@overload
def decode(raw: bytes | str, kind: Any = Any) -> Any: ...
def decode(raw: bytes | str, kind: Any = Any) -> Any:
    """Return the value of ``raw`` as ``kind``; raise ``msgspec.DecodeError`` for every text that is none (RFC 8259)."""
    try:
        return msgspec.json.decode(raw, type=kind)  # noqa: TID251 - the one place
    except UnicodeDecodeError:
        # Not chained: the error holds the whole text, which may be a secret.
        raise msgspec.DecodeError("a text in it is not UTF-8") from None
    except RecursionError:
        raise msgspec.DecodeError("it is nested too deeply") from None
