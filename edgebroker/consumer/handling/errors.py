"""What other people's code raises, as a text that can be stored and sent."""

from __future__ import annotations


class StoppedError(Exception):
    """The application ends: a handler failed for good and its policy says so, or a function without which it cannot go
    on."""


def text_of(error: BaseException) -> str:
    """The text of an exception, whatever it does when it is asked for one."""
    try:
        text = str(error)
    except Exception:
        text = "(it has no text)"
    return text.encode("utf-8", "replace").decode()


def described(error: BaseException) -> str:
    """Its type and text."""
    return f"{type(error).__name__}: {text_of(error)}"
