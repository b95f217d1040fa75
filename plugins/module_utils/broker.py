# Copyright: Secure Agent Workspace maintainers
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The way from a module to the broker's operator API: one client, one form of failure."""

from __future__ import annotations

import traceback
from contextlib import contextmanager
from typing import Any, Iterator

from ansible.module_utils.basic import AnsibleModule, missing_required_lib

try:
    from saw.broker.client import OperatorClient
    from saw.errors import SawError

    IMPORT_ERROR = None
except ImportError:
    OperatorClient = None

    class SawError(Exception):
        """Stands in where the package is missing; the module then fails before it could be raised."""

    IMPORT_ERROR = traceback.format_exc()


def broker_options(**own: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Argument specification of a module of the group ``broker``."""
    return {"context": {"type": "path"}, **own}


@contextmanager
def operator(module: AnsibleModule) -> Iterator[Any]:
    """Give a client for the whole run of the module; end it with a ``failure`` that names code, details and cure."""
    if OperatorClient is None:
        module.fail_json(msg=missing_required_lib("secure-agent-workspace"), exception=IMPORT_ERROR)
    try:
        with OperatorClient.from_context(module.params["context"]).session() as client:
            yield client
    except SawError as error:
        fail(module, error)


def fail(module: AnsibleModule, error: Any) -> None:
    """End the module with the error's message for people and its parts for programs."""
    module.fail_json(
        msg=str(error),
        failure={"code": error.code, "details": getattr(error, "details", {}), "cure": getattr(error, "cure", "")},
    )


def found(client: Any, path: str, *missing: str) -> dict[str, Any] | None:
    """Get ``path``; None when the broker refuses with one of the codes ``missing``."""
    try:
        return client.request("GET", path)
    except SawError as error:
        if error.code in missing:
            return None
        raise
