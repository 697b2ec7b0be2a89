"""Measuring: real daemons and real guests, few devices; how long it takes decides
nothing."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from vbus.compare import measure, subjects, words
from vbus.compare.measure import (
    HOT,
    MACHINE,
    PROCESS,
    Samples,
    Subject,
    loaded_count,
    one_round,
)
from vbus.compare.round import Round
from vbus.compare.subjects import FunctionEach, OneBridge, SubjectError

MANY = 4
ONLY_MACHINES = {"boot", "bring_up", "shared_lines", "qemu_fds", "tcp_out", "tcp_in"}
KNOWN = set(words.MEASURES) - ONLY_MACHINES
RINGED = {"interrupts_per_1000", "messages_per_s"}


def children() -> set[str]:
    """Processes that this one has started, from whichever thread."""
    tasks = Path("/proc/self/task").glob("*/children")
    return {pid for path in tasks for pid in path.read_text().split()}


@pytest.fixture(scope="module")
def rounds() -> dict[str, tuple[Round, Round]]:
    """A round with one device, and one with a few under load, in each way."""
    before = children()
    found = {
        way.name: (
            trio.run(one_round, way, 1, False),
            trio.run(one_round, way, MANY, True),
        )
        for way in (OneBridge(), FunctionEach())
    }
    assert children() <= before
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", words.WAYS)
def test_a_round_measures_everything(
    rounds: dict[str, tuple[Round, Round]], name: str
) -> None:
    """R62: the same devices both ways; functions and vectors are what was asked for."""
    _, found = rounds[name]
    each = name == FunctionEach.name
    assert set(found.values) == KNOWN - ({"hot_remove"} if each else set())
    assert found.values["functions"] == (MANY if each else 1)
    assert found.values["vectors"] == (MANY if each else 8)
    assert set(found.loads) == {1, 2, 4, 8, 16}
    for values in found.loads.values():
        assert set(values) == RINGED
        assert 0 < values["interrupts_per_1000"] <= 2000


@pytest.mark.slow
def test_accesses_and_descriptors_grow_with_functions_only(
    rounds: dict[str, tuple[Round, Round]],
) -> None:
    """R10, R40, R41: counted by the server, the same for any number of devices behind
    one bridge; each function more costs as much again as the first."""
    bridge, each = rounds[OneBridge.name], rounds[FunctionEach.name]
    for name in ("config_accesses", "region_accesses"):
        assert bridge[0].values[name] == bridge[1].values[name] > 0
        assert each[1].values[name] == MANY * each[0].values[name] > 0
    more = [
        MANY * many.values["fds_open"] - one.values["fds_open"]
        for one, many in (bridge, each)
    ]
    assert more[0] < more[1]


@pytest.mark.slow
async def test_devices_come_and_go_in_both_ways(no_fd_leak: None) -> None:
    """R8: behind the bridge no function comes with a device."""
    async with subjects.daemon() as host:
        way = OneBridge()
        assert await way.add(host, 0) == host.socket("bus0")
        assert [await way.add(host, n) for n in range(1, HOT)] == [None] * (HOT - 1)
        assert len(await host.control.request("guest.show")) == 1
    async with subjects.daemon() as host:
        each = FunctionEach()
        places = [await each.add(host, n) for n in range(3)]
        assert len(set(places)) == len(await host.control.request("guest.show")) == 3


async def test_a_guest_that_ends_is_said_to_have_ended(
    tmp_path: Path, no_fd_leak: None
) -> None:
    nowhere = str(tmp_path / "nothing.sock")
    async with subjects.trial_guest(OneBridge(), 1, [nowhere], loaded=False) as guest:
        with pytest.raises(SubjectError, match="the guest ended"):
            await guest.until("attached")


def subject(
    way: str, answer: Callable[[int], Round], rounds: int = 2, guest: str = PROCESS
) -> Subject:
    """Something to measure whose rounds take no time."""

    async def one_round(count: int, loaded: bool) -> Round:
        await trio.lowlevel.checkpoint()
        return answer(count)

    return Subject(guest, way, rounds, one_round)


def test_a_way_that_fails_is_not_tried_with_more() -> None:
    """The reason is in the result; the other way goes on."""
    tried: list[int] = []

    def each(count: int) -> Round:
        tried.append(count)
        if count > 1:
            raise SubjectError("too many files")
        return Round({"attach": 1.0})

    chosen = [
        subject("vbus-bridge", lambda count: Round({"attach": float(count)})),
        subject("function-each", each),
    ]
    found, interrupted = measure.measure((1, 8, 32), chosen)
    assert not interrupted
    assert tried == [1, 8, 1]
    stopped = {(at.layout, at.devices): at.stopped for at in found.points}
    assert stopped["function-each", 8] == "too many files"
    assert stopped["vbus-bridge", 32] is None


def test_a_kind_of_guest_that_fails_stops_no_other_kind() -> None:
    """R62: machines end before processes do; both are in the result, apart."""

    def refuse(count: int) -> Round:
        raise SubjectError("slots")

    chosen = [
        subject("function-each", lambda count: Round({"attach": 1.0})),
        subject("function-each", refuse, guest=MACHINE),
    ]
    found, _ = measure.measure((1, 8), chosen, not_measured={"more": "no room"})
    stopped = {(at.guest, at.devices): at.stopped for at in found.points}
    assert stopped == {(PROCESS, 1): None, (PROCESS, 8): None, (MACHINE, 1): "slots"}
    assert found.not_measured["more"] == "no room"


def test_interrupted_keeps_whole_rounds() -> None:
    """Ctrl-C in the middle of a round: the rounds before it count."""
    rounds = iter(range(100))

    def answer(count: int) -> Round:
        number = next(rounds)
        if number == 5:
            raise KeyboardInterrupt
        return Round({"attach": float(number)}, {1: {"messages_per_s": 1.0}})

    chosen = [subject(way, answer, rounds=9) for way in ("vbus-bridge", "each")]
    found, interrupted = measure.measure((1, 8), chosen)
    assert interrupted
    counts = {
        (at.layout, at.devices): sample.count
        for at in found.points
        if (sample := at.quantities["attach"].measured)
    }
    assert counts == {
        ("vbus-bridge", 1): 2,
        ("each", 1): 1,
        ("vbus-bridge", 8): 1,
        ("each", 8): 1,
    }


def test_late_rounds_of_machines_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a run ends in time: each number has one round, processes have all."""
    monkeypatch.setattr(measure, "BUDGET_S", -1)
    steps: list[str] = []
    chosen = [
        subject("each", lambda count: Round({"boot": 1.0}), guest=kind)
        for kind in (PROCESS, MACHINE)
    ]
    found, _ = measure.measure((1, 8), chosen, steps.append)
    counts = {
        (at.guest, at.devices): sample.count
        for at in found.points
        if (sample := at.quantities["boot"].measured)
    }
    assert counts == {(k, n): 2 if k == PROCESS else 1 for k, n in counts}
    assert len(counts) == 4
    assert len(steps) == measure.steps((1, 8), chosen) == 8


