"""Who may do what: applications with tokens, programs of the machine, rules that change while clients are connected."""

from __future__ import annotations

import http.client
import socket
from base64 import b64decode
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgebroker.broker import listeners as listeners_module
from edgebroker.broker.access import access as access_module
from edgebroker.broker.access import access_admin
from edgebroker.broker.access.rights import ADMIN_RIGHTS
from edgebroker.broker.admin.routes import pipe_routes, routes
from edgebroker.broker.ports import FROM_ABOVE
from edgebroker.cli.main import main
from edgebroker.client.consumer import Consumer
from edgebroker.client.producer import Producer
from edgebroker.common.errors import AnswerError, Code, UnreachableError
from edgebroker.network.http.router import PASSED_ON, Call, Route, Router
from edgebroker.network.http.server import Request, Response
from tests.kit.brokers import RunningBroker, batch_of, running
from tests.kit.fleet_nodes import Fleet
from tests.kit.raw_client import SECONDS, RawClient
from tests.kit.trees import follows, publish
from tests.kit.waiting import wait_for

pytestmark = pytest.mark.slow


@pytest.fixture
def root(fleet: Fleet) -> RunningBroker:
    return fleet.root()


def app(root: RunningBroker, name: str, *allow: str, **wanted: object) -> str:
    """A token of an application."""
    status, answer = root.http("POST", f"/v1/access/{name}/tokens", {"allow": list(allow), **wanted})
    assert status == 201, answer
    return str(answer["token"])


def change(root: RunningBroker, name: str, **rules: list[str]) -> dict[str, Any]:
    status, answer = root.http("POST", f"/v1/access/{name}", rules)
    assert status == 200, answer
    return dict(answer)


@pytest.fixture
def credentials(tmp_path: Path) -> Callable[..., Path]:
    """The file of a token."""

    def written(root: RunningBroker, token: str, *, certificate: bool = True) -> Path:
        path = tmp_path / f"{token[4:12]}.credentials"
        pem = b64decode(root.http("GET", "/v1/trust/root")[1]["root"]) if certificate else b""
        path.write_bytes(token.encode() + b"\n" + pem)
        return path

    return written


def connected(node: RunningBroker, token: str = "", name: str = "app") -> RawClient:
    """A client of this machine, with a token."""
    client = node.raw(granted=False)
    client.connect(name, token=token.encode())
    return client


def refused_connect(node: RunningBroker, token: str) -> str:
    client = node.raw(granted=False)
    with pytest.raises(AssertionError) as refused:
        client.connect("app", token=token.encode())
    assert client.ended()
    return str(refused.value)


# ---- applications ----


def test_an_application_does_what_it_may(root: RunningBroker, credentials: Callable[..., Path]) -> None:
    """Over TLS, with the token and the certificate of the fleet in one file."""
    token = app(root, "till-app", "produce sales.*", "create sales.*", "consume prices as tills-*")
    path = credentials(root, token)
    root.create("prices")
    with root.producer(credentials=path, timeout=SECONDS) as producer:
        assert producer.send("sales.1", b"sold").result(SECONDS) == 0
        with pytest.raises(AnswerError, match="till-app may not produce to prices: it needs the right produce prices"):
            producer.send("prices", b"1").result(SECONDS)
        assert producer.send("sales.1", b"again").result(SECONDS) == 1
    said = r"till-app may not consume sales\.1: it needs the right consume sales\.1"
    with root.consumer(["sales.1"], credentials=path) as consumer, pytest.raises(AnswerError, match=said):
        consumer.poll(SECONDS)
    with root.producer() as own:  # a program of the machine of the node
        own.send("prices", b"1").result(SECONDS)
    said = "may not consume prices as others"
    with root.consumer(["prices"], "others", credentials=path) as consumer, pytest.raises(AnswerError, match=said):
        consumer.poll(SECONDS)
    with root.consumer(["prices"], "tills-1", credentials=path, start="earliest") as consumer:
        assert [record.value for record in consumer.poll(SECONDS)] == [b"1"]
    assert root.counters()["rights_missing"] >= 3
    assert root.refused(Code.UNAUTHORISED) >= 3


