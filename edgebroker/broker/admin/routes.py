"""Every route of the two HTTP interfaces, one row each; docs/protocol.md says what they do."""

from __future__ import annotations

from typing import Any

from edgebroker.broker.access.access_admin import (
    MAX_ACCESS_BYTES,
    AccessAdmin,
    AccessChange,
    AccessList,
    AccessTest,
    AppTokenRequest,
    NewAppToken,
    PrincipalInfo,
    TenantList,
)
from edgebroker.broker.admin.context import AdminContext
from edgebroker.broker.admin.exposition import Exposition
from edgebroker.broker.admin.fleet import FleetAdmin, PinRequest, Removed, ResyncList, ResyncRequest
from edgebroker.broker.admin.groups import ClientList, GroupAdmin, GroupList, GroupStatus, OffsetChanges
from edgebroker.broker.admin.node import (
    Alive,
    Backup,
    HolderList,
    NodeAdmin,
    NodeReport,
    PipeStatus,
    PromoteRequest,
    Repaired,
)
from edgebroker.broker.admin.offsets import GroupOperations, MoveRequest, RefreshRequest
from edgebroker.broker.admin.peers import PeerAdmin
from edgebroker.broker.admin.topics import (
    DeletedTopicList,
    NewName,
    NewTopic,
    SnapshotBegun,
    SnapshotRequest,
    TopicAdmin,
    TopicList,
    TopicStatus,
)
from edgebroker.broker.delivery.table_snapshots import SnapshotPlan
from edgebroker.broker.feed.digests import DigestAnswer
from edgebroker.broker.feed.ranges import RangeRequest
from edgebroker.broker.fleet.remote_calls import ANSWERS_PATH
from edgebroker.broker.fleet.standby import Promoted, RegistryCopy, StandbyStatus
from edgebroker.broker.fleet.view import Applied, NodePage, TreeSummary
from edgebroker.broker.mirror.fencing import Fenced, FenceRequest
from edgebroker.broker.mirror.repair import RepairRequest
from edgebroker.broker.observe.health import Verdict
from edgebroker.broker.trust.node_trust import TrustStatus
from edgebroker.broker.trust.trust_admin import (
    MAX_TOKENS_BYTES,
    FleetRequest,
    NewTokens,
    NodeNames,
    NodesChanged,
    Revocation,
    Rotated,
    Rotation,
    TokenList,
    TokenRequests,
    TokenUse,
    TrustAdmin,
)
from edgebroker.broker.trust.trust_topic import Quota
from edgebroker.network.http.router import PASSED_ON, Nothing, Route
from edgebroker.pipe.report import (
    MAX_ANSWER_BYTES,
    MAX_BATCH_BYTES,
    AdminAnswer,
    Batch,
    Heard,
    ParentAssignment,
    Question,
)
from edgebroker.pipe.stream import Receipt
from edgebroker.trust.messages import JOIN_PATH, MAX_JOIN_BYTES, ROOT_PATH, Certified, Chain, FleetBook, JoinRequest

MAX_POLL_BYTES = 8 << 20
METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE")
MAX_FENCE_BYTES = 1 << 20
MAX_REPORTS_BYTES = 2 * MAX_BATCH_BYTES


