"""What nodes, and a node and its helper process, say to each other about trust. All JSON; bytes are base64."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from edgebroker.trust.directory import Issued

ROOT_PATH, JOIN_PATH = "/v1/trust/root", "/v1/trust/join"
MAX_JOIN_BYTES = 16 << 10
_Uid = Annotated[str, Meta(pattern=r"\A[0-9a-f]{32}\Z")]
_Level = Annotated[str, Meta(pattern=r"\A(root|l2|l3|pos|local)\Z")]
Region = Annotated[str, Meta(max_length=120, pattern=r"\A([A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)*)?\Z")]
Milliseconds = Annotated[int, Meta(ge=0, le=1 << 53)]


class JoinRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of POST /v1/trust/join: a request for a certificate. `token` is the id of a token and `proof` that the
    node has it; both are empty for a key that had a certificate before. `server` is the SHA-256 of the public key of
    the node that was asked."""

    csr: Annotated[bytes, Meta(max_length=2048)]
    uid: _Uid
    name: Annotated[str, Meta(max_length=255)]
    level: _Level
    region: Region = ""
    server: Annotated[bytes, Meta(max_length=32)] = b""
    token: Annotated[bytes, Meta(max_length=8)] = b""
    proof: Annotated[bytes, Meta(max_length=32)] = b""

    def claims(self) -> tuple[bytes, ...]:
        """What the node says that it is."""
        return self.uid.encode(), self.level.encode(), self.region.encode()


class Certified(msgspec.Struct, frozen=True, kw_only=True):
    """The answer: a certificate and its issuer, and the root (PEM)."""

    issued: Issued
    chain: bytes
    root: bytes


class Chain(msgspec.Struct, frozen=True):
    """The answer to GET /v1/trust/root: the certificate of the fleet (PEM)."""

    root: bytes


class JoinRefusedError(Exception):
    """A certificate is not given, for this reason. `code`: HELD, not yet; REVOKED, never again; ERASE, and everything
    is to be erased; JOIN_REFUSED. `said`: the answer, as it came."""

    def __init__(self, why: str, code: str = "JOIN_REFUSED", said: bytes = b"") -> None:
        super().__init__(why)
        self.code, self.said = code, said


class TokenRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A token to be made. `expires_ms` 0: never; `hold`: who joins with it waits for approval."""

    levels: Annotated[list[_Level], Meta(min_length=1, max_length=4)]
    region: Region = ""
    label: Annotated[str, Meta(max_length=80)] = ""
    uses: Annotated[int, Meta(ge=1, le=1_000_000)] = 1
    expires_ms: Milliseconds = 0
    hold: bool = False


class TokenInfo(msgspec.Struct, kw_only=True):
    """A token as it is shown: without its secret, which is not known here any more."""

    id: str
    levels: list[str]
    region: str
    label: str
    uses: int
    used: int
    expires_ms: int
    hold: bool


class SignedRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A record of __trust: its key, its value, who signed it and the signature."""

    key: str
    value: bytes
    issuer: int
    signature: bytes


class RevokedAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to a node that was revoked: the record, and the certificate (PEM) of the issuer that signed it."""

    error: str
    record: SignedRecord
    issuer: bytes
    code: str = "REVOKED"


# ---- to the helper process ----


class CreateFleet(msgspec.Struct, frozen=True, kw_only=True, tag="create-fleet"):
    fleet: str
    uid: str
    now_ms: int


class RenewOwn(msgspec.Struct, frozen=True, kw_only=True, tag="renew-own"):
    """Renew the certificate of the node that issues them."""

    uid: str
    now_ms: int


class Join(msgspec.Struct, frozen=True, kw_only=True, tag="join"):
    """Get a certificate for this node from one of these addresses. Without a token: for the key that it has. `retired`
    are issuers that do not count, `serial` is that of what is in force about this node: older words do not count."""

    addresses: list[str]
    token: str
    fleet: str
    uid: str
    name: str
    level: str
    region: str
    retired: list[int] = []
    serial: int = 0


class Issue(msgspec.Struct, frozen=True, kw_only=True, tag="issue"):
    request: JoinRequest
    now_ms: int


class CreateTokens(msgspec.Struct, frozen=True, kw_only=True, tag="create-tokens"):
    wanted: list[TokenRequest]


class ListTokens(msgspec.Struct, frozen=True, kw_only=True, tag="list-tokens"):
    pass


class RevokeToken(msgspec.Struct, frozen=True, kw_only=True, tag="revoke-token"):
    id: str


class SetState(msgspec.Struct, frozen=True, kw_only=True, tag="set-state"):
    """Revoke or approve nodes, by name or uid."""

    nodes: list[str]
    state: str


class LabelInfo(msgspec.Struct, frozen=True, kw_only=True):
    """The tokens with one label: how many nodes have joined with them, of how many that may."""

    label: str
    joined: int
    uses: int


class WaitingNode(msgspec.Struct, frozen=True, kw_only=True):
    """A node, as it asked."""

    uid: str
    name: str
    level: str
    region: str


class FleetBook(msgspec.Struct, frozen=True, kw_only=True):
    """What the book of the root says: nodes by state, the first that wait for approval, tokens by label."""

    joined: int
    held: int
    revoked: int
    waiting: list[WaitingNode]
    labels: list[LabelInfo]


class ShowFleet(msgspec.Struct, frozen=True, kw_only=True, tag="show-fleet"):
    """What does the book say?"""


class Rotate(msgspec.Struct, frozen=True, kw_only=True, tag="rotate"):
    now_ms: int


class Sign(msgspec.Struct, frozen=True, kw_only=True, tag="sign"):
    """Sign records: keys and values."""

    records: list[tuple[str, bytes]]


class Signed(msgspec.Struct, frozen=True, kw_only=True):
    """The answer: the signatures, and the issuer that made them with its certificate (PEM)."""

    issuer: int
    certificate: bytes
    signatures: list[bytes]


class Verify(msgspec.Struct, frozen=True, kw_only=True, tag="verify"):
    """Which of these are signed by issuers (number -> certificate, PEM) that the root signed."""

    records: list[SignedRecord]
    issuers: dict[int, bytes]


Task = (
    CreateFleet
    | ShowFleet
    | RenewOwn
    | Join
    | Issue
    | CreateTokens
    | ListTokens
    | RevokeToken
    | SetState
    | Rotate
    | Sign
    | Verify
)


class Result(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The answer to a task: what was asked for, or an error and its code: JOIN_REFUSED, HELD, REVOKED, ERASE,
    UNREACHABLE."""

    value: msgspec.Raw = msgspec.Raw(b"null")
    error: str = ""
    code: str = ""
