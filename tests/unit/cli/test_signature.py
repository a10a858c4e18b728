"""Signatures of releases: those of minisign itself, and what is none."""

from __future__ import annotations

import shutil
import subprocess
from base64 import b64decode, b64encode
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgebroker.cli.appliance.signature import SignedRelease, check_signature
from edgebroker.common.errors import EdgeBrokerError
from tests.kit.minisign import SigningKey

SAID = "edgebroker version=0.2.0 data_format=1"
# minisign made these, of a file with the line "hello".
PUBLIC = "RWRPd0Gg7NZ8UclXuyAgWO0t+286Hi2+HhlTlG0DvUVNT05ZFVBj8tuC"
SIGNATURE = """untrusted comment: signature from minisign secret key
RURPd0Gg7NZ8Uez7nvuf++e6qir4mGVYjFjOrO6vR4QVTWq2gKIi23IXwNMk8mzwVIQm1tR46ym2N+f65dKny4NS+ocDTi0LTw8=
trusted comment: edgebroker version=0.2.0 data_format=1
CJu9Na89XXirtTKMN0fxv4d6G19vNalEnCRVluLNfkRgtCK5tk0MdUpiXd5YBbkOqMYHgeUGlqaaEZEaKQFnBw==
"""


def written(directory: Path, text: str = SIGNATURE, content: bytes = b"hello\n") -> tuple[Path, Path]:
    program, signature = directory / "program", directory / "program.minisig"
    program.write_bytes(content)
    signature.write_text(text)
    return program, signature


def test_what_minisign_has_signed(tmp_path: Path) -> None:
    assert check_signature(*written(tmp_path), [SigningKey().public, PUBLIC]) == SignedRelease("0.2.0", 1)


@pytest.mark.skipif(shutil.which("minisign") is None, reason="minisign is not installed")
def test_what_minisign_signs_now(tmp_path: Path) -> None:
    def run(*words: str) -> None:
        subprocess.run(["minisign", *words], cwd=tmp_path, check=True, capture_output=True)

    program = tmp_path / "program"
    program.write_bytes(b"x" * 3_000_000)
    run("-G", "-W", "-p", "public", "-s", "secret")
    run("-S", "-s", "secret", "-m", "program", "-t", SAID)
    public = (tmp_path / "public").read_text().splitlines()[1]
    assert check_signature(program, tmp_path / "program.minisig", [public]).version == "0.2.0"
    # And minisign believes what the tests sign with.
    key = SigningKey()
    key.sign(program, SAID)
    run("-V", "-P", key.public, "-m", "program")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is not a signature of minisign"),
        ("a\nb\nc\nd\n", "is not a signature of minisign"),
        (SIGNATURE.replace("trusted comment: e", "comment: e"), "is not a signature of minisign in its present form"),
        (SIGNATURE.replace("RURP", "RWRP"), "is not a signature of minisign in its present form"),
        (SIGNATURE.replace("0.2.0", "0.3.0"), "the file was changed, or is another one"),
        (SIGNATURE.replace("RURPd0Gg7", "RURPd0Gg8"), "which this release does not know"),
    ],
)
def test_what_is_no_signature(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(EdgeBrokerError, match=said):
        check_signature(*written(tmp_path, text), [PUBLIC])


def test_of_another_file_by_another_key_and_about_something_else(tmp_path: Path) -> None:
    with pytest.raises(EdgeBrokerError, match="the file was changed, or is another one"):
        check_signature(*written(tmp_path, content=b"hello"), [PUBLIC])
    with pytest.raises(EdgeBrokerError, match="is by key 517CD6ECA041774F, which this release does not know"):
        check_signature(*written(tmp_path), [SigningKey().public])
    key = SigningKey()
    program, _ = written(tmp_path)
    for said in ("", "other version=1 data_format=1", "edgebroker", "edgebroker version=1 data_format=x", "\x1b[2J"):
        key.sign(program, said)
        with pytest.raises(EdgeBrokerError, match=r"the signature is for something else|not a signature") as refused:
            check_signature(program, tmp_path / "program.minisig", [key.public])
        assert "\x1b" not in str(refused.value)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.integers(0, 73), st.integers(1, 255), st.sampled_from([1, 3]))
def test_a_byte_that_changed(tmp_path: Path, position: int, flipped: int, line: int) -> None:
    lines = SIGNATURE.splitlines()
    packed = bytearray(b64decode(lines[line]))
    packed[position % len(packed)] ^= flipped
    lines[line] = b64encode(packed).decode()
    with pytest.raises(EdgeBrokerError):
        check_signature(*written(tmp_path, "\n".join(lines)), [PUBLIC])
