"""Sends a message to a webhook, signed as Standard Webhooks 1.0 says (https://www.standardwebhooks.com/, symmetric signatures).

Receivers verify ``webhook-signature`` over ``id.timestamp.body``, refuse an old ``webhook-timestamp``, and drop a ``webhook-id``
that they had.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
from collections.abc import Sequence

import httpx

import saw
from saw.broker.clock import Clock
from saw.broker.notification_files import signing_keys, tls_context
from saw.broker.notification_queue import LONGEST_PAUSE_S, Claimed, NotDelivered
from saw.broker.notification_settings import Webhook

STEP_S = 10.0
"""How long one step of a call may take."""
WHOLE_S = 30.0
"""How long the whole call may take, however little comes how slowly."""
_BUSY = frozenset({429, 502, 503, 504})


def signature(identifier: str, timestamp: int, body: bytes, keys: Sequence[bytes]) -> str:
    """Return the value of ``webhook-signature``: for each key ``v1,`` and the HMAC-SHA256 in base64, with blanks between."""
    signed = f"{identifier}.{timestamp}.".encode() + body
    made = (base64.b64encode(hmac.digest(key, signed, hashlib.sha256)).decode() for key in keys)
    return " ".join(f"v1,{one}" for one in made)


class WebhookSender:
    """Sends to one channel. Nothing of an answer but its status is read: what else is in it nobody has asked for."""

    def __init__(self, channel: Webhook, clock: Clock) -> None:
        self._channel = channel
        self._clock = clock

    async def send(self, claimed: Claimed) -> None:
        """Deliver a message; raise :class:`NotDelivered`."""
        try:
            async with asyncio.timeout(WHOLE_S):
                status, after = await self._post(claimed)
        except TimeoutError as error:
            raise NotDelivered(f"it took longer than {WHOLE_S:.0f} s", code="timed_out") from error
        except httpx.TimeoutException as error:
            raise NotDelivered(f"it did not answer: {type(error).__name__}", code="timed_out") from error
        except httpx.HTTPError as error:
            wrong = "CERTIFICATE_VERIFY_FAILED" in str(error)
            raise NotDelivered(
                f"it cannot be reached: {error or type(error).__name__}",
                code="certificate_refused" if wrong else "unreachable",
                cure="check ca_file, and who answers there" if wrong else "it is tried again by itself",
            ) from error
        if not 200 <= status < 300:
            raise _refused(status, after)

    async def _post(self, claimed: Claimed) -> tuple[int, str]:
        """Return the status of the answer and its ``Retry-After``."""
        keys = await asyncio.to_thread(signing_keys, self._channel.secret_file)
        context = await asyncio.to_thread(tls_context, self._channel.ca_file)
        body, timestamp = claimed.body.encode(), int(self._clock().timestamp())
        headers = {
            "content-type": "application/json",
            "user-agent": f"saw/{saw.__version__}",
            "webhook-id": claimed.id,
            "webhook-timestamp": str(timestamp),
            "webhook-signature": signature(claimed.id, timestamp, body, keys),
        }
        async with (
            httpx.AsyncClient(verify=context, timeout=STEP_S, follow_redirects=False, trust_env=False) as client,
            client.stream("POST", self._channel.url, content=body, headers=headers) as answer,
        ):
            return answer.status_code, answer.headers.get("retry-after", "")


def _refused(status: int, after: str) -> NotDelivered:
    if status == httpx.codes.GONE:
        return NotDelivered(
            "it answered 410: nobody listens there any more",
            code="gone",
            cure="take the channel out of broker_notifications, or correct its url",
            gives_up=True,
        )
    if 300 <= status < 400:
        return NotDelivered(
            f"it answered {status}: redirects are not followed", code="redirected", cure="name the place itself in url"
        )
    wait_s = min(float(after), LONGEST_PAUSE_S) if status in _BUSY and after.isdecimal() and len(after) < 9 else 0.0
    return NotDelivered(f"it answered {status}", code="refused", cure="see the receiver's log", wait_s=wait_s)