def test_a_topic_is_created_by_who_may(root: RunningBroker) -> None:
    client = connected(root, app(root, "writer", "produce *"))
    answer = client.publish("new", batch_of(b"v"))
    assert (answer.code, answer.message) == (
        Code.UNAUTHORISED,
        "writer may not create new: it needs the right create new",
    )
    assert root.http("GET", "/v1/topics/new")[0] == 404
    change(root, "writer", allow=["create n*"])
    assert client.publish("new", batch_of(b"v")).code is Code.OK


def test_a_client_id_belongs_to_its_application(root: RunningBroker) -> None:
    """Another one with the same name fences nobody."""
    first = connected(root, app(root, "one", "produce *", "create *"), "writer")
    second = connected(root, app(root, "two", "produce *"), "writer")
    for client in (first, second, root.raw("writer")):
        assert client.publish("t", batch_of(b"v")).code is Code.OK
    assert first.publish("t", batch_of(b"v")).code is Code.OK


@pytest.mark.parametrize("token", ["EBT.", "EBT.0123456789abcdef." + "A" * 43, "EBT.x.y", "EBT." + "\0" * 60])
def test_a_token_that_nobody_gave(root: RunningBroker, token: str) -> None:
    assert "the token is not known at this node" in refused_connect(root, token)
    assert root.counters()["access_refused"] == 1


def test_a_token_with_another_secret(root: RunningBroker) -> None:
    token = app(root, "x", "produce *")
    wrong = token[:-1] + ("A" if token[-1] != "A" else "B")
    assert "the token is not known at this node" in refused_connect(root, wrong)


def test_a_token_that_is_revoked_ends_connections(root: RunningBroker) -> None:
    token, other = app(root, "x", "produce *", "create *"), app(root, "x")
    client, kept = connected(root, token, "a"), connected(root, other, "b")
    assert client.publish("t", batch_of(b"v")).code is Code.OK
    assert main(["token", "revoke", token.split(".")[1], "--admin", root.admin]) == 0
    root.advance(1.5)
    assert client.ended()
    assert "not known" in refused_connect(root, token)
    assert kept.publish("t", batch_of(b"v")).code is Code.OK
    assert root.http("DELETE", f"/v1/trust/tokens/{token.split('.')[1]}")[0] == 404
    assert root.http("DELETE", "/v1/access/x")[0] == 200
    root.advance(1.5)
    assert kept.ended()


def test_a_token_expires(root: RunningBroker) -> None:
    soon = root.clock.wall_ms() + 600
    client = connected(root, app(root, "x", "produce *", "create *", expires_ms=soon))
    assert client.publish("t", batch_of(b"v")).code is Code.OK
    wait_for(lambda: root.clock.wall_ms() > soon, "it expires")
    root.advance(1.5)
    assert client.ended()
    assert "not known" in refused_connect(root, app(root, "y", expires_ms=soon))


def test_what_may_be_read_no_more_is_read_no_more(root: RunningBroker) -> None:
    """Who may read the rest goes on; who may not is cut within a second, and publishing ends at once."""
    token = app(root, "x", "consume *", "produce t")
    for topic in ("t", "u"):
        root.create(topic)
    one, two, writer = connected(root, token, "1"), connected(root, token, "2"), connected(root, token, "3")
    assert one.subscribe("t", "g1").code is Code.OK
    assert two.subscribe("u", "g2").code is Code.OK
    for client in (one, two):
        client.assigned()
    change(root, "x", deny=["consume t", "produce *"])
    assert writer.publish("t", batch_of(b"v")).code is Code.UNAUTHORISED
    root.advance(1.5)
    assert one.ended()
    assert root.raw("own").publish("u", batch_of(b"v")).code is Code.OK
    assert [record.value for record in two.deliver().records] == [b"v"]


def test_a_connection_is_of_one_principal(root: RunningBroker) -> None:
    """CONNECT again with another token would leave what the first one reads to nobody's rules."""
    root.create("t")
    token, other = app(root, "x", "consume t"), app(root, "y")
    client = connected(root, token)
    assert client.subscribe("t", "g").code is Code.OK
    client.connect("app", token=token.encode())
    with pytest.raises(AssertionError, match="this connection belongs to another principal or token"):
        client.connect("app", token=other.encode())
    assert client.ended()