def routes(context: AdminContext, exposition: Exposition) -> list[Route]:
    """The table of administration. Rights: `health` and `metrics` for monitoring, `view` for what changes nothing,
    `alter` for topics and groups, `operate` for the node and the tree, `admin` for the fleet."""
    operations = GroupOperations(context.core)
    node, topics, groups = NodeAdmin(context), TopicAdmin(context, operations), GroupAdmin(context, operations)
    access = AccessAdmin(context.access, context.trust)
    fleet, view, peers, trust = (
        FleetAdmin(context),
        context.tree.view,
        PeerAdmin(context),
        TrustAdmin(context.trust, context.clock, access.revoke_token),
    )
    settings = dict[str, Any]
    return [
        Route("GET", "/healthz", node.alive, Alive, "health"),
        Route("GET", "/readyz", node.ready, Verdict, "health"),
        Route("GET", "/metrics", exposition.answer, None, "metrics"),
        Route("GET", "/v1/node", node.node, NodeReport, "view"),
        Route("GET", "/v1/clients", groups.clients, ClientList, "view"),
        Route("GET", "/v1/trust", trust.status, TrustStatus, "view"),
        Route("GET", "/v1/trust/fleet", trust.fleet, FleetBook, "view"),
        Route("POST", "/v1/trust/fleet", trust.create_fleet, Nothing, "admin", FleetRequest),
        Route("POST", "/v1/trust/join", trust.join, Nothing, "admin", TokenUse),
        Route("POST", "/v1/trust/rotate", trust.rotate, Rotated, "admin", Rotation),
        Route("POST", "/v1/trust/revoke", trust.revoke, NodesChanged, "admin", Revocation, MAX_TOKENS_BYTES),
        Route("POST", "/v1/trust/approve", trust.approve, NodesChanged, "admin", NodeNames, MAX_TOKENS_BYTES),
        Route("GET", "/v1/trust/tokens", trust.tokens, TokenList, "admin"),
        Route("POST", "/v1/trust/tokens", trust.create_tokens, NewTokens, "admin", TokenRequests, MAX_TOKENS_BYTES),
        Route("DELETE", "/v1/trust/tokens/{id}", trust.revoke_token, Nothing, "admin"),
        Route("GET", ROOT_PATH, context.authority.root, Chain, "view"),
        Route("GET", "/v1/access", access.list, AccessList, "admin"),
        Route("GET", "/v1/access/{name}", access.describe, PrincipalInfo, "admin"),
        Route("POST", "/v1/access/{name}", access.change, PrincipalInfo, "admin", AccessChange, MAX_ACCESS_BYTES),
        Route("DELETE", "/v1/access/{name}", access.delete, Nothing, "admin"),
        Route("GET", "/v1/access/{name}/test", access.test, AccessTest, "admin"),
        Route("POST", "/v1/access/{name}/tokens", access.create_token, NewAppToken, "admin", AppTokenRequest),
        Route("GET", "/v1/tenants", access.tenants, TenantList, "view"),
        Route("PUT", "/v1/tenants/{name}", access.set_tenant, Nothing, "admin", Quota),
        Route("DELETE", "/v1/tenants/{name}", access.delete_tenant, Nothing, "admin"),
        Route("GET", "/v1/backup", node.backup, Backup, "operate"),
        Route("POST", "/v1/repair", node.repair, Repaired, "operate", RepairRequest),
        Route("POST", "/v1/promote", node.promote, Nothing, "operate", PromoteRequest),
        Route("DELETE", "/v1/promote", node.demote, Nothing, "operate"),
        Route("GET", "/v1/topics", topics.list, TopicList, "view"),
        Route("POST", "/v1/topics", topics.create, TopicStatus, "alter", NewTopic),
        Route("GET", "/v1/topics/{name}", topics.describe, TopicStatus, "view"),
        Route("PATCH", "/v1/topics/{name}", topics.alter, TopicStatus, "alter", settings),
        Route("DELETE", "/v1/topics/{name}", topics.delete, Nothing, "alter"),
        Route("POST", "/v1/topics/{name}/rename", topics.rename, Nothing, "alter", NewName),
        Route("GET", "/v1/deleted-topics", topics.deleted, DeletedTopicList, "view"),
        Route("POST", "/v1/deleted-topics/{name}/undelete", topics.undelete, Nothing, "alter", NewName),
        Route("POST", "/v1/topics/{name}/accept", topics.accept, Nothing, "operate"),
        Route("POST", "/v1/topics/{name}/snapshot", topics.begin_snapshot, SnapshotBegun, "alter", SnapshotRequest),
        Route("PUT", "/v1/topics/{name}/snapshot/{id}", topics.declare_snapshot, Nothing, "alter", SnapshotPlan),
        Route("POST", "/v1/topics/{name}/snapshot/{id}", topics.complete_snapshot, Nothing, "alter"),
        Route("DELETE", "/v1/topics/{name}/snapshot/{id}", topics.abort_snapshot, Nothing, "alter"),
        Route("GET", "/v1/groups", groups.list, GroupList, "view"),
        Route("GET", "/v1/groups/{name}", groups.describe, GroupStatus, "view"),
        Route("DELETE", "/v1/groups/{name}", groups.delete, Nothing, "alter"),
        Route("POST", "/v1/groups/{name}/offsets", groups.reset_offsets, OffsetChanges, "alter", MoveRequest),
        Route("POST", "/v1/groups/{name}/refresh", groups.refresh, GroupStatus, "alter", RefreshRequest),
        Route("GET", "/v1/holders", node.holders, HolderList, "view"),
        Route("DELETE", "/v1/children/{name}", node.forget_child, Nothing, "operate"),
        Route("GET", "/v1/pipe", node.pipe, PipeStatus, "view"),
        Route("POST", "/v1/pipe/range", context.ranges.answer, None, "operate", RangeRequest),
        Route("POST", "/v1/pipe/digest", context.digests.answer, DigestAnswer, "view", RangeRequest),
        *(
            Route(method, "/v1/via/{node}/{path...}", context.tree.remote.forward, None, PASSED_ON)
            for method in METHODS
        ),
        Route("GET", "/v1/peers/{node}/topics", peers.topics, TopicList, "view"),
        Route("POST", "/v1/peers/{node}/digest", peers.digest, DigestAnswer, "view", RangeRequest),
        Route("GET", "/v1/tree", view.summary, TreeSummary, "view"),
        Route("GET", "/v1/tree/nodes", view.nodes, NodePage, "view"),
        Route("GET", "/v1/tree/applied", view.applied, Applied, "view"),
        Route("GET", "/v1/resyncs", fleet.resyncs, ResyncList, "view"),
        Route("POST", "/v1/resyncs", fleet.resync, Nothing, "operate", ResyncRequest),
        Route("DELETE", "/v1/resyncs/{id}", fleet.abort_resync, Nothing, "operate"),
        Route("GET", "/v1/registry/standby", fleet.standby, StandbyStatus, "view"),
        Route("PUT", "/v1/registry/{node}/pins", fleet.pin, Nothing, "operate", PinRequest),
        Route("PUT", "/v1/registry/{node}/drain", fleet.drain, Nothing, "operate"),
        Route("DELETE", "/v1/registry/{node}/drain", fleet.undrain, Nothing, "operate"),
        Route("DELETE", "/v1/registry", fleet.remove_silent, Removed, "operate"),
        Route("DELETE", "/v1/registry/{node}", fleet.remove, Nothing, "operate"),
    ]


