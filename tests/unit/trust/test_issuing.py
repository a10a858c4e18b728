"""Who gets a certificate: with a token, once for each use, and for nothing else than what the token is for."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from edgebroker.common.errors import TrustError
from edgebroker.common.runtime.durable import write_durable
from edgebroker.trust import certificates, issuing
from edgebroker.trust.directory import TrustDirectory, erase_if_told
from edgebroker.trust.issuing import (
    HELD,
    JOINED,
    REVOKED,
    Issuer,
    create_fleet,
    export_root_key,
    import_root_key,
    rotate,
)
from edgebroker.trust.keys import digest, make_key, read_key, write_key
from edgebroker.trust.messages import JoinRefusedError, SignedRecord
from edgebroker.trust.node_name import NodeName, contains, parse_node_name
from edgebroker.trust.records import signed_text, verify_records
from edgebroker.trust.token import make_token, parse_token
from tests.kit.fleets import NOW_MS, ROOT_UID, TestFleet

A, B = "a" * 32, "b" * 32
DAY_MS = 86_400_000


@pytest.fixture
def fleet(tmp_path: Path) -> TestFleet:
    return TestFleet(tmp_path)


# ---- names ----


@pytest.mark.parametrize("name", [NodeName("acme", "root", "", A), NodeName("a.b", "local", "eu/north/store-12", B)])
def test_names_are_read_as_they_are_written(name: NodeName) -> None:
    assert parse_node_name(str(name)) == name


@pytest.mark.parametrize(
    "text",
    ["", "http://acme/root/" + A, "edgebroker://acme/" + A, "edgebroker://acme/boss/eu/" + A, "edgebroker://acme/pos/eu/x",
     f"edgebroker:///pos/{A}", f"edgebroker://acme/pos/e u/{A}", f"edgebroker://acme/pos//{A}", f"edgebroker://acme/pos/eu/{A.upper()}"],
)  # fmt: skip
def test_what_is_no_name(text: str) -> None:
    assert parse_node_name(text) is None


def test_regions() -> None:
    assert contains("", "eu") and contains("eu", "eu") and contains("eu", "eu/1")
    assert not contains("eu", "") and not contains("eu", "europe") and not contains("eu/1", "eu/2")


# ---- tokens ----


def test_a_token_is_read_however_it_was_typed() -> None:
    token = make_token(os.urandom(16))
    text = str(token)
    assert len(text) == 83
    for typed in (text, text.lower(), f" {text[:20]} {text[20:]}\n", "-".join((text[:3], text[3:40], text[40:]))):
        assert parse_token(typed) == token


def test_a_letter_that_is_wrong_is_noticed() -> None:
    text = str(make_token(os.urandom(16)))
    for place in range(len(text)):
        other = "B" if text[place] == "A" else "A"
        for wrong in (text[:place] + other + text[place + 1 :], text[:place] + text[place + 1 :]):
            with pytest.raises(TrustError, match="not a join token"):
                parse_token(wrong)


# ---- joining ----


def refused(fleet: TestFleet, token: str, uid: str = A, **what: object) -> str:
    machine = fleet.machine(uid, **{key: what.pop(key) for key in ("level", "region") if key in what})  # type: ignore[arg-type]
    now_ms = int(what.pop("now_ms", NOW_MS))  # type: ignore[call-overload]
    with pytest.raises(JoinRefusedError) as error:
        fleet.issuer.join(fleet.request(machine, token, **what), now_ms)
    return str(error.value)


def test_a_machine_joins_and_renews(fleet: TestFleet) -> None:
    token = fleet.token(region="eu", uses=1)
    machine = fleet.machine(A)
    fleet.join(machine, token)
    name, issued = machine.directory.identity() or (None, None)
    assert name == NodeName("acme", "local", "eu/1", A)
    assert issued is not None and issued.expires_ms - NOW_MS == pytest.approx(90 * DAY_MS, abs=2000)
    fleet.join(machine, token)
    assert fleet.issuer.tokens()[0].used == 1, "the same key again is no other use"
    fleet.join(machine, now_ms=NOW_MS + 400 * DAY_MS)
    renewed = (machine.directory.identity() or (None, None))[1]
    assert renewed is not None and renewed.expires_ms > NOW_MS + 480 * DAY_MS, "also after it expired"


def test_uses_are_counted(fleet: TestFleet) -> None:
    token = fleet.token(uses=2)
    for uid in (A, B):
        fleet.join(fleet.machine(uid), token)
    assert refused(fleet, token, "c" * 32) == "the token is used up: 2 nodes have joined with it"


def test_what_a_token_is_not_for(fleet: TestFleet) -> None:
    token = fleet.token(levels=["pos", "local"], region="eu/1", expires_ms=NOW_MS + 1000)
    assert refused(fleet, token, level="l3") == "the token is not for level l3, only for pos,local"
    assert refused(fleet, token, region="eu/2") == "the token is for region eu/1, not for eu/2"
    assert refused(fleet, token, region="eu") == "the token is for region eu/1, not for eu"
    assert refused(fleet, token, region="") == "the token is for region eu/1, not for every region"
    assert refused(fleet, token, now_ms=NOW_MS + 1001) == "the token has expired"
    fleet.issuer.revoke_token(fleet.issuer.tokens()[0].id)
    assert refused(fleet, token).startswith("the token is not known here")
    with pytest.raises(TrustError, match="there is no token"):
        fleet.issuer.revoke_token("zz")


@pytest.mark.parametrize(
    "claim", [{"region": "eu/1/x"}, {"level": "pos"}, {"uid": B}, {"csr": True}, {"server": b"x" * 32}]
)
def test_a_proof_is_for_one_request(fleet: TestFleet, claim: dict[str, object]) -> None:
    """A node on the way cannot use it for another key, nor for somebody else."""
    token = fleet.token()
    if "csr" in claim:
        claim = {"csr": certificates.make_request(make_key())}
    machine = fleet.machine(A)
    request = fleet.request(machine, token, **claim)
    with pytest.raises(JoinRefusedError, match="the proof does not fit"):
        fleet.issuer.join(request, NOW_MS)
    assert fleet.issuer.tokens()[0].used == 0


def test_through_somebody_who_is_no_node(fleet: TestFleet) -> None:
    """It would have a certificate of the fleet, and be none of its nodes: revoked, perhaps."""
    token = fleet.token()
    hub = fleet.admit(B, "l2", "eu")
    machine = fleet.machine(A)
    from tests.kit import fleets

    csr = certificates.make_request(read_key(machine.directory.key))
    server = digest(read_key(hub.directory.key).public_key())
    parsed = parse_token(token)
    request = fleet.request(machine, token, csr=csr, server=server)
    fits = fleets.proof(parsed.key, csr, server, *request.claims())
    request = fleet.request(machine, token, csr=csr, server=server, proof=fits)
    fleet.issuer.set_state([B], REVOKED)
    with pytest.raises(JoinRefusedError, match="not a node of this fleet"):
        fleet.issuer.join(request, NOW_MS)
    fleet.issuer.set_state([B], JOINED)
    fleet.issuer.join(request, NOW_MS)


def test_the_identity_of_another_machine(fleet: TestFleet) -> None:
    token = fleet.token()
    fleet.join(fleet.machine(A), token)
    thief = TestFleet(fleet.path / "elsewhere").machine(A)
    with pytest.raises(JoinRefusedError, match="has another key"):
        fleet.issuer.join(fleet.request(thief, token), NOW_MS)
    with pytest.raises(JoinRefusedError, match="has another key"):
        fleet.issuer.join(fleet.request(fleet.machine(ROOT_UID), token), NOW_MS)


def test_another_level_or_region_is_another_node(fleet: TestFleet) -> None:
    fleet.join(fleet.machine(A), fleet.token())
    for changes in ({"level": "pos"}, {"region": "eu"}):
        assert "joined as local in eu/1" in refused(fleet, "", **changes)


def test_revoked_and_held(fleet: TestFleet) -> None:
    machine = fleet.machine(A)
    fleet.join(machine, fleet.token())
    with pytest.raises(TrustError, match=f"no node {B} has joined"):
        fleet.issuer.set_state([A, B], REVOKED)
    assert fleet.issuer.set_state([A], REVOKED) == [A]
    assert refused(fleet, "") == refused(fleet, fleet.token()) == f"node {A} was revoked"
    fleet.issuer.set_state([A], JOINED)
    fleet.join(machine)
    waiting = fleet.machine(B)
    held = fleet.token(hold=True)
    assert refused(fleet, held, B) == refused(fleet, held, B) == "it waits for approval (edgebroker node approve)"
    assert fleet.issuer._node(B).state == HELD  # type: ignore[union-attr]
    fleet.issuer.set_state([B], JOINED)
    fleet.join(waiting)


@pytest.mark.parametrize("csr", [b"", b"x", os.urandom(300)])
def test_what_is_no_request(fleet: TestFleet, csr: bytes) -> None:
    assert "cannot be read" in refused(fleet, fleet.token(), csr=csr)


def test_a_request_with_the_signature_of_another_key(fleet: TestFleet) -> None:
    csr = bytearray(certificates.make_request(make_key()))
    csr[-5] ^= 1
    assert refused(fleet, fleet.token(), csr=bytes(csr)).startswith("the request for a certificate")


# ---- the fleet itself ----


def test_an_issuer_is_replaced_and_the_pin_stays(fleet: TestFleet) -> None:
    before = fleet.admit(A)
    pin = fleet.issuer.pin
    assert rotate(fleet.root.directory, NOW_MS) == 2
    issuer = Issuer(fleet.root.directory)
    assert (issuer.number, issuer.pin) == (2, pin)
    renewed = issuer.join(fleet.request(before, ""), NOW_MS)
    leaf, signer = certificates.from_pem(renewed.chain)
    [root] = certificates.from_pem(renewed.root)
    assert certificates.signed_by(leaf, signer) and certificates.signed_by(signer, root)
    assert not certificates.signed_by(leaf, root)
    assert parse_token(fleet.token()).pin == pin, "tokens of before are good"


def test_rotation_needs_the_root_key(fleet: TestFleet) -> None:
    fleet.root.directory.root_key.unlink()
    with pytest.raises(TrustError, match="the root key is not here"):
        rotate(fleet.root.directory, NOW_MS)


def test_the_root_key_is_taken_away_and_put_back(fleet: TestFleet, tmp_path: Path) -> None:
    directory, file, passphrase = fleet.root.directory, tmp_path / "root.key", b"correct horse battery"
    before = read_key(directory.root_key).private_numbers()
    export_root_key(directory, file, passphrase)
    assert not directory.root_key.exists()
    assert file.stat().st_mode & 0o777 == 0o600
    assert b"ENCRYPTED" in file.read_bytes()
    with pytest.raises(TrustError, match="exists: name a file that does not"):
        export_root_key(directory, file, passphrase)
    with pytest.raises(TrustError, match="the root key is not here; it was taken away"):
        export_root_key(directory, tmp_path / "other", passphrase)
    for wrong, why in ((b"", "has a passphrase"), (b"wrong", "the passphrase is wrong")):
        with pytest.raises(TrustError, match=why):
            import_root_key(directory, file, wrong)
    assert not directory.root_key.exists()
    import_root_key(directory, file, passphrase)
    assert read_key(directory.root_key).private_numbers() == before
    assert rotate(directory, NOW_MS) == 2


def test_the_root_key_of_another_fleet_is_not_taken(fleet: TestFleet, tmp_path: Path) -> None:
    other, passphrase = TrustDirectory(tmp_path / "other"), b"correct horse battery"
    create_fleet(other, "acme", ROOT_UID, NOW_MS)
    export_root_key(other, tmp_path / "root.key", passphrase)
    with pytest.raises(TrustError, match="has the key of another fleet"):
        import_root_key(fleet.root.directory, tmp_path / "root.key", passphrase)


def test_the_root_key_stays_while_its_copy_is_not_whole(
    fleet: TestFleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No space for the file, or not the bytes that were written."""
    directory = fleet.root.directory
    with pytest.raises(TrustError, match="No such file or directory"):
        export_root_key(directory, tmp_path / "none" / "root.key", b"correct horse battery")

    def torn(path: Path, data: bytes, mode: int) -> None:
        write_durable(path, data[:100], mode=mode)

    monkeypatch.setattr(issuing, "write_durable", torn)
    with pytest.raises(TrustError, match="does not hold a key"):
        export_root_key(directory, tmp_path / "root.key", b"correct horse battery")
    assert directory.root_key.exists() and not (tmp_path / "root.key").exists()