def test_who_waits_for_a_partition_is_looked_at_as_well(root: RunningBroker) -> None:
    """It has none, and would get that of a member that is cut."""
    root.create("t")
    token = app(root, "x", "consume *")
    one, two = connected(root, token, "1"), connected(root, token, "2")
    for client in (one, two):
        assert client.subscribe("t", "g").code is Code.OK
    wait_for(lambda: len(root.http("GET", "/v1/groups/g")[1]["members"]) == 2, "both are members")
    change(root, "x", deny=["consume t"])
    root.advance(1.5)
    assert one.ended()
    assert two.ended()


def test_the_clients_of_an_application_are_its_own(root: RunningBroker) -> None:
    """Not those of a program of the machine that calls itself so."""
    app(root, "till-app")
    client = root.raw(granted=False)
    with pytest.raises(
        AssertionError, match="client ids that begin with till-app/ are those of the application till-app"
    ):
        client.connect("till-app/p1")
    assert root.raw("other/p1").publish("t", batch_of(b"v")).code is Code.OK


# ---- machines ----


def test_programs_of_other_machines_need_a_token(
    root: RunningBroker, monkeypatch: pytest.MonkeyPatch, credentials: Callable[..., Path]
) -> None:
    """In the clear nothing is heard; under TLS without a token nothing is done."""
    token = app(root, "far", "produce *", "create *")
    for module in (listeners_module, access_module):
        monkeypatch.setattr(module, "is_local", lambda peer: False)
    with root.producer(credentials=credentials(root, token), timeout=SECONDS) as producer:
        assert producer.send("t", b"v").result(SECONDS) == 0
    with Producer(root.server, timeout=1.0) as plain, pytest.raises(UnreachableError):
        plain.send("t", b"v").result(SECONDS)
    bare = credentials(root, "EBT.0123456789abcdef." + "A" * 43)
    said = "the token is not known at this node"
    with Producer(root.server, credentials=bare) as unknown, pytest.raises(AnswerError, match=said):
        unknown.send("t", b"v").result(SECONDS)