def pipe_routes(context: AdminContext) -> list[Route]:
    """The table of listen.pipe: what the nodes below, and those beside this one, ask of it."""
    node, topics, fleet = NodeAdmin(context), TopicAdmin(context, GroupOperations(context.core)), FleetAdmin(context)
    downstream, inbox = context.downstream, context.tree.inbox
    authority = context.authority
    return [
        Route("GET", "/healthz", node.alive, Alive, "health"),
        Route("GET", ROOT_PATH, authority.root, Chain, "join"),
        Route("POST", JOIN_PATH, authority.join, Certified, "join", JoinRequest, MAX_JOIN_BYTES),
        Route("POST", "/v1/pipe", downstream.answer, None, "below", body_limit=MAX_POLL_BYTES),
        Route("POST", "/v1/pipe/durable", downstream.receipt, Nothing, "below", Receipt),
        Route("POST", "/v1/pipe/range", context.ranges.answer, None, "peer", RangeRequest),
        Route("POST", "/v1/pipe/digest", context.digests.answer, DigestAnswer, "peer", RangeRequest),
        Route("POST", "/v1/pipe/topics", topics.list, TopicList, "peer"),
        Route("POST", "/v1/pipe/topics/{name}", topics.describe, TopicStatus, "peer"),
        Route("POST", "/v1/tree/reports", inbox.answer, Heard, "below", Batch, MAX_REPORTS_BYTES),
        Route("POST", ANSWERS_PATH, context.tree.remote.answered, Nothing, "below", AdminAnswer, 2 * MAX_ANSWER_BYTES),
        Route("POST", "/v1/registry", fleet.ask, ParentAssignment, "below", Question),
        Route("POST", "/v1/registry/copy", fleet.copy, RegistryCopy, "hub"),
        Route("POST", "/v1/promoted", fleet.promoted, Nothing, "hub", Promoted),
        Route("POST", "/v1/fence", node.fence, Fenced, "hub", FenceRequest, MAX_FENCE_BYTES),
    ]
