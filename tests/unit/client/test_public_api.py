"""The public face: what can be imported, what is visible, and that all of it is documented at run time."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import edgebroker
from edgebroker import Consumer, Producer, Record, Sent

ROOT = Path(__file__).parents[3]
CLASSES = [name for name in edgebroker.__all__ if name != "__version__"]
PRODUCER = {"client_id", "close", "closed", "flush", "open_topic", "send", "send_many", "unacked"}
CONSUMER = {
    "ack", "ack_to", "applied", "assignment", "client_id", "close", "closed", "commit", "durable_ends", "expired",
    "group", "in_progress", "nack", "next_offsets", "pause", "poll", "position_after", "positions", "refresh", "reject",
    "resume", "run", "seek", "silent_seconds", "switch",
}  # fmt: skip


def public(kind: type) -> set[str]:
    return {name for name in dir(kind) if not name.startswith("_")}


@pytest.mark.parametrize("name", CLASSES)
def test_everything_public_is_documented(name: str) -> None:
    kind = getattr(edgebroker, name)
    assert kind.__doc__, name
    for each in sorted(public(kind) - public(kind.__mro__[1])):
        found = inspect.getattr_static(kind, each)
        fields = {*getattr(kind, "_fields", ()), *getattr(kind, "__slots__", ()), *getattr(kind, "__members__", ())}
        if each in fields or (inspect.isgetsetdescriptor(found) and f"{each}:" in kind.__doc__):
            assert each in kind.__doc__ or issubclass(kind, int), f"{name}.{each}"
        else:
            assert inspect.getdoc(found), f"{name}.{each}"


def test_nothing_internal_is_visible() -> None:
    assert public(Producer) == PRODUCER
    assert public(Consumer) == CONSUMER
    assert {"Producer", "Consumer", "GapError"} <= set(dir(edgebroker))
    with pytest.raises(AttributeError, match="Broker"):
        _ = edgebroker.Broker  # type: ignore[attr-defined]


def test_every_error_says_what_to_do() -> None:
    for name in CLASSES:
        kind = getattr(edgebroker, name)
        if issubclass(kind, Exception) and name != "EdgeBrokerError":
            assert issubclass(kind, edgebroker.EdgeBrokerError)
            assert "\n    Do: " in (kind.__doc__ or "") or "    Do: " in (kind.__doc__ or ""), name


@pytest.mark.parametrize(
    ("kind", "interface"), [(Record, "common/records.pyi"), (Sent, "client/publish/accumulator.pyi")]
)
def test_the_interface_of_an_extension_has_its_docstrings(kind: type, interface: str) -> None:
    tree = ast.parse((ROOT / "edgebroker" / interface).read_text())
    node = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == kind.__name__)
    assert ast.get_docstring(node) == inspect.getdoc(kind)
    for method in node.body:
        if isinstance(method, ast.FunctionDef) and (text := ast.get_docstring(method)):
            assert text == inspect.getdoc(getattr(kind, method.name)), method.name


def test_importing_the_package_imports_nothing_of_it() -> None:
    program = (
        "import sys; before = set(sys.modules); import edgebroker; dir(edgebroker); "
        "print(*(name for name in sorted(set(sys.modules) - before) if 'edgebroker' in name))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["edgebroker", "edgebroker.version"]


def test_a_subclass_may_have_its_own_send() -> None:
    class Counting(Producer):
        count = 0

        def send(self, *arguments, **options):  # type: ignore[no-untyped-def]
            self.count += 1
            return super().send(*arguments, **options)

    with Counting("127.0.0.1:1", timeout=0.1) as producer:
        with pytest.raises(edgebroker.UnreachableError):
            producer.send("t", b"v")
        assert producer.count == 1
        with pytest.raises(edgebroker.UnreachableError):
            Producer.send(producer, "t", b"v")
