"""The helper process of a node: everything that needs keys and certificates, apart from the process that serves.

`edgebroker trust-worker DATA_DIR` reads a Task per line from standard input and writes a Result per line; it ends with
its input. The serving process starts it when there is something to do, so that it need not load `cryptography`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from edgebroker.common.errors import EdgeBrokerError, TrustError, UnreachableError
from edgebroker.trust.directory import TrustDirectory
from edgebroker.trust.issuing import Issuer, create_fleet, renew_own, rotate
from edgebroker.trust.joining import join
from edgebroker.trust.messages import (
    CreateFleet,
    CreateTokens,
    Issue,
    Join,
    JoinRefusedError,
    ListTokens,
    RenewOwn,
    Result,
    RevokeToken,
    Rotate,
    SetState,
    ShowFleet,
    Sign,
    Signed,
    Task,
    Verify,
)
from edgebroker.trust.records import signed_text, verify_records


class TrustWorker:
    """Does tasks, one after the other."""

    def __init__(self, directory: TrustDirectory) -> None:
        self._directory = directory
        self._issuer: Issuer | None = None

    def answer(self, line: bytes) -> bytes:
        """The result of a task, for which something is always said."""
        try:
            value = self._do(msgspec.json.decode(line, type=Task))
        except JoinRefusedError as refused:
            return msgspec.json.encode(Result(error=str(refused), code=refused.code))
        except EdgeBrokerError as error:
            code = "UNREACHABLE" if isinstance(error, UnreachableError) else "TRUST"
            return msgspec.json.encode(Result(error=str(error), code=code))
        except OSError as error:
            return msgspec.json.encode(Result(error=f"{error.filename or 'trust'}: {error.strerror}", code="SYSTEM"))
        except Exception as error:  # a defect: whoever waits has to hear of it
            return msgspec.json.encode(Result(error=f"a defect in the helper process: {error!r}", code="SYSTEM"))
        return msgspec.json.encode(Result(value=msgspec.Raw(msgspec.json.encode(value))))

    def _do(self, task: Task) -> object:
        if isinstance(task, CreateFleet):
            create_fleet(self._directory, task.fleet, task.uid, task.now_ms)
            return None
        if isinstance(task, Join):
            return join(self._directory, task).issued
        if isinstance(task, Verify):
            return verify_records(self._directory.root.read_bytes(), task.issuers, task.records)
        if isinstance(task, Rotate):
            self._close_issuer()
            return rotate(self._directory, task.now_ms)
        if isinstance(task, RenewOwn):
            return renew_own(self._directory, self._opened(), task.uid, task.now_ms).issued
        return self._issue(task, self._opened())

    def _issue(
        self, task: ShowFleet | Issue | CreateTokens | ListTokens | RevokeToken | SetState | Sign, issuer: Issuer
    ) -> object:
        if isinstance(task, Issue):
            return issuer.join(task.request, task.now_ms)
        if isinstance(task, CreateTokens):
            return issuer.create_tokens(task.wanted)
        if isinstance(task, ShowFleet):
            return issuer.view()
        if isinstance(task, ListTokens):
            return issuer.tokens()
        if isinstance(task, RevokeToken):
            issuer.revoke_token(task.id)
            return None
        if isinstance(task, SetState):
            return issuer.set_state(task.nodes, task.state)
        signed = [issuer.sign(signed_text(key, value)) for key, value in task.records]
        return Signed(issuer=issuer.number, certificate=issuer.certificate_pem, signatures=signed)

    def _opened(self) -> Issuer:
        if self._issuer is None:
            if not self._directory.issues:
                raise TrustError("certificates are not issued here; ask the root of the fleet")
            self._issuer = Issuer(self._directory)
        return self._issuer

    def _close_issuer(self) -> None:
        if self._issuer is not None:
            self._issuer.close()
            self._issuer = None


def main(arguments: Sequence[str]) -> int:
    """Answer the lines of standard input."""
    worker = TrustWorker(TrustDirectory(Path(arguments[0])))
    for line in sys.stdin.buffer:
        sys.stdout.buffer.write(worker.answer(line) + b"\n")
        sys.stdout.buffer.flush()
    return 0
