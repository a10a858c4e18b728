"""What a node knows of those below it: which report is the newer one, who is silent, what goes up, and whose parent is
whose."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgebroker.pipe.fleet import (
    KEPT_FOR_CHILDREN,
    MAX_CLAIMS,
    MAX_NODES,
    NEW_A_SECOND,
    NEW_AT_ONCE,
    Fleet,
    TooManyNewError,
    matches,
)
from edgebroker.pipe.report import (
    MAX_CANDIDATES,
    MAX_REPORT_BYTES,
    GroupReport,
    NodeState,
    ParentAssignment,
    RankedTopics,
    Report,
    TopicReport,
    digest,
    rank,
    within_limit,
)
from edgebroker.pipe.topology import FIRST_PLACE, Topology

TOP = "f" * 32
BOOTS = ("a" * 16, "b" * 16, "c" * 16)


def uid(number: int) -> str:
    return f"{number:032x}"


def report(number: int, *, boot: str = BOOTS[0], said: int = 1, parent: str = TOP, **more: object) -> Report:
    wanted = {"name": f"node-{number}", "level": "pos", "version": "1", **more}
    return Report(uid=uid(number), boot=boot, number=said, parent=parent, **wanted)  # type: ignore[arg-type]


def state(one: Report, silent: float = -1.0, behind: float = 0.0) -> NodeState:
    return NodeState(report=msgspec.Raw(msgspec.json.encode(one)), silent=silent, behind=behind)


def fleet_of(*hubs: int) -> Fleet:
    """A fleet with these children, connected."""
    fleet = Fleet(TOP)
    for number in hubs:
        fleet.take(state(report(number, parent=TOP)), uid(number), 0.0, connected=True)
    return fleet


def told(fleet: Fleet, now: float = 0.0) -> dict[str, NodeState]:
    """What the node above hears next."""
    found = {}
    for one in fleet.take_changes(1 << 20, now):
        found[msgspec.json.decode(one.report, type=Report).name] = one
    return found


def test_only_changes_go_up() -> None:
    fleet = Fleet(TOP)
    fleet.take(state(report(1)), uid(1), 0.0)
    fleet.take(state(report(2)), uid(2), 0.0)
    assert told(fleet).keys() == {"node-1", "node-2"}
    assert not fleet.changed
    assert told(fleet) == {}
    fleet.take(state(report(2, said=2)), uid(2), 1.0)
    assert told(fleet).keys() == {"node-2"}
    fleet.tell_all()
    assert told(fleet).keys() == {"node-1", "node-2"}


def test_much_goes_up_in_pieces() -> None:
    fleet = Fleet(TOP)
    for number in range(50):
        fleet.take(state(report(number)), uid(number), 0.0)
    pieces = []
    while fleet.changed:
        pieces.append([one.report for one in fleet.take_changes(2000, 0.0)])
    assert sum(map(len, pieces)) == 50
    assert len(pieces) > 5
    assert len({bytes(raw) for piece in pieces for raw in piece}) == 50


def test_the_newer_report_of_a_run_wins() -> None:
    fleet = fleet_of(2, 8)
    fleet.take(state(report(1, said=5, region="north")), uid(8), 0.0)
    assert fleet.take(state(report(1, said=4, region="south")), uid(2), 1.0) is None
    assert fleet.members[uid(1)].region == "north"
    fleet.take(state(report(1, said=6, region="west")), uid(2), 2.0)
    assert (fleet.members[uid(1)].region, fleet.members[uid(1)].route) == ("west", uid(2))


def test_word_of_a_lost_node_does_not_win_over_a_connected_one() -> None:
    """A node has gone over to another parent; the old one, back after a day, says that it is lost."""
    fleet = fleet_of(8, 9)
    fleet.take(state(report(1, boot=BOOTS[1], parent=uid(8))), uid(8), 0.0)
    assert fleet.take(state(report(1, boot=BOOTS[0], parent=uid(9)), silent=86400.0), uid(9), 1.0) is None
    assert fleet.silent_for(fleet.members[uid(1)], 1.0) < 0
    fleet.take(state(report(1, boot=BOOTS[1], parent=uid(8)), silent=3.0), uid(8), 10.0)
    assert fleet.silent_for(fleet.members[uid(1)], 11.0) == 4.0
    fleet.take(state(report(1, boot=BOOTS[2], parent=uid(9))), uid(9), 12.0)
    assert fleet.silent_for(fleet.members[uid(1)], 12.0) < 0


def test_who_is_behind_a_lost_node_is_silent_too() -> None:
    fleet = Fleet(TOP)
    for number, parent, route in ((1, TOP, 1), (2, uid(1), 1), (3, uid(2), 1), (4, TOP, 4)):
        fleet.take(state(report(number, parent=parent)), uid(route), 0.0)
    fleet.take(state(report(3, parent=uid(2)), silent=500.0), uid(1), 1000.0)
    fleet.lost(uid(1), 900.0)
    silent = [fleet.silent_for(fleet.members[uid(number)], 1000.0) for number in (1, 2, 3, 4)]
    assert silent == [100.0, 100.0, 500.0, -1.0]
    fleet.found(uid(1))
    silent = [fleet.silent_for(fleet.members[uid(number)], 1000.0) for number in (1, 2, 3, 4)]
    assert silent == [-1.0, -1.0, 500.0, -1.0]


def test_the_lag_of_each_hop_is_added_up_and_grows_while_nothing_is_heard() -> None:
    fleet = Fleet(TOP)
    fleet.take(state(report(1)), uid(1), 0.0)
    fleet.take(state(report(2, parent=uid(1)), behind=30.0), uid(1), 0.0)
    fleet.measured(uid(1), 5.0, 0.0)
    assert fleet.lag(fleet.members[uid(2)], 10.0) == 30.0 + 10.0 + 5.0 + 10.0
    told(fleet)
    fleet.measured(uid(1), 16.0, 10.0)
    assert not fleet.changed, "that was to be expected"
    fleet.measured(uid(1), 0.0, 20.0)
    assert told(fleet, 20.0)["node-1"].behind == 0.0


def test_another_run_of_a_connected_node_is_believed_once_the_node_is_lost() -> None:
    """Who is connected below one child is not connected below another: a thief, a twin, or a moment too early."""
    fleet = fleet_of(8, 9)
    fleet.take(state(report(1, parent=uid(8))), uid(8), 0.0)
    stolen = state(report(1, boot=BOOTS[1], parent=uid(9), region="stolen", said=1 << 60))
    assert fleet.take(stolen, uid(9), 1.0) is None
    assert (fleet.members[uid(1)].route, fleet.members[uid(1)].region) == (uid(8), "")
    assert fleet.settle(30.0) == [] and not fleet.members[uid(1)].twins(30.0)
    assert fleet.settle(62.0) == [] and fleet.members[uid(1)].twins(62.0), "an operator is told"
    fleet.take(state(report(1, parent=uid(8)), silent=0.5), uid(8), 63.0)
    (found,) = fleet.settle(64.0)
    assert (found.route, found.region, fleet.silent_for(found, 64.0)) == (uid(9), "stolen", -1.0)
    assert fleet.settle(65.0) == []


def test_what_others_say_of_a_child_of_ones_own_waits_whichever_run_they_speak_of() -> None:
    fleet = fleet_of(8, 9)
    stolen = state(report(8, parent=uid(9), address="203.0.113.9:7421", said=1 << 60))
    assert fleet.take(stolen, uid(9), 1.0) is None
    assert fleet.take(state(report(8, parent=uid(9)), silent=3.0), uid(9), 1.0) is None
    assert (fleet.members[uid(8)].route, fleet.members[uid(8)].address) == (uid(8), "")
    assert fleet.silent_for(fleet.members[uid(8)], 2.0) < 0


def test_a_node_that_was_started_again_below_a_hub_that_moved_is_believed() -> None:
    """The hub goes to another child, and its old parent is started again: nothing is lost for long enough to tell."""
    fleet = fleet_of(8, 9)
    for number, parent in ((5, uid(8)), (1, uid(5))):
        fleet.take(state(report(number, parent=parent)), uid(8), 1.0)
    fleet.take(state(report(5, parent=uid(9), said=2)), uid(9), 5.0)
    fleet.take(state(report(8, parent=TOP, boot=BOOTS[2])), uid(8), 6.0, connected=True)
    again = fleet.take(state(report(1, parent=uid(5), boot=BOOTS[1])), uid(9), 7.0)
    assert again is not None and (again.route, fleet.silent_for(again, 8.0)) == (uid(9), -1.0)


def test_a_claim_goes_with_who_made_it() -> None:
    fleet = fleet_of(8, 9)
    fleet.take(state(report(1, parent=uid(8))), uid(8), 0.0)
    other = report(1, boot=BOOTS[1], parent=uid(9))
    assert fleet.take(state(other), uid(9), 1.0) is None
    assert fleet.take(state(other, silent=1.0), uid(9), 2.0) is None
    fleet.lost(uid(1), 3.0)
    assert fleet.settle(4.0) == []
    assert fleet.members[uid(1)].boot == BOOTS[0]


def test_claims_are_bounded() -> None:
    fleet = fleet_of(MAX_CLAIMS + 8, MAX_CLAIMS + 9)
    for number in range(MAX_CLAIMS + 5):
        now = number / 100
        fleet.take(state(report(number, parent=uid(MAX_CLAIMS + 8))), uid(MAX_CLAIMS + 8), now)
        fleet.take(state(report(number, boot=BOOTS[1], parent=uid(MAX_CLAIMS + 9))), uid(MAX_CLAIMS + 9), now)
    for number in range(MAX_CLAIMS + 5):
        fleet.lost(uid(number), 100.0)
    assert len(fleet.settle(101.0)) == MAX_CLAIMS


def test_a_claim_waits_while_too_many_new_nodes_come() -> None:
    """Its node was removed meanwhile, so it is a new one."""
    fleet = fleet_of(8, 9)
    fleet.take(state(report(1, parent=uid(8))), uid(8), 0.0)
    fleet.take(state(report(1, boot=BOOTS[1], parent=uid(9))), uid(9), 0.0)
    fleet.remove(uid(1))
    with pytest.raises(TooManyNewError):
        for number in range(10, NEW_AT_ONCE + 11):
            fleet.take(state(report(number)), uid(9), 0.0)
    assert fleet.settle(0.0) == []
    (found,) = fleet.settle(1.0)
    assert (found.uid, found.boot, found.route) == (uid(1), BOOTS[1], uid(9))
    assert fleet.settle(2.0) == []


def test_new_nodes_come_at_a_bounded_rate_and_known_ones_at_any() -> None:
    fleet = Fleet(TOP)
    for number in range(NEW_AT_ONCE):
        fleet.take(state(report(number)), uid(9), 0.0)
    with pytest.raises(TooManyNewError):
        fleet.take(state(report(NEW_AT_ONCE)), uid(9), 0.0)
    for number in range(NEW_AT_ONCE):
        assert fleet.take(state(report(number, said=2)), uid(9), 0.0) is not None
    own = 1 << 20
    assert fleet.take(state(report(own)), uid(own), 0.0, connected=True) is not None, "a child of its own"
    for number in range(NEW_A_SECOND):
        assert fleet.take(state(report(NEW_AT_ONCE + number)), uid(9), 1.0) is not None
    with pytest.raises(TooManyNewError):
        fleet.take(state(report(1 << 21)), uid(9), 1.0)


def test_who_was_told_of_by_a_child_that_is_gone_is_silent() -> None:
    """Also nodes that say that their parent is another one, as invented ones may."""
    fleet = Fleet(TOP)
    for number, parent in ((8, TOP), (1, ""), (2, TOP)):
        fleet.take(state(report(number, parent=parent)), uid(8), 10.0)
    told_of = [fleet.members[uid(number)] for number in (1, 2)]
    assert [fleet.silent_for(one, 20.0) for one in told_of] == [-1.0, -1.0]
    fleet.lost(uid(8), 25.0)
    assert [fleet.silent_for(one, 30.0) for one in told_of] == [5.0, 5.0]
    fleet.forget(uid(8))
    assert [fleet.silent_for(one, 40.0) for one in told_of] == [30.0, 30.0]
    fleet.take(state(report(1, said=2)), uid(9), 50.0)
    fleet.take(state(report(9, parent=TOP)), uid(9), 50.0)
    assert fleet.silent_for(told_of[0], 51.0) == -1.0


def test_twins_are_found() -> None:
    """Two machines made from one disk report in turns; one that is started again and again does not."""
    fleet = Fleet(TOP)
    for turn in range(6):
        fleet.take(state(report(1, boot=BOOTS[turn % 2], said=turn)), uid(1), turn * 10.0)
        fleet.take(state(report(2, boot=f"{turn:016x}")), uid(2), turn * 1000.0)
    assert fleet.members[uid(1)].twins(60.0)
    assert not fleet.members[uid(2)].twins(5000.0)
    assert not fleet.members[uid(1)].twins(5000.0)


def test_what_was_removed_stays_away_until_it_is_started_again() -> None:
    fleet = Fleet(TOP)
    fleet.take(state(report(1), silent=5.0), uid(9), 0.0)
    fleet.remove(uid(1))
    assert fleet.take(state(report(1), silent=6.0), uid(9), 1.0) is None
    assert not fleet.members
    assert fleet.take(state(report(1, boot=BOOTS[1])), uid(9), 1.0) is not None


def test_a_fleet_has_a_limit() -> None:
    fleet = Fleet(TOP)
    others = MAX_NODES - KEPT_FOR_CHILDREN
    fleet.members = dict.fromkeys(map(str, range(others)))  # type: ignore[assignment]
    assert fleet.take(state(report(1)), uid(1), 0.0) is None, "anybody can say so"
    assert fleet.take(state(report(1)), uid(2), 0.0, connected=True) is None, "of another node, too"
    assert fleet.take(state(report(1)), uid(1), 0.0, connected=True) is not None
    assert fleet.refused == 2
    fleet.members |= dict.fromkeys(map(str, range(MAX_NODES)))  # type: ignore[arg-type]
    assert fleet.take(state(report(3)), uid(3), 0.0, connected=True) is None


def test_what_is_no_report_is_refused() -> None:
    fleet = Fleet(TOP)
    for raw in (b"{}", b'{"uid": "x"}', b"[1]"):
        with pytest.raises(msgspec.DecodeError):
            fleet.take(NodeState(report=msgspec.Raw(raw)), uid(1), 0.0)
    assert not fleet.members


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 5)), max_size=60), st.integers(0, 8))
def test_a_report_is_at_most_2_kb(shapes: list[tuple[int, int]], labels: int) -> None:
    topics = [
        TopicReport(
            f"topic-{rank}", [10**9] * parts, [GroupReport(f"g{g}", [10**9 - g] * parts) for g in range(groups)]
        )
        for rank, (parts, groups) in enumerate(shapes)
    ]
    whole = report(1, labels={f"l{n:039d}": "v" * 40 for n in range(labels)}, name="n" * 100, topics=topics)
    fitting = within_limit(whole)
    assert len(msgspec.json.encode(fitting)) <= MAX_REPORT_BYTES
    assert len(fitting.topics) + fitting.left_out == len(topics)
    if not fitting.left_out:
        assert fitting == whole


def test_what_is_waiting_has_room_first() -> None:
    quiet = [TopicReport(f"a{n:03}", [5], [GroupReport("g", [5])]) for n in range(200)]
    busy = TopicReport("zz", [5], [GroupReport("g", [3])])
    dead = TopicReport("yy", [5], [], dead_letters=2)
    assert [one.name for one in within_limit(report(1, topics=[*quiet, busy, dead])).topics][:2] == ["yy", "zz"]


@given(st.permutations(range(12)), st.integers(1, 12))
def test_of_many_topics_those_are_told_that_matter_most(order: list[int], most: int) -> None:
    topics = [TopicReport(f"{n:02}", [5], [GroupReport("g", [5 - n % 2])], dead_letters=n % 3) for n in order]
    found = RankedTopics()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("edgebroker.pipe.report.MOST_TOPICS", most)
        for topic in topics:
            found.add(topic)
        assert found.best() == sorted(sorted(topics, key=rank)[:most], key=lambda topic: topic.name)
        told = within_limit(report(1, topics=found.best(), left_out=found.left_out))
    assert (len(told.topics), told.left_out) == (most, 12 - most)


def test_labels() -> None:
    fleet = Fleet(TOP)
    member = fleet.take(state(report(1, region="eu/north/12", labels={"format": "express"})), uid(1), 0.0)
    assert member is not None
    for wanted, expected in [
        ({}, True),
        ({"region": "eu"}, True),
        ({"region": "eu/north"}, True),
        ({"region": "eu/nor"}, False),
        ({"format": "express", "level": "pos", "name": "node-1"}, True),
        ({"format": "city"}, False),
        ({"wave": "1"}, False),
    ]:
        assert matches(member, wanted) == expected, wanted


# ---- who may feed whom ----


def hubs() -> Topology:
    """Two regions with two l3 each, and a pos in each of two stores of the north."""
    topology = Topology()
    topology.put(uid(1), "root", "", "root:1")
    topology.put(uid(2), "l2", "eu", "l2:1")
    for number, region in ((31, "eu/north"), (32, "eu/north"), (33, "eu/south"), (34, "eu/south")):
        topology.put(uid(number), "l3", region, f"l3-{number}:1")
    for number in (41, 42):
        topology.put(uid(number), "pos", f"eu/north/{number}", f"pos-{number}:1")
    return topology


def test_the_nearest_hub_of_the_own_region_comes_first() -> None:
    found = hubs().candidates(uid(99), "local", "eu/north/41")
    assert found[0] == "pos-41:1"
    assert set(found[1:3]) == {"l3-31:1", "l3-32:1"}
    assert found[3:5] == ["l2:1", "root:1"]
    assert set(found[5:]) == {"l3-33:1", "l3-34:1"}
    assert "pos-42:1" not in found, "a store does not feed another one"


def test_only_levels_above() -> None:
    topology = hubs()
    assert topology.candidates(uid(31), "l3", "eu/north")[:2] == ["l2:1", "root:1"]
    assert topology.candidates(uid(2), "l2", "eu") == ["root:1"]
    assert topology.candidates(uid(1), "root", "") == []
    assert topology.candidates(uid(1), "moon", "") == []


def test_children_spread_and_stay() -> None:
    """Half of them at each hub, and a hub that comes or goes moves only its own."""
    topology = hubs()
    first = {n: topology.candidates(uid(n), "pos", f"eu/north/{n}")[0] for n in range(1000, 1400)}
    assert 120 < sum(address == "l3-31:1" for address in first.values()) < 280
    topology.draining.add(uid(32))
    for number, before in first.items():
        assert topology.candidates(uid(number), "pos", "eu/north/1")[0] == "l3-31:1"
        assert before in ("l3-31:1", "l3-32:1")
    topology.draining.clear()
    assert {n: topology.candidates(uid(n), "pos", f"eu/north/{n}")[0] for n in first} == first


def test_pins_drains_and_removals() -> None:
    topology = hubs()
    topology.pins[uid(99)] = [uid(34), uid(2)]
    assert topology.candidates(uid(99), "pos", "eu/north/1")[:2] == ["l3-34:1", "l2:1"]
    assert topology.must_leave(uid(99), uid(31), "eu/north/1", lambda pin: True)
    assert not topology.must_leave(uid(99), uid(2), "eu/north/1", lambda pin: True)
    topology.draining.add(uid(41))
    assert "pos-41:1" not in topology.candidates(uid(98), "local", "eu/north/41")
    assert topology.must_leave(uid(98), uid(41), "eu/north/1", lambda pin: True)
    assert topology.remove(uid(31))
    assert not topology.remove(uid(31))
    assert topology.candidates(uid(98), "pos", "eu/north/41")[0] == "l3-32:1"
    assert not topology.put(uid(32), "l3", "eu/north", "l3-32:1")
    assert topology.put(uid(32), "l3", "eu/north", "elsewhere:1")
    assert topology.put(uid(32), "l3", "eu/north", "")
    assert topology.candidates(uid(98), "pos", "eu/north/41")[0] == "l2:1"


def test_a_list_has_a_limit_and_a_digest() -> None:
    topology = Topology()
    for number in range(30):
        topology.put(uid(number), "l3", "eu", f"hub-{number}:1")
    found = topology.candidates(uid(99), "pos", "eu/1")
    assert len(found) == FIRST_PLACE
    for number in range(30):
        topology.put(uid(100 + number), "l2", "eu", f"upper-{number}:1")
        topology.put(uid(200 + number), "root", "", f"top-{number}:1")
    found = topology.candidates(uid(99), "pos", "eu/1")
    assert len(found) == MAX_CANDIDATES
    assert [address.partition("-")[0] for address in found] == ["hub"] * 4 + ["upper"] * 2 + ["top"] * 2
    assert digest(found) != digest(found[::-1])
    assert digest([]) == 0


def test_a_childs_own_report_does_not_wipe_what_was_measured() -> None:
    fleet = Fleet(TOP)
    fleet.take(state(report(1)), uid(1), 0.0)
    fleet.measured(uid(1), 500.0, 1.0)
    fleet.take(state(report(1, said=2)), uid(1), 2.0)
    assert fleet.lag(fleet.members[uid(1)], 2.0) >= 500.0


def test_pins_are_at_most_as_many_as_an_order_may_carry() -> None:
    topology = Topology()
    for number in range(12):
        topology.put(uid(number), "l3", "eu", f"hub-{number}:1")
    topology.pins[uid(99)] = [uid(number) for number in range(12)]
    found = topology.candidates(uid(99), "pos", "eu/1")
    msgspec.json.decode(msgspec.json.encode(ParentAssignment(uid=uid(99), candidates=found)), type=ParentAssignment)


def test_a_pin_does_not_hold_a_node_at_a_hub_that_is_drained() -> None:
    topology = hubs()
    topology.pins[uid(99)] = [uid(31)]
    topology.draining.add(uid(31))
    assert topology.candidates(uid(99), "pos", "eu/north/1")[0] != "l3-31:1"


def test_a_pin_to_a_hub_that_is_gone_does_not_drive_the_node_from_a_parent() -> None:
    topology = hubs()
    topology.pins[uid(99)] = [uid(31)]
    topology.remove(uid(31))
    assert not topology.must_leave(uid(99), uid(32), "eu/north/1", lambda pin: True)


def test_in_a_fleet_with_certificates_a_parent_is_of_a_region_around_the_node() -> None:
    topology = hubs()
    topology.strict = lambda: True
    assert topology.candidates(uid(99), "local", "eu/north/41")[3:] == ["l2:1", "root:1"]
    assert topology.candidates(uid(99), "pos", "asia/7") == ["root:1"]
    assert topology.must_leave(uid(99), uid(33), "eu/north/41", lambda pin: True)
    assert not topology.must_leave(uid(99), uid(31), "eu/north/41", lambda pin: True)


def test_a_hub_stays_below_another_one_that_was_promoted() -> None:
    topology = hubs()
    topology.strict = lambda: True
    assert not topology.must_leave(uid(31), uid(33), "eu/north", lambda pin: True)
    assert topology.must_leave(uid(41), uid(33), "eu/north/41", lambda pin: True)


@pytest.mark.parametrize(("strict", "hub"), [(True, 33), (False, 42)])
def test_a_pin_to_a_hub_that_may_not_serve_the_node_is_passed_over(strict: bool, hub: int) -> None:
    """The node moved to another region since; it would be told to go there, and to leave again."""
    topology = hubs()
    topology.strict = lambda: strict
    topology.pins[uid(99)] = [uid(hub)]
    assert topology.candidates(uid(99), "local", "eu/north/41")[0] == "pos-41:1"
    assert not topology.must_leave(uid(99), uid(31), "eu/north/41", lambda pin: True)


def test_removing_a_dead_hub_does_not_make_its_children_connected() -> None:
    fleet = Fleet(TOP)
    fleet.take(state(report(1)), uid(1), 0.0)
    fleet.take(state(report(2, parent=uid(1))), uid(1), 0.0)
    fleet.lost(uid(1), 10.0)
    assert fleet.silent_for(fleet.members[uid(2)], 100.0) == 90.0
    fleet.take(state(report(3, parent=uid(2))), uid(1), 0.0)
    fleet.remove(uid(2))
    fleet.remove(uid(1))
    assert fleet.silent_for(fleet.members[uid(3)], 100.0) == 90.0


def test_one_big_topic_does_not_hide_the_others() -> None:
    big = TopicReport("big", [10**9] * 100, [GroupReport(f"g{n}", [5] * 100) for n in range(9)])
    small = [TopicReport(f"t{n}", [5], [GroupReport("g", [3])]) for n in range(3)]
    assert within_limit(report(1, topics=[big, *small])).topics
