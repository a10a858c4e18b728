"""Writes docs/python.md from the docstrings: `python packaging/python_page.py > docs/python.md` (make docs).

The text between is here. Its ```python blocks run as one program in tests/test_documents.py.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import textwrap
from pathlib import Path

import edgebroker
from edgebroker import Code

ROOT = Path(__file__).parent.parent
WIDTH = 120
ITEMS = ("Args", "Attributes", "Raises")
# What a reader does not find by its name.
ALIASES = {"StartFrom": "int | str", "codecs.CodecName": "Literal['none', 'gzip', 'lz4', 'zstd']"}
SECTIONS = (*ITEMS, "Returns", "Threads", "Durability")

HEAD = """# Python client

`pip install edgebroker` brings the client, `edgebroker[node]` the broker as well. The client blocks and works in any
thread; for asyncio there are AsyncProducer and AsyncConsumer. It is
typed (`py.typed`), and `help(edgebroker.Producer)` shows what this page is made from. Everything an application needs
is imported from `edgebroker`. [glossary.md](glossary.md) explains the words, [protocol.md](protocol.md) the wire.

## Getting started

With a broker on this machine (`edgebroker serve`), publish a record:

```python
from edgebroker import Consumer, Producer

with Producer("127.0.0.1:7420") as producer:
    sent = producer.send("prices", b'{"price": 199}', key=b"4711")
    print("stored at offset", sent.result(timeout=10))
```

and read it:

```python
with Consumer("127.0.0.1:7420", ["prices"], group="shelf-labels") as consumer:
    for record in consumer:  # blocks until records come, and acknowledges them as the loop moves on
        print(record.partition, record.offset, record.key, record.value)
        break
```
"""
PRODUCER = """## Producer

A producer sends batches while the program goes on. Waiting for each record is slow; rather have failures reported, and
wait once:

```python
failures = []


def note(sent):  # on the I/O thread: must not block
    if (error := sent.exception()) is not None:
        failures.append(error)


with Producer("127.0.0.1:7420", linger_ms=5, compression="zstd") as producer:
    for number in range(1000):
        producer.send("sales", b"%d" % number, key=b"till-%d" % (number % 8)).add_done_callback(note)
    producer.flush(timeout=60)
```
"""
CONSUMER = """## Consumer

Several workers share a topic by naming the same group; each thread or process has a consumer of its own. A handler that
raises rejects the first record that it was given, which is delivered again, isolated, and at last becomes a dead letter
in the topic `sales.dlq`:

```python
def work():  # in a thread or a process of its own, as often as you like
    with Consumer("127.0.0.1:7420", ["sales"], group="tills") as consumer:
        consumer.run(book, batch_size=100, retry=True)  # book() gets a list of records
```

A handler that takes longer than the broker's delivery timeout calls `consumer.in_progress()` meanwhile, from any
thread.
"""
ASYNC = """## asyncio

The same clients, none of whose calls blocks the event loop:

```python
import asyncio

from edgebroker import AsyncConsumer, AsyncProducer


async def main():
    async with AsyncProducer(Producer("127.0.0.1:7420")) as producer:
        sent = [await producer.send("receipts", b"%d" % number) for number in range(100)]
        print("stored up to offset", max(await asyncio.gather(*sent)))
    async with AsyncConsumer(Consumer("127.0.0.1:7420", ["receipts"], group="kitchen")) as consumer:
        async for record in consumer:
            print(record.value)
            break


asyncio.run(main())
```
"""
POSITIONS = """## Positions

A group's committed offsets are stored by the broker. A reader that keeps its position in the same transaction as its
data instead gets the effect of exactly once. It needs no group:

```python
import sqlite3

from edgebroker import Position

database = sqlite3.connect("shelf.db")
database.execute("CREATE TABLE IF NOT EXISTS prices (item BLOB PRIMARY KEY, price BLOB)")
database.execute(
    "CREATE TABLE IF NOT EXISTS positions (topic, part, log_id, epoch, next_offset, PRIMARY KEY (topic, part))"
)
stored = {(topic, part): Position(*rest) for topic, part, *rest in database.execute("SELECT * FROM positions")}
with Consumer("127.0.0.1:7420", ["prices"], positions=stored, auto_ack=False) as consumer:
    while records := consumer.poll(timeout=1):
        consumer.ack(records[-1])
        with database:  # the data and the position, or neither
            database.executemany(
                "INSERT OR REPLACE INTO prices VALUES (?, ?)", [(record.key, record.value) for record in records]
            )
            database.executemany(
                "INSERT OR REPLACE INTO positions VALUES (?, ?, ?, ?, ?)",
                [(*key, *position) for key, position in consumer.positions().items()],
            )
database.close()
```