def test_an_address_with_too_many_failures_is_not_listened_to(
    root: RunningBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgebroker.broker.access import bans

    monkeypatch.setattr(bans, "is_local", lambda peer: False)
    for _ in range(bans.MOST_FAILURES):
        refused_connect(root, "EBT.none")
    with socket.create_connection(root.broker.listeners.tcp_address) as client:
        client.settimeout(SECONDS)
        assert client.recv(1) == b""
    root.advance(bans.FIRST_SECONDS + 1)
    assert "not known" in refused_connect(root, "EBT.none")


def test_a_token_counts_in_its_region_only(fleet: Fleet, root: RunningBroker) -> None:
    joining = fleet.token()
    hub = fleet.join("hub", "l2", "eu", "root", joining)
    stores = [fleet.join(f"store-{n}", "pos", f"eu/store-{n}", "hub", joining) for n in (1, 2)]
    wide = app(root, "wide", "produce sales.%store", "create sales.%store", "consume *")
    narrow = app(root, "narrow", "consume *", region="eu/store-1")
    publish(root, "prices", 0, 1)
    for store in stores:
        follows(root, store, "prices")
        follows(root, store, "__trust")
        wait_for(lambda store=store: store.http("GET", "/v1/access/narrow")[0] == 200, "it is in force")  # type: ignore[misc]
    for node in (root, hub, stores[1]):
        assert "is not for this region" in refused_connect(node, narrow)
    assert connected(stores[0], narrow).subscribe("prices", "g").code is Code.OK
    for number, store in enumerate(stores, 1):
        client = connected(store, wide)
        said = client.publish(f"sales.store-{number}", batch_of(b"v"))
        assert said.code is not Code.UNAUTHORISED
        assert client.publish("sales.store-3", batch_of(b"v")).code is Code.UNAUTHORISED
    # Rights are given at the root.
    status, answer = stores[0].http("POST", "/v1/access/wide", {"allow": ["admin"]})
    assert (status, answer["error"]) == (
        409,
        "rights and tokens are given at the root of a fleet: run this there",
    )
    # The last word of the root stands where the line is cut.
    assert root.http("DELETE", "/v1/access/narrow")[0] == 200
    wait_for(lambda: stores[0].http("GET", "/v1/access/narrow")[0] == 404, "it is gone there")
    assert "not known" in refused_connect(stores[0], narrow)


def test_rules_about_programs_of_the_machine(root: RunningBroker) -> None:
    """They may do everything as far as nothing denies it; the unix socket has names of its own."""
    root.create("t")
    local = root.raw("local")
    assert local.publish("t", batch_of(b"v")).code is Code.OK
    change(root, "local", deny=["produce *", "alter"])
    assert local.publish("t", batch_of(b"v")).code is Code.UNAUTHORISED
    assert root.http("GET", "/v1/topics")[0] == 200
    assert root.http("POST", "/v1/topics", {"name": "u"}) == (
        403,
        {"error": "local may not do this: it needs the right alter", "code": "UNAUTHORISED"},
    )
    with Producer(f"unix:{root.broker.listeners.clients_path}", timeout=SECONDS) as producer:
        assert producer.send("t", b"v").result(SECONDS) == 1
    # Whoever has the admin socket cannot shut themselves out.
    socket_path = f"unix:{root.broker.listeners.socket_path}"
    assert main(["access", "remove", "local", "produce *", "alter", "--admin", socket_path]) == 0
    assert local.publish("t", batch_of(b"v")).code is Code.OK


def test_own_topics_are_not_matched_by_patterns(root: RunningBroker) -> None:
    client = connected(root, app(root, "x", "consume *", "produce *"))
    assert client.subscribe("__trust", "g").code is Code.UNAUTHORISED
    assert client.publish("__trust", batch_of(b"v")).code is Code.UNAUTHORISED
    change(root, "x", allow=["consume __*", "produce __*"])
    assert client.subscribe("__trust", "g").code is Code.UNKNOWN_TOPIC
    assert client.publish("__trust", batch_of(b"v")).code is not Code.OK


# ---- administration ----


def ask(node: RunningBroker, method: str, path: str, token: str) -> tuple[int, str | None]:
    connection = http.client.HTTPConnection(*node.broker.listeners.http_address, timeout=SECONDS)
    try:
        connection.request(method, path, headers={"authorization": f"Bearer {token}"})
        response = connection.getresponse()
        response.read()
        return response.status, response.getheader("www-authenticate")
    finally:
        connection.close()


def test_administration_with_a_token(root: RunningBroker) -> None:
    viewer = app(root, "monitor", "view")
    assert ask(root, "GET", "/v1/node", viewer) == (200, None)
    assert ask(root, "GET", "/metrics", viewer) == (200, None)
    assert ask(root, "DELETE", "/v1/topics/t", viewer) == (403, None)
    assert ask(root, "GET", "/v1/node", "EBT.none") == (401, "Bearer")
    assert ask(root, "GET", "/v1/node", "something") == (401, "Bearer")
    assert ask(root, "GET", "/healthz", "EBT.none") == (200, None)
    # From node to node: the right of what is asked there, and not without end.
    nested = "/v1/via/x" * 8
    assert ask(root, "GET", f"/v1/via/x{nested}/v1/topics", viewer) == (403, None)
    assert ask(root, "GET", "/v1/via/x/v1/via/y/v1/topics", viewer) == (404, None)
    assert ask(root, "DELETE", "/v1/via/x/v1/via/y/v1/topics/t", viewer) == (403, None)


RIGHTS_OF_ROUTES = ("health", "metrics", *ADMIN_RIGHTS, PASSED_ON)
RIGHTS_OF_NODES = ("join", "health", "below", "hub", "peer")


def test_each_route_needs_a_right_of_each_kind_of_caller(root: RunningBroker) -> None:
    """Every row of the table, asked by everybody there is: nobody gets further than their right."""
    admin, pipe = root.call(lambda: tables_of(root))
    assert {route.right for route in admin} == set(RIGHTS_OF_ROUTES)
    assert {route.right for route in pipe} == set(RIGHTS_OF_NODES)
    levels = ["", *ADMIN_RIGHTS]
    tokens = {level: app(root, f"of-{level or 'nothing'}", *([level] if level else [])) for level in levels}
    change(root, "local", deny=["view"])
    reached: list[Call] = []
    harmless = [route._replace(handler=reached.append, request=None) for route in admin]
    router = root.call(lambda: Router(harmless, root.broker.access.refusal))
    for route in admin:
        path = route.path.replace("{path...}", "v1/topics/x").replace("{", "").replace("}", "")
        needed = {"health": "", "metrics": "view", PASSED_ON: passed_on(admin, route.method)}.get(
            route.right, route.right
        )
        for level, token in tokens.items():
            allowed = levels.index(level) >= levels.index(needed)
            assert asked(root, router, reached, route, path, token=token) == (0 if allowed else 403), (route, level)
        assert asked(root, router, reached, route, path, token="EBT.none") == (0 if needed == "" else 401), route
        assert asked(root, router, reached, route, path) == (0 if needed == "" else 403), route  # local
        assert asked(root, router, reached, route, path, identity="unix:root") == 0
        assert asked(root, router, reached, route, path, peer=FROM_ABOVE) == 0


def tables_of(root: RunningBroker) -> tuple[list[Route], list[Route]]:
    exposition = root.broker.exposition
    context = exposition._node
    return routes(context, exposition), pipe_routes(context)


def passed_on(table: list[Route], method: str) -> str:
    """What the topic at the other node needs."""
    found = [route.right for route in table if (route.method, route.path) == (method, "/v1/topics/{name}")]
    return found[0] if found else "admin"


def asked(root: RunningBroker, router: Router, reached: list[Call], route: Route, path: str, **who: str) -> int:
    """The status of a refusal; 0: the handler was reached."""
    answers: list[Response] = []
    reached.clear()
    request = Request(route.method, path, b"", "", "localhost", **who)  # type: ignore[arg-type]
    root.call(lambda: router.handle(request, answers.append))
    assert len(answers) + len(reached) == 1
    return answers[0].status if answers else 0


# ---- the verbs ----


def test_the_verbs(root: RunningBroker, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*words: str) -> tuple[int, str]:
        code = main([*words, "--admin", root.admin])
        caught = capsys.readouterr()
        return code, caught.out + caught.err

    assert run("access", "show") == (
        0,
        "no rules: programs of the machine of a node may do everything, those of other machines nothing\n",
    )
    file = tmp_path / "till.credentials"
    code, said = run("token", "create", "--app", "till", "--allow", "produce sales.%store", "--file", str(file))
    assert (code, file.stat().st_mode & 0o777) == (0, 0o600)
    assert said.startswith(f"{file}: token ")
    assert file.read_text().splitlines()[1] == "-----BEGIN CERTIFICATE-----"
    secret = file.read_text().splitlines()[0].rpartition(".")[2]
    assert run("token", "create", "--app", "till", "--file", str(file))[0] == 2
    assert run("token", "create", "--app", "till", "--hold")[0] == 2
    assert run("token", "create", "--join", "--allow", "view")[0] == 2
    code, said = run("token", "create", "--app", "other", "--region", "eu")
    assert said.startswith("EBT.")
    assert run("access", "grant", "till", "consume prices as tills")[0] == 0
    assert run("access", "deny", "till", "consume prices as tills-test")[0] == 0
    code, said = run("access", "show")
    assert said.splitlines()[1:] == [
        "other      eu      1       -",
        "till       (all)   1       deny consume prices as tills-test",
        "                           allow produce sales.%store",
        "                           allow consume prices as tills",
    ]
    assert run("access", "test", "till", "consume", "prices", "--group", "tills") == (0, "till may do this\n")
    assert run("access", "test", "till", "consume", "prices") == (
        1,
        "till may not consume prices: it needs the right consume prices\n",
    )
    assert run("access", "test", "local", "admin") == (0, "local may do this\n")
    assert run("access", "test", "till", "fly")[0] == 1
    code, said = run("access", "grant", "till", "eat prices")
    assert (code, said) == (
        1,
        "edgebroker: 'eat prices' is not a rule: write produce TOPICS, consume TOPICS [as GROUPS], create TOPICS, or "
        "one of view, alter, operate, admin\n",
    )
    assert run("access", "grant", "no/body", "view")[0] == 1
    assert run("token", "create", "--app", "local")[0] == 1
    code, said = run("token", "list")
    assert "app till" in said
    assert run("access", "remove", "till", "consume prices as tills")[0] == 0
    assert run("access", "delete", "till") == (0, "till is deleted\n")
    assert run("access", "delete", "till")[0] == 1
    # The secret is in the file alone.
    data = Path(root.config.node.data_dir)
    found = [path for path in data.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]
    assert found == []


def test_without_a_fleet_there_are_no_rights_to_give(tmp_path: Path) -> None:
    with running(tmp_path) as alone:
        status, answer = alone.http("POST", "/v1/access/x/tokens", {})
    assert status == 409
    assert answer["error"].endswith("at the root of a fleet: there is none yet (edgebroker fleet init)")


def test_changes_are_made_one_after_the_other(root: RunningBroker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each to what the one before it made; too many at a time are refused."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(8) as pool:
        done = list(pool.map(lambda n: root.http("POST", "/v1/access/x", {"allow": [f"produce t{n}"]})[0], range(16)))
    assert done == [200] * 16
    assert len(root.http("GET", "/v1/access/x")[1]["allow"]) == 16
    monkeypatch.setattr(access_admin, "MOST_WAITING", 0)
    assert root.http("POST", "/v1/access/x", {"allow": ["view"]})[0] == 503
    monkeypatch.setattr(access_admin, "MOST_PRINCIPALS", 1)
    said = root.http("POST", "/v1/access/y", {"allow": ["view"]})[1]["error"]
    assert said == "there may be 1 principals; delete some"


def test_rules_stand_after_a_restart(fleet: Fleet, root: RunningBroker) -> None:
    token = app(root, "x", "produce *", "create *")
    change(root, "x", deny=["produce b"])
    fleet.stop("root")
    again = fleet.start("root", "root")
    client = connected(again, token)
    assert client.publish("a", batch_of(b"v")).code is Code.OK
    assert client.publish("b", batch_of(b"v")).code is Code.UNAUTHORISED


# ---- credentials ----


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "are not those of an application"),
        ("EB1ABC", "are not those of an application"),
        ("EBT.0123456789abcdef." + "A" * 43 + "\nhello", "are not those of an application"),
        (
            "EBT.0123456789abcdef." + "A" * 43 + "\n-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
            "the certificate in the credentials cannot be read",
        ),
    ],
)
def test_credentials_that_cannot_be_used(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "credentials"
    path.write_text(text)
    with pytest.raises(ValueError, match=said):
        Producer("127.0.0.1:7420", credentials=path)
    with pytest.raises(ValueError, match=said):
        Consumer("127.0.0.1:7420", ["t"], credentials=path)


def test_credentials_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEBROKER_CREDENTIALS", str(tmp_path / "none"))
    with pytest.raises(ValueError, match="cannot be read: No such file or directory"):
        Producer("127.0.0.1:7420")


def test_the_broker_of_another_fleet_hears_nothing(
    root: RunningBroker, tmp_path: Path, credentials: Callable[..., Path]
) -> None:
    other = Fleet(tmp_path / "other")
    try:
        stranger = other.root()
        path = credentials(root, app(root, "x", "produce *"))
        with stranger.producer(credentials=path, timeout=1.0) as producer, pytest.raises(UnreachableError) as refused:
            producer.send("t", b"v").result(SECONDS)
        assert "TLS is not possible: the certificate of the peer is not valid" in str(refused.value)
        assert stranger.counters()["access_refused"] == 0
    finally:
        other.close()
    with running(tmp_path / "alone") as alone:
        with alone.producer(credentials=path, timeout=1.0) as producer, pytest.raises(UnreachableError) as refused:
            producer.send("t", b"v").result(SECONDS)
        assert "TLS is not possible" in str(refused.value)
