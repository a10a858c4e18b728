from typing_extensions import Buffer

def implementation() -> str:
    """Name the path chosen at start: "hardware" (SSE4.2 and PCLMUL) or "portable"."""

def crc32c(data: Buffer, value: int = 0) -> int:
    """Return the CRC-32C of `data`, continuing `value` (an earlier result). Any thread."""

def crc32c_portable(data: Buffer, value: int = 0) -> int:
    """The same by the portable path, whatever the processor can do (tests compare the two)."""