`position_file=` keeps them in a file, which is simpler and gives at least once. Positions win over the committed
offsets of a group. `Consumer.seek()` moves one partition.
"""
REFRESH = """## Snapshot refresh

A snapshot refresh loads a topic again, beside the data that readers see, and switches in one step. The broker starts
one when an operator asks for it (`edgebroker group refresh`), when `Consumer.refresh()` does, or when the position
belongs to other data than the broker's. It needs a staging store, any object with three methods:

```python
class Shelf:
    def __init__(self):
        self.data, self.staged = {}, {}  # readers use data

    def begin(self, refresh):
        self.staged = {}
        return refresh.from_offset

    def load(self, refresh, records):
        for record in records:
            if record.value is None:
                self.staged.pop(record.key, None)
            else:
                self.staged[record.key] = record.value

    def switch(self, refresh):
        self.data = self.staged


shelf = Shelf()
with Consumer("127.0.0.1:7420", ["prices"], group="labels", staging=shelf) as consumer:
    while not consumer.assignment:
        consumer.poll(timeout=0.1)
    consumer.refresh("prices", 0)
    while not shelf.data:
        consumer.poll(timeout=0.1)
```
"""
ERRORS = """## Errors

Every error of the package is an `EdgeBrokerError`. Besides these, methods raise `TimeoutError` when their own `timeout`
is over, `TypeError` for a value of the wrong type, and `ValueError` after `close()`.

```python
from edgebroker import AnswerError, UnreachableError

try:
    with Producer("127.0.0.1:7420", timeout=30) as producer:
        producer.send("sales.dlq", b"value").result()
except UnreachableError as error:
    print("may be stored or not:", error)
except AnswerError as error:
    print("is not stored:", error.code.name, error)
```

| Error | Is raised when | Do |
|---|---|---|
"""
THREADS = """## Threads

Each producer and each consumer has one I/O thread of its own, a daemon. A process that forks creates them in the child.

