"""What openssl s_client finds at the doors of a node: versions, ciphers, renegotiation, and whom it believes."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

from tests.kit.brokers import RunningBroker
from tests.kit.fleet_nodes import Fleet
from tests.kit.raw_client import SECONDS

pytestmark = [pytest.mark.slow, pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")]


@pytest.fixture
def root(fleet: Fleet) -> RunningBroker:
    return fleet.root()


def s_client(address: str, *options: str, said: str = "Q\n") -> str:
    """What it prints. Q ends it."""
    run = subprocess.run(
        ["openssl", "s_client", "-connect", address, *options],
        input=said,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    return run.stdout + run.stderr


def cipher_of(printed: str) -> str:
    found = re.search(r"^New, \S+, Cipher is (\S+)$", printed, re.MULTILINE)
    return found[1] if found is not None else "(NONE)"


def doors(root: RunningBroker) -> dict[str, str]:
    return {"clients": root.server, "nodes": root.parent_address}


def test_versions_and_whom_it_believes(root: RunningBroker) -> None:
    certificate = str(root.broker.trust.directory.root)
    for address in doors(root).values():
        for version, name in (("-tls1_3", "TLSv1.3"), ("-tls1_2", "TLSv1.2")):
            printed = s_client(address, version, "-CAfile", certificate, "-verify_return_error")
            assert "Verification: OK" in printed or "Verify return code: 0 (ok)" in printed
            assert f"New, {name}, Cipher is" in printed
            assert "Compression: NONE" in printed
        for version in ("-tls1_1", "-tls1"):
            printed = s_client(address, version, "-cipher", "ALL:@SECLEVEL=0")
            assert cipher_of(printed) in ("(NONE)", "0000"), printed
        stranger = s_client(address, "-verify_return_error")  # without the certificate of the fleet
        assert re.search("verify error:num=(18|19|20)", stranger), stranger


def test_only_ciphers_that_keep_a_secret(root: RunningBroker) -> None:
    """Every suite that openssl knows, offered alone: taken are those with ephemeral keys and this certificate."""
    listed = subprocess.run(
        ["openssl", "ciphers", "-s", "-tls1_2", "ALL:COMPLEMENTOFALL:@SECLEVEL=0"],
        capture_output=True, text=True, check=True,
    ).stdout.strip().split(":")  # fmt: skip
    names = [name for name in listed if not name.startswith("TLS_")]
    assert len(names) > 20

    def is_taken(name: str) -> bool:
        return cipher_of(s_client(root.parent_address, "-tls1_2", "-cipher", f"{name}:@SECLEVEL=0")) == name

    taken = [name for name in names if is_taken(name)]
    assert "ECDHE-ECDSA-AES256-GCM-SHA384" in taken
    assert [name for name in taken if not name.startswith("ECDHE-ECDSA-")] == []
    assert [name for name in taken if re.search("NULL|RC4|DES|EXP|MD5|ADH|ARIA|CAMELLIA", name)] == []


def test_no_renegotiation(root: RunningBroker) -> None:
    """R asks for it."""
    printed = s_client(root.parent_address, "-tls1_2", said="R\n")
    assert "no renegotiation" in printed or "no_renegotiation" in printed, printed
