"""What a person who decides on reviews can be called."""

from __future__ import annotations

from typing import Annotated

import msgspec

ReviewerName = Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9]([a-z0-9._@+-]{0,253}[a-z0-9])?\Z")]