| Class | Who may call |
|---|---|
"""


def page() -> str:
    """The whole document."""
    parts = [
        HEAD, PRODUCER, reference("Producer"), reference("Sent"),
        CONSUMER, reference("Consumer"), reference("Record"), reference("TopicPartition"), reference("Delivery"),
        ASYNC, reference("AsyncProducer"), reference("AsyncConsumer"),
        POSITIONS, reference("Position"),
        REFRESH, reference("Staging"), reference("Refresh"),
        ERRORS + errors() + "\n" + codes(), *map(attributes_of, ("AnswerError", "GapError", "ResetRequiredError")),
        THREADS + threads(),
    ]  # fmt: skip
    return "\n".join(part.rstrip("\n") + "\n" for part in parts if part)


def reference(name: str) -> str:
    """One class: its docstring, then its properties and methods."""
    kind, node = getattr(edgebroker, name), source_of(name)
    constructor = next((each for each in functions(node) if each.name == "__init__" and name != "Refresh"), None)
    signature = f"```py\n{call(name, constructor)}\n```\n\n" if constructor else ""
    out = [f"### {name}\n\n{signature}{rendered(inspect.getdoc(kind) or '')}"]
    for each in functions(node):
        text = inspect.getdoc(getattr(kind, each.name))
        if each.name == "__iter__":
            out.append(f"#### for record in consumer\n\n{rendered(text or '')}")
        elif not each.name.startswith("_") and text:
            plain = any(isinstance(mark, ast.Name) and mark.id == "property" for mark in each.decorator_list)
            returns = ast.unparse(each.returns) if each.returns is not None else "None"
            shown = f"{each.name}: {returns}" if plain else call(each.name, each)
            out.append(f"#### {name}.{each.name}\n\n```py\n{shown}\n```\n\n{rendered(text)}")
    return "\n".join(out)


def source_of(name: str) -> ast.ClassDef:
    """The class in its source, or in the interface of its extension."""
    path = Path(inspect.getfile(importlib.import_module(edgebroker._HOMES[name])))
    text = (path if path.suffix == ".py" else path.parent / f"{path.name.partition('.')[0]}.pyi").read_text()
    return next(node for node in ast.parse(text).body if isinstance(node, ast.ClassDef) and node.name == name)


def functions(node: ast.ClassDef) -> list[ast.FunctionDef]:
    return [each for each in node.body if isinstance(each, ast.FunctionDef)]


def call(name: str, function: ast.FunctionDef) -> str:
    """How it is called, one argument a line where one line is too short."""
    found = function.args
    plain = found.args[1:]
    defaults = [None] * (len(plain) - len(found.defaults)) + list(found.defaults)
    shown = [argument(each, default) for each, default in zip(plain, defaults, strict=True)]
    if found.kwonlyargs:
        shown += ["*"]
        shown += [argument(each, default) for each, default in zip(found.kwonlyargs, found.kw_defaults, strict=True)]
    returns = "" if function.name == "__init__" or function.returns is None else f" -> {ast.unparse(function.returns)}"
    line = f"{name}({', '.join(shown)}){returns}"
    if len(line) <= WIDTH:
        return line
    return f"{name}(\n" + "".join(f"    {each},\n" for each in shown) + f"){returns}"


def argument(each: ast.arg, default: ast.expr | None) -> str:
    kind = ast.unparse(each.annotation) if each.annotation is not None else ""
    kind = f": {ALIASES.get(kind, kind)}" if kind else ""
    return f"{each.arg}{kind}" + (f" = {ast.unparse(default)}" if default is not None else "")


def sections(text: str) -> dict[str, str]:
    """The text of a docstring by the name of the section; "" is what comes before them."""
    pieces = re.split(rf"^({'|'.join(SECTIONS)}):\n", text, flags=re.MULTILINE)
    return {"": pieces[0].strip()} | {
        name: textwrap.dedent(body).strip() for name, body in zip(pieces[1::2], pieces[2::2], strict=True)
    }


def items(text: str) -> list[tuple[str, str]]:
    """(name, text) of the lines of a section that lists them."""
    found = re.findall(r"^(\w[\w, ]*): (.*(?:\n +.*)*)", text, re.MULTILINE)
    return [(name, joined(rest)) for name, rest in found]


def joined(text: str) -> str:
    return " ".join(text.split())


def rendered(text: str) -> str:
    out = []
    for name, body in sections(text).items():
        if not name:
            out += [filled(joined(each)) for each in body.split("\n\n")]
        elif name in ITEMS:
            title = {"Args": "Arguments"}.get(name, name)
            names = ((", ".join(f"`{one}`" for one in each.split(", ")), rest) for each, rest in items(body))
            out.append(f"{title}:\n\n" + "\n".join(filled(f"- {each}: {rest}", "  ") for each, rest in names))
        else:
            out.append(filled(f"{name}: {joined(body)}"))
    return "\n\n".join(out) + "\n"


def filled(text: str, indent: str = "") -> str:
    return textwrap.fill(text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def errors() -> str:
    rows = []
    for name in edgebroker.__all__:
        kind = getattr(edgebroker, name)
        if isinstance(kind, type) and issubclass(kind, Exception) and name != "EdgeBrokerError":
            when, _, do = joined(sections(inspect.getdoc(kind) or "")[""]).partition("Do: ")
            rows.append(f"| `{name}` | {when.strip()} | {do[:1].upper()}{do[1:]} |\n")
    return "".join(rows)


def codes() -> str:
    retryable = ", ".join(f"`{code.name}`" for code in Code if code.retryable)
    text = f"The retryable codes of an `AnswerError` are {retryable}; [protocol.md](protocol.md) explains every code."
    return filled(text) + "\n"


def attributes_of(name: str) -> str:
    found = items(sections(inspect.getdoc(getattr(edgebroker, name)) or "")["Attributes"])
    return f"Attributes of `{name}`:\n\n" + "\n".join(filled(f"- `{each}`: {text}", "  ") for each, text in found)


def threads() -> str:
    rows = ""
    for name in ("Producer", "Sent", "Consumer", "Staging"):
        rows += f"| `{name}` | {joined(sections(inspect.getdoc(getattr(edgebroker, name)) or '')['Threads'])} |\n"
    return rows


if __name__ == "__main__":
    print(page(), end="")
