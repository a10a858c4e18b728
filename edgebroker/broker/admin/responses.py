"""How the admin interface says what became of a request."""

from __future__ import annotations

from collections.abc import Callable

from edgebroker.common.errors import Code
from edgebroker.network.http.server import Reply, Response


def refusal(code: Code, message: str) -> Response:
    """An error with the code behind it."""
    status = 404 if code is Code.UNKNOWN_TOPIC else 503 if code.retryable else 409
    return Response(status, {"error": message, "code": code.name})


def report(reply: Reply) -> Callable[[Code, str], None]:
    """Answer with nothing, or with why it was not done."""
    return lambda code, message: reply(Response(200, {}) if code is Code.OK else refusal(code, message))
