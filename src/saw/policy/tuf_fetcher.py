"""How the policy agent downloads from the repository: TLS under the deployment's own CA, bounded in time.

Apart from the client, so that a command that needs no network loads no HTTP library.
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable, Iterator

import httpx
from tuf.api import exceptions
from tuf.ngclient.fetcher import FetcherInterface

_CHUNK = 65536


class PinnedFetcher(FetcherInterface):
    """Downloads over TLS that only the deployment's CA can vouch for, whatever address is dialled.

    ``server_name`` is the name in the server's certificate; ``deadline`` bounds each download in seconds on ``clock``.
    """

    def __init__(
        self,
        ca_pem: str,
        server_name: str,
        *,
        timeout: float = 10.0,
        deadline: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        context = ssl.create_default_context(cadata=ca_pem)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        self._client = httpx.Client(verify=context, timeout=timeout, trust_env=False, follow_redirects=False)
        self._extensions = {"sni_hostname": server_name}
        self._headers = {"host": server_name}
        self._deadline = deadline
        self._clock = clock

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _fetch(self, url: str) -> Iterator[bytes]:
        end = self._clock() + self._deadline
        try:
            with self._client.stream("GET", url, headers=self._headers, extensions=self._extensions) as answer:
                if answer.status_code != httpx.codes.OK:
                    raise exceptions.DownloadHTTPError(f"{url}: status {answer.status_code}", answer.status_code)
                for chunk in answer.iter_bytes(_CHUNK):
                    if self._clock() > end:
                        raise exceptions.SlowRetrievalError(f"{url} took longer than {self._deadline} s")
                    yield chunk
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise exceptions.DownloadError(f"{url}: {type(error).__name__}: {error}") from error
