"""The compression codecs of a batch: gzip, lz4 and zstd by their packages, imported when first needed.

Inflating is bounded: the output never grows past the limit given, whatever the input claims.
Snappy has a code in the format but no codec here; a batch that uses it is answered UNSUPPORTED_CODEC.
"""

import zlib
from typing import Literal

from edgebroker.common.errors import CorruptBatchError, InflatedTooLargeError

CodecName = Literal["none", "gzip", "lz4", "zstd"]
CODEC_BITS: dict[CodecName, int] = {"none": 0, "gzip": 1, "lz4": 3, "zstd": 4}


def deflate(codec: int, records: bytes) -> bytes:
    """Compress the records of one batch with the codec of these attribute bits."""
    if codec == 1:
        packer = zlib.compressobj(wbits=31)
        return packer.compress(records) + packer.flush()
    if codec == 3:
        import lz4.frame

        # Kafka's readers accept only frames of independent blocks.
        return bytes(lz4.frame.compress(records, block_linked=False, store_size=True))
    if codec == 4:
        import zstandard

        return zstandard.ZstdCompressor(level=1).compress(records)
    raise ValueError(f"no codec {codec}; use one of none, gzip, lz4, zstd")


def inflate(codec: int, packed: bytes, limit: int = 16 << 20) -> bytes:
    """Decompress into at most `limit` bytes. Raises CorruptBatchError when it is larger, incomplete or not valid."""
    try:
        if codec == 1:
            return _inflate_gzip(packed, limit)
        if codec == 3:
            return _inflate_lz4(packed, limit)
        if codec == 4:
            return _inflate_zstd(packed, limit)
    except CorruptBatchError:
        raise
    except Exception as error:  # each package has its own tree of errors
        raise CorruptBatchError(f"the compressed records cannot be read: {error}") from error
    raise CorruptBatchError(f"codec {codec} is not supported; use gzip, lz4 or zstd")


def _finish(plain: bytes, ended: bool, behind: bytes, limit: int) -> bytes:
    if len(plain) > limit:
        raise InflatedTooLargeError(f"the records inflate to more than {limit} bytes")
    if not ended:
        raise CorruptBatchError("the compressed records are incomplete")
    if behind:  # other readers would find other records there
        raise CorruptBatchError("something follows the compressed records")
    return plain


def _inflate_gzip(packed: bytes, limit: int) -> bytes:
    unpacker = zlib.decompressobj(wbits=31)
    plain = unpacker.decompress(packed, limit + 1)
    return _finish(plain, unpacker.eof or len(plain) > limit, unpacker.unused_data or b"", limit)


def _inflate_lz4(packed: bytes, limit: int) -> bytes:
    import lz4.frame

    unpacker = lz4.frame.LZ4FrameDecompressor()
    plain = unpacker.decompress(packed, max_length=limit + 1)
    return _finish(plain, unpacker.eof or len(plain) > limit, unpacker.unused_data or b"", limit)


def _inflate_zstd(packed: bytes, limit: int) -> bytes:
    import zstandard

    # The window is memory that the sender chooses: bound it with the output. One call, because a stream reader does not
    # tell a frame that is incomplete from one that ended.
    if zstandard.frame_content_size(packed) > limit:
        raise InflatedTooLargeError(f"the records inflate to more than {limit} bytes")
    unpacker = zstandard.ZstdDecompressor(max_window_size=max(limit, 1 << 20))
    return unpacker.decompress(packed, max_output_size=limit, allow_extra_data=False)
