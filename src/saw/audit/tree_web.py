"""A log's tree over HTTPS, for reading (C2SP ``tlog-tiles``). Nothing of it is trusted; what is too large is not read."""

from __future__ import annotations

import httpx

from saw.audit.note import LONGEST_NOTE
from saw.audit.tiles import WIDTH, TreeError
from saw.errors import UnavailableError
from saw.https import https_client

_LONGEST_TILE = WIDTH * 32
_TIMEOUT_S = 20


class Web:
    """:class:`saw.audit.tiles.Files` of a server; each file is fetched once."""

    def __init__(self, url: str, ca_file: str | None, server_name: str | None) -> None:
        """``server_name`` is the name in the certificate where ``url`` has an address; None for that of ``url``."""
        self._url = url
        self._client = https_client(url, ca_file, _TIMEOUT_S, "ca_file")
        self._headers = {"accept-encoding": "identity"} | ({"host": server_name} if server_name else {})
        self._extensions = {"sni_hostname": server_name} if server_name else {}
        self._kept: dict[str, bytes | None] = {}

    def read(self, path: str) -> bytes | None:
        """Return a file, None when it is not there; raise :class:`UnavailableError` when the server does not answer so."""
        if path not in self._kept:
            self._kept[path] = self._fetch(path, LONGEST_NOTE if path == "checkpoint" else _LONGEST_TILE)
        return self._kept[path]

    def write(self, path: str, data: bytes) -> None:
        """Refuse: it is only read."""
        raise TreeError(f"{self._url} is only read: {path}, {len(data)} bytes", cure="write to a folder")

    def drop(self, path: str) -> None:
        """Refuse: it is only read."""
        raise TreeError(f"{self._url} is only read: {path}", cure="write to a folder")

    def _fetch(self, path: str, most: int) -> bytes | None:
        where = f"{self._url.rstrip('/')}/{path}"
        try:
            with self._client.stream("GET", where, headers=self._headers, extensions=self._extensions) as answer:
                if answer.status_code == 404:
                    return None
                if answer.status_code != 200:
                    raise UnavailableError(f"{where} answers {answer.status_code}", cure="see the log's host")
                found = b""
                for part in answer.iter_raw():
                    found += part
                    if len(found) > most:
                        raise TreeError(f"{where} is larger than {most} bytes", cure="see what the log's host serves")
                return found
        except httpx.HTTPError as error:
            raise UnavailableError(
                f"{where} cannot be read: {error or type(error).__name__}",
                cure="check the way to the log's host and its name",
            ) from error
