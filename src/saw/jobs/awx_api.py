"""The calls of AWX's REST API (version 2) that running a job takes: find a template, launch it, look at a job, cancel it.

Reading is tried again; a launch is sent once, because a lost answer does not say that nothing was launched.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

import httpx
import msgspec

from saw import jsontext
from saw.errors import ConfigError, SawError, UnavailableError
from saw.https import https_client
from saw.jobs.config import AwxSettings
from saw.jobs.redact import redact

MAX_ANSWER = 32 * 1024 * 1024
MAX_PAGES = 20
TRIES = 3
_PASSING = frozenset({429, 500, 502, 503, 504})


class AwxRefused(SawError):
    """AWX refused a call, or is not set up for it."""

    def __init__(self, code: str, message: str, cure: str) -> None:
        super().__init__(message, cure=cure)
        self.code = code


class Uncertain(UnavailableError):
    """A launch was sent and nothing tells whether it was taken."""

    code = "launch_uncertain"


class Template(msgspec.Struct, frozen=True):
    """A job template (``GET job_templates/``)."""

    id: int
    name: str
    ask_variables_on_launch: bool = False


class AwxJob(msgspec.Struct, frozen=True):
    """A job (``GET jobs/{id}/``). ``extra_vars`` is JSON in a text."""

    id: int
    status: str
    extra_vars: str = ""
    job_explanation: str = ""
    event_processing_finished: bool = True

    def variables(self) -> Mapping[str, Any]:
        """Return its variables; none when they cannot be read."""
        try:
            return jsontext.decode(self.extra_vars or "{}", kind=dict[str, Any])
        except msgspec.DecodeError:
            return {}


class Launched(msgspec.Struct, frozen=True):
    """The answer to a launch; AWX leaves out what the template does not let be chosen, and names it."""

    job: int
    ignored_fields: dict[str, Any] = {}


class AwxApi:
    """AWX as one user. ``pause`` waits between two tries, seconds."""

    def __init__(self, settings: AwxSettings, pause: Callable[[float], None] = time.sleep) -> None:
        self._settings = settings
        self._pause = pause
        self._http = https_client(settings.url, settings.ca_file, settings.timeout_s, "awx.ca_file")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def template(self, name: str) -> Template:
        """Return the one template of that name, which must take variables; raise :class:`AwxRefused`."""
        query = {"name": name, "page_size": "2"}
        if self._settings.organization is not None:
            query["organization__name"] = self._settings.organization
        found = [msgspec.convert(one, Template) for one in self._get("job_templates/", query)["results"]]
        if len(found) != 1:
            raise AwxRefused(
                "template_missing" if not found else "template_ambiguous",
                f"AWX shows {len(found)} job templates {name!r} to this user",
                "make one, let the user execute it" if not found else "set awx.organization",
            )
        if not found[0].ask_variables_on_launch:
            raise AwxRefused(
                "template_fixed",
                f"the job template {name!r} takes no variables",
                "let it prompt for variables on launch",
            )
        return found[0]

    def jobs_of(self, template: int, since: str) -> Iterator[AwxJob]:
        """Yield the jobs of a template that were made since ``since``, the newest first."""
        query: dict[str, str] | None = {"order_by": "-id", "page_size": "50", "created__gte": since}
        path = f"job_templates/{template}/jobs/"
        for _ in range(MAX_PAGES):
            page = self._get(path, query)
            for one in page["results"]:
                yield msgspec.convert(one, AwxJob)
            if not page.get("next"):
                return
            path, query = self._following(str(page["next"])), None

    def launch(self, template: int, variables: Mapping[str, Any]) -> Launched:
        """Launch a template, once; raise :class:`Uncertain` when nothing tells whether it was taken."""
        path = f"job_templates/{template}/launch/"
        try:
            answer = self._send("POST", path, json={"extra_vars": dict(variables)})
        except httpx.ConnectError as error:
            raise UnavailableError(f"AWX does not answer: {error}", cure="check awx.url and awx.ca_file") from error
        except httpx.HTTPError as error:
            raise Uncertain(f"the answer to the launch was lost: {error or type(error).__name__}") from error
        if answer.status_code >= 500:
            raise Uncertain(f"AWX answered {answer.status_code} to the launch")
        found: Launched = self._read(answer, Launched)
        return found

    def job(self, number: int) -> AwxJob:
        """Return a job as it is now."""
        return msgspec.convert(self._get(f"jobs/{number}/", None), AwxJob)

    def events(self, number: int, after: int) -> list[dict[str, Any]]:
        """Return a page of the events of a job behind the counter ``after``."""
        query = {"order_by": "counter", "counter__gt": str(after), "page_size": "200"}
        found: list[dict[str, Any]] = self._get(f"jobs/{number}/job_events/", query)["results"]
        return found

    def cancel(self, number: int) -> bool:
        """Ask for a job's end; return False when it cannot be cancelled because it has ended."""
        try:
            answer = self._send("POST", f"jobs/{number}/cancel/")
        except httpx.HTTPError as error:
            raise UnavailableError(f"AWX does not answer: {error or type(error).__name__}") from error
        if answer.status_code in {202, 405}:
            return answer.status_code == 202
        raise self._refusal(answer)

    def _get(self, path: str, query: Mapping[str, str] | None) -> Any:
        """Read something, trying again while AWX is away."""
        said = ""
        for number in range(TRIES):
            if number:
                self._pause(float(number))
            try:
                answer = self._send("GET", path, params=query)
            except httpx.HTTPError as error:
                said = str(error) or type(error).__name__
                continue
            if answer.status_code not in _PASSING:
                return self._read(answer, dict[str, Any])
            said = f"it answered {answer.status_code}"
        raise UnavailableError(f"AWX does not answer: {said}", cure="check awx.url, awx.ca_file and AWX itself")

    def _send(self, method: str, path: str, **how: Any) -> httpx.Response:
        url = path if path.startswith("/") else f"{self._settings.api}{path}"
        return self._http.request(method, url, headers={"authorization": f"Bearer {self._token()}"}, **how)

    def _token(self) -> str:
        """Return the token as its file is now, so that it can be replaced while the worker runs."""
        try:
            found = Path(self._settings.token_file).read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError("the token of AWX cannot be read", cure="check awx.token_file") from error
        if not found.isprintable() or not found:
            raise ConfigError("awx.token_file holds no token", cure="write the token alone into it")
        return found

    def _following(self, next_page: str) -> str:
        """Return the path of the next page; an address elsewhere is not followed."""
        place = urlsplit(next_page)
        if place.netloc or not place.path.startswith(self._settings.api):
            raise AwxRefused("awx_answer", "AWX names a next page elsewhere", "check awx.url and awx.api")
        return f"{place.path}?{place.query}"

    def _read(self, answer: httpx.Response, kind: type[Any]) -> Any:
        if not answer.is_success:
            raise self._refusal(answer)
        try:
            if len(answer.content) > MAX_ANSWER:
                raise msgspec.DecodeError("it is too long")
            return jsontext.decode(answer.content, kind=kind)
        except msgspec.DecodeError as error:
            raise AwxRefused(
                "awx_answer", f"AWX answered something else: {error}", "check awx.url and awx.api"
            ) from error

    @staticmethod
    def _refusal(answer: httpx.Response) -> AwxRefused:
        if answer.status_code in {401, 403}:
            return AwxRefused(
                "awx_denied",
                f"AWX refused the token ({answer.status_code})",
                "renew it; let its user execute the templates",
            )
        words = redact(answer.text, 300)
        return AwxRefused("awx_refused", f"AWX answered {answer.status_code}: {words}", "see AWX; then saw job resume")
