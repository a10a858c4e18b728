def refuse(answers: bytes, code: int) -> bytes:
    """The answers with every OK turned into `code`, without an offset: what was staged is not stored after all."""

def failed(answers: bytes) -> int:
    """How many of the answers are not OK."""

def uniform(count: int, code: int) -> bytes:
    """Answers that refuse `count` publishes with one code."""
