"""Who calls: the workspace SVID that Envoy verified and put into ``x-forwarded-client-cert``.

Envoy drops whatever a client sends under that name (SANITIZE_SET) and writes
``By=<URI of ring 2>;Hash=<hex>;Cert="<URL-encoded PEM>"``; the first part only when ring 2's own certificate carries a
URI. Two elements (a comma) are never accepted.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from datetime import datetime
from urllib.parse import unquote

from saw.gateway.errors import PeerRefused
from saw.identity.names import IdentityError
from saw.identity.x509 import Svid, verify_svid

_XFCC = re.compile(r'(?:By=[A-Za-z0-9:/._-]+;)?Hash=([0-9a-f]{64});Cert="([A-Za-z0-9%._~+/=-]+)"')
_REMEMBERED = 1024


class PeerReader:
    """Reads the caller's SVID and checks it against the authority ``ca_pem`` once more, remembering recent results."""

    def __init__(self, ca_pem: bytes) -> None:
        self._ca_pem = ca_pem
        self._known: OrderedDict[str, Svid] = OrderedDict()

    def read(self, header: str, now: datetime) -> Svid:
        """Return the SVID of a call; raise :class:`PeerRefused` when there is none that is valid at ``now``."""
        svid = self._known.get(header)
        if svid is None:
            svid = self._verify(header, now)
            self._known[header] = svid
            if len(self._known) > _REMEMBERED:
                self._known.popitem(last=False)
        if now >= svid.not_after:
            raise PeerRefused("the workspace certificate has expired", cure="attest again")
        return svid

    def _verify(self, header: str, now: datetime) -> Svid:
        match = _XFCC.fullmatch(header)
        if match is None:
            raise PeerRefused("the call carries no single client certificate", cure="call through ring 1")
        try:
            svid = verify_svid(unquote(match[2]), self._ca_pem, now)
        except IdentityError as error:
            raise PeerRefused(error.message, cure=error.cure) from error
        if svid.sha256 != match[1]:
            raise PeerRefused("the client certificate and its hash differ", cure="call through ring 1")
        return svid