def test_creating_a_fleet_goes_on_where_it_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process is gone behind every file, and is started again."""
    from edgebroker.common.runtime import durable

    class GoneError(Exception):
        pass

    real = os.rename
    names: set[str] = set()
    for step in range(1, 20):
        directory = TrustDirectory(tmp_path / str(step))
        left = [step]

        def rename(source: Path, target: Path, left: list[int] = left) -> None:
            real(source, target)
            left[0] -= 1
            if not left[0]:
                raise GoneError

        monkeypatch.setattr(durable.os, "rename", rename)
        try:
            create_fleet(directory, "acme", A, NOW_MS)
        except GoneError:
            monkeypatch.setattr(durable.os, "rename", real)
            create_fleet(directory, "acme", A, NOW_MS)
        else:
            break
        names.add(str(directory.identity()))
        assert directory.identity() is not None
        assert Issuer(directory).number == 1
    assert step == 6, "as many files"


def test_what_is_said_about_a_fleet_that_is_there(fleet: TestFleet) -> None:
    create_fleet(fleet.root.directory, "acme", ROOT_UID, NOW_MS)
    with pytest.raises(TrustError, match="belongs to the fleet acme already"):
        create_fleet(fleet.root.directory, "other", ROOT_UID, NOW_MS)
    machine = fleet.admit(A)
    machine.directory.certificate.unlink()
    with pytest.raises(TrustError, match="its root is another node"):
        create_fleet(machine.directory, "acme", A, NOW_MS)
    with pytest.raises(TrustError, match="cannot be called"):
        create_fleet(TrustDirectory(fleet.path / "new"), "a b", A, NOW_MS)


def test_keys_that_others_may_read(fleet: TestFleet) -> None:
    machine = fleet.admit(A)
    machine.directory.key.chmod(0o640)
    for use in (machine.directory.identity, lambda: read_key(machine.directory.key)):
        with pytest.raises(TrustError, match="run: chmod 600"):
            use()


def test_files_that_are_missing_or_damaged(fleet: TestFleet) -> None:
    machine = fleet.admit(A)
    assert TrustDirectory(fleet.path / "none").identity() is None
    good = machine.directory.certificate.read_bytes()
    machine.directory.certificate.write_bytes(b"x" + good)
    with pytest.raises(TrustError, match="is damaged"):
        machine.directory.identity()
    machine.directory.certificate.write_bytes(good)
    machine.directory.root.unlink()
    with pytest.raises(TrustError, match=r"root.crt is missing"):
        machine.directory.identity()
    machine.directory.key.write_bytes(b"x")
    with pytest.raises(TrustError, match="does not hold a key"):
        read_key(machine.directory.key)


def test_erasing(fleet: TestFleet) -> None:
    """Keys are overwritten before they are removed; nothing happens to who was not told."""
    directory = fleet.admit(A).directory
    data_dir = directory.path.parent
    (data_dir / "topics").mkdir()
    (data_dir / "topics" / "x").write_bytes(b"x")
    assert not erase_if_told(data_dir)
    assert (data_dir / "topics" / "x").exists()
    directory.erasing.touch()
    fd = os.open(directory.key, os.O_RDONLY)
    assert erase_if_told(data_dir)
    assert os.pread(fd, 10_000, 0).strip(b"\0") == b"", "overwritten before it was removed"
    os.close(fd)
    assert list(data_dir.iterdir()) == []


def test_erasing_goes_on_behind_what_cannot_be_removed(
    fleet: TestFleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = fleet.admit(A).directory
    data_dir = directory.path.parent
    for name in ("a", "lost+found", "z"):
        (data_dir / name).mkdir()
        (data_dir / name / "x").write_bytes(b"x")
    outside = tmp_path / "outside"
    outside.write_text("stays")
    (data_dir / "link").symlink_to(outside)
    directory.erasing.touch()
    rmdir = os.rmdir

    def kept(path: object, **options: Any) -> None:
        if str(path).endswith("lost+found"):
            raise PermissionError(13, "Permission denied", str(path))
        rmdir(path, **options)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(os, "rmdir", kept)
        with pytest.raises(OSError, match="Permission denied"):
            erase_if_told(data_dir)
    assert sorted(path.name for path in data_dir.iterdir()) == ["lost+found", "trust"]
    assert [path.name for path in directory.path.iterdir()] == ["erasing"]
    assert erase_if_told(data_dir)
    assert (list(data_dir.iterdir()), outside.read_text()) == ([], "stays")
    # Where the word cannot be written down, it counts all the same.
    again = fleet.admit("b" * 32).directory
    assert erase_if_told(again.path.parent, told=True)
    assert list(again.path.parent.iterdir()) == []


# ---- records of __trust ----


def test_records_are_signed_by_issuers_of_the_root(fleet: TestFleet, tmp_path: Path) -> None:
    other = TestFleet(tmp_path / "other")
    key, value = f"revoked/{A}", b'{"serial":1}'

    def record(by: TestFleet, key: str = key, value: bytes = value, number: int = 1) -> SignedRecord:
        text = signed_text(f"revoked/{A}", b'{"serial":1}')
        return SignedRecord(key=key, value=value, issuer=number, signature=by.issuer.sign(text))

    def issuer(by: TestFleet, number: int = 1) -> SignedRecord:
        return SignedRecord(key=f"issuer/{number}", value=by.issuer.certificate_pem, issuer=0, signature=b"")

    root = fleet.root.directory.root.read_bytes()
    good = [issuer(fleet), record(fleet)]
    assert verify_records(root, {}, good) == [True, True]
    assert verify_records(root, {1: fleet.issuer.certificate_pem}, [record(fleet)]) == [True]
    assert verify_records(root, {}, [record(fleet)]) == [False], "by an issuer that is not known"
    bad = [
        record(other),
        record(fleet, key=f"revoked/{B}"),
        record(fleet, value=b'{"serial":2}'),
        record(fleet, number=2),
        issuer(other),
        issuer(fleet, 2),
        SignedRecord(key="issuer/x", value=b"x", issuer=0, signature=b""),
        SignedRecord(key=f"revoked/{A}", value=value, issuer=1, signature=b""),
    ]
    assert verify_records(root, {1: fleet.issuer.certificate_pem}, bad) == [False] * len(bad)


def test_a_key_with_a_passphrase(tmp_path: Path) -> None:
    from edgebroker.trust.keys import key_to_pem

    path = tmp_path / "key"
    path.write_bytes(key_to_pem(make_key(), b"secret"))
    path.chmod(0o600)
    read_key(path, b"secret")
    for wrong in (b"", b"other"):
        with pytest.raises(TrustError, match="passphrase"):
            read_key(path, wrong)
    write_key(path, make_key())
    with pytest.raises(TrustError, match="no passphrase"):
        read_key(path, b"secret")
