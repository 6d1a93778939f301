"""A running server, as the command line sees it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import httpx

if TYPE_CHECKING:
    from app.settings import Settings

PROBE_S = 3.0
POLL_S = 0.5
FILES_AT_ONCE = 50


class ServerError(Exception):
    """The server refused or failed; the message is the server's own."""


class Server:
    """One server and the key to it. Methods raise ``ServerError``."""

    def __init__(self, url: str, key: str | None, *, transport: httpx.BaseTransport | None = None) -> None:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        self.url = url.rstrip("/")
        self._http = httpx.Client(base_url=self.url, headers=headers, timeout=600, transport=transport)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def alive(self) -> bool:
        """Whether something of ours answers there."""
        try:
            answer = self._http.get("/livez", timeout=PROBE_S)
            return answer.status_code == 200 and answer.json() == {"status": "alive"}
        except (httpx.HTTPError, ValueError):
            return False

    def chat(self, body: dict[str, Any]) -> dict[str, Any]:
        """A chat completion; the model is the one that is served."""
        models = self._call("GET", "/v1/models")["data"]
        return self._call("POST", "/v1/chat/completions", json={"model": models[0]["id"], **body})

    def ingest(
        self, paths: Sequence[Path], collection: str, tell: Callable[[dict[str, Any], int], None]
    ) -> list[dict[str, Any]]:
        """Send files and wait for their jobs; ``tell(job, files of earlier jobs)`` is called while one runs."""
        jobs = []
        for start in range(0, len(paths), FILES_AT_ONCE):
            files = [("files", (p.name, p.read_bytes())) for p in paths[start : start + FILES_AT_ONCE]]
            job = self._call("POST", "/ingest", files=files, data={"collection": collection})
            while job["finished_at"] is None:
                tell(job, start)
                time.sleep(POLL_S)
                job = self._call("GET", f"/jobs/{job['id']}")
            jobs.append(job)
        return jobs

    def guarded(self) -> list[dict[str, Any]]:
        """What the guard found, one entry per collection."""
        found: list[dict[str, Any]] = self._call("GET", "/guard")["data"]
        return found

    def reset_guard(self, collection: str) -> None:
        """Have the guard forget a collection."""
        self._call("DELETE", f"/guard/{quote(collection, safe='')}")

    def cache(self, what: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """``GET /cache/WHAT``, or ``POST`` with a ``body``."""
        return self._call(
            "GET" if body is None else "POST", f"/cache/{what}", **({} if body is None else {"json": body})
        )

    def _call(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        try:
            answer = self._http.request(method, path, **options)
        except httpx.HTTPError as e:
            raise ServerError(f"{self.url} does not answer: {e or type(e).__name__}") from e
        try:
            data: dict[str, Any] = answer.json()
        except ValueError:
            data = {}
        if answer.status_code >= 400:
            message = data.get("error", {}).get("message") or f"HTTP status {answer.status_code}"
            raise ServerError(f"{self.url}: {message}")
        return data


def find_server(settings: Settings, url: str | None) -> Server | None:
    """The server at ``url``, which must answer, or else the one the settings would start, if it is running."""
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(settings.host, settings.host)
    key = settings.api_key.get_secret_value() if settings.api_key else None
    server = Server(url or f"http://{host}:{settings.port}", key)
    if server.alive():
        return server
    if url is not None:
        raise ServerError(f"no ragblend server answers at {server.url}")
    return None
