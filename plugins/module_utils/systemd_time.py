# Copyright: Secure Agent Workspace maintainers
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Since when a unit runs, in systemd's words and as Unix time."""

from __future__ import annotations

from datetime import datetime, timezone


def started_at(timestamp: str) -> float:
    """Turn systemd's ``Sun 2026-11-22 10:00:00.123456 UTC`` into Unix time; now when there is none."""
    try:
        return datetime.strptime(timestamp, "%a %Y-%m-%d %H:%M:%S.%f UTC").replace(tzinfo=timezone.utc).timestamp()
    except ValueError:
        return datetime.now(tz=timezone.utc).timestamp()
