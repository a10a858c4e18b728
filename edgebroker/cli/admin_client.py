"""A client of the admin interface of a node, over TCP or its unix socket, and of nodes below it.

An admin address is HOST:PORT or unix:PATH, with " via NODE" behind it for what a node below is asked through that one.
"""

from __future__ import annotations

import http.client
import json
import socket
from contextlib import closing
from typing import Any
from urllib.parse import quote

from edgebroker.common.errors import ConfigError, EdgeBrokerError, UnreachableError
from edgebroker.common.names import printable

TIMEOUT_SECONDS = 35.0
VIA = " via "


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=TIMEOUT_SECONDS)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(TIMEOUT_SECONDS)
        self.sock.connect(self._path)


def ask(admin: str, path: str) -> tuple[int, Any]:
    """GET a path; the status, whatever it is, and the decoded JSON. Raises UnreachableError, also when the node below
    that was to answer does not."""
    status, data = _exchange(admin, "GET", path, None)
    if VIA in admin and status in (404, 409, 503) and isinstance(data, dict) and "error" in data:
        raise UnreachableError(str(data["error"]))
    return status, data


def call(admin: str, method: str, path: str, body: object = None) -> Any:
    """Make a request; the decoded JSON. Raises UnreachableError, or EdgeBrokerError with the error of the node."""
    status, data = _exchange(admin, method, path, body)
    if status >= 400:
        raise EdgeBrokerError(str(data.get("error", f"HTTP {status}")))
    return data


def _exchange(admin: str, method: str, path: str, body: object) -> tuple[int, Any]:
    admin, _, below = admin.partition(VIA)
    admin = admin.removeprefix("http://").rstrip("/")
    if below:
        path = f"/v1/via/{quote(below, safe='')}{path}"
    try:
        with closing(_connection(admin)) as connection:
            headers = {"content-type": "application/json"} if body is not None else {}
            connection.request(method, path, json.dumps(body) if body is not None else None, headers)
            response = connection.getresponse()
            return response.status, _printable(json.loads(response.read()))
    except (OSError, http.client.HTTPException, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UnreachableError(
            f"no broker answers at {admin}: {reason}; is it running, and is the address correct?"
        ) from error


def _printable(answer: Any) -> Any:
    """An answer whose texts can be shown: a node may have them from anywhere."""
    if isinstance(answer, str):
        return printable(answer)
    if isinstance(answer, list):
        return [_printable(one) for one in answer]
    if isinstance(answer, dict):
        return {printable(name): _printable(value) for name, value in answer.items()}
    return answer


def _connection(admin: str) -> http.client.HTTPConnection:
    """Raises http.client.InvalidURL for a port that is not a number."""
    if admin.startswith("unix:"):
        return _UnixConnection(admin[5:])
    return http.client.HTTPConnection(admin, timeout=TIMEOUT_SECONDS)


def api_path(*parts: str) -> str:
    """The path of something named: /v1/ and the parts, quoted. Raises ConfigError for an empty name."""
    if "" in parts:
        raise ConfigError("a name is missing: it is empty")
    return "/".join(("/v1", *(quote(part, safe="") for part in parts)))