def test_median_and_spread_over_the_rounds() -> None:
    samples = Samples()
    for value in (5.0, 1.0, 3.0):
        samples.add((PROCESS, "vbus-bridge", 8), Round({"call": value}))
    [point] = measure._result(samples, {}).points
    sample = point.quantities["call"].measured
    assert sample is not None
    assert (sample.median, sample.low, sample.high, sample.count) == (3.0, 1.0, 5.0, 3)


def test_both_kinds_of_guest_are_shown_in_both_ways() -> None:
    chosen = measure.subjects([PROCESS, MACHINE], 5)
    ways = {(one.guest, one.way) for one in chosen}
    assert ways == {(guest, way) for guest in words.GUESTS for way in words.WAYS}
    assert {one.rounds for one in chosen if one.guest == MACHINE} == {3}


@pytest.mark.parametrize(
    ("devices", "loaded"), [((1, 8, 32, 128), 32), ((1, 8), 8), ((200, 40), 40)]
)
def test_load_is_tried_where_there_are_devices_enough(
    devices: tuple[int, ...], loaded: int
) -> None:
    assert loaded_count(devices) == loaded


def test_the_machine_is_named() -> None:
    machine = measure._result(Samples(), {}).machine
    assert f"{len(os.sched_getaffinity(0))} CPUs" in machine
    assert "Linux" in machine
