"""Measures both ways to show devices, on guests that are processes and on machines.

Each round starts a daemon and a guest anew; a number is the median over the rounds. So
a disturbance of one round does not decide, and Ctrl-C loses one round at most. What a
round does to a process is here; what it does to a virtual machine, in `machine.py`.
"""

import os
import platform
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any

import trio

from vbus.compare import machines
from vbus.compare.cpu import cpu_name
from vbus.compare.result import (
    Measured,
    MeasuredLoad,
    MeasuredPoint,
    Quantities,
    Quantity,
    Sample,
    missing,
)
from vbus.compare.round import Round, Values, reason
from vbus.compare.subjects import (
    WAYS,
    FunctionEach,
    Host,
    TrialGuest,
    Way,
    daemon,
    remove_device,
    trial_guest,
)
from vbus.errors import VbusError

PROCESS, MACHINE = "process", "machine"
HOT = 8
"""Devices that come and go while the guest runs."""
ROUND_S = 180.0
MACHINE_ROUNDS = 3
BUDGET_S = 330.0
"""A machine takes ten times as long as a process: so many rounds of it at most, and
after so many seconds none but the first of each."""
LOADED_DEVICES = 32

UNITS = {
    "attach": "us",
    "functions": "functions",
    "vectors": "vectors",
    "config_accesses": "accesses",
    "region_accesses": "accesses",
    "open_call_close": "us",
    "call": "us",
    "round_trip": "us",
    "hot_add": "us",
    "hot_remove": "us",
    "memory_idle": "bytes",
    "memory_open": "bytes",
    "fds_idle": "descriptors",
    "fds_open": "descriptors",
    "urgent_flat": "us",
    "urgent_flat_high": "us",
    "urgent_first": "us",
    "urgent_first_high": "us",
    "interrupts_per_1000": "interrupts",
    "messages_per_s": "messages/s",
    "boot": "us",
    "bring_up": "us",
    "shared_lines": "functions",
    "qemu_fds": "descriptors",
    "tcp_out": "bit/s",
    "tcp_in": "bit/s",
}

NOT_MEASURED = {
    "boot, /proc/interrupts, TCP of processes": "a process has none of them",
    "virtio functions of processes": "function-each shows the same echo devices one by"
    " one instead, so that only the number of functions differs",
}

Step = Callable[[str], None]
Place = tuple[str, str, int]
"""Kind of guest, way, number of devices."""


@dataclass(slots=True)
class Samples:
    """What the rounds found, by place, and by messages under way."""

    points: dict[Place, dict[str, list[float]]] = field(default_factory=dict)
    loads: dict[tuple[Place, int], dict[str, list[float]]] = field(default_factory=dict)
    stopped: dict[Place, str] = field(default_factory=dict)

    def add(self, place: Place, found: Round) -> None:
        """Take in a whole round."""
        _append(self.points.setdefault(place, {}), found.values)
        for in_flight, values in found.loads.items():
            _append(self.loads.setdefault((place, in_flight), {}), values)

    def given_up(self, place: Place) -> bool:
        """Tell whether this way failed before, with so many devices or fewer."""
        return any(
            stopped[:2] == place[:2] and stopped[2] <= place[2]
            for stopped in self.stopped
        )


def _append(to: dict[str, list[float]], values: Values) -> None:
    for name, value in values.items():
        to.setdefault(name, []).append(value)


@dataclass(frozen=True, slots=True)
class Subject:
    """A kind of guest with its devices shown in one way, and how often at most."""

    guest: str
    way: str
    rounds: int
    one_round: Callable[[int, bool], Awaitable[Round]]


def subjects(guests: Sequence[str], rounds: int) -> list[Subject]:
    """Give what is to be measured, of these kinds of guest."""
    found = []
    if PROCESS in guests:
        for way in WAYS:
            one = partial(one_round, way)
            found.append(Subject(PROCESS, way.name, rounds, one))
    if MACHINE in guests:
        for name in machines.WAYS:
            one = partial(machines.one_round, name)
            found.append(Subject(MACHINE, name, min(rounds, MACHINE_ROUNDS), one))
    return found


def measure(
    devices: Sequence[int],
    chosen: Sequence[Subject],
    step: Step = lambda what: None,
    not_measured: Mapping[str, str] | None = None,
) -> tuple[Measured, bool]:
    """Measure for every number of devices; give that, and whether it was interrupted.

    `step` is called before each round. A way that fails at some number is not tried
    with more devices; the failure is in the result, as is `not_measured`.
    """
    samples = Samples()
    interrupted = False
    try:
        trio.run(_measure, samples, devices, chosen, step)
    except* KeyboardInterrupt:
        interrupted = True
    return _result(samples, not_measured or {}), interrupted


def steps(devices: Sequence[int], chosen: Sequence[Subject]) -> int:
    """How often `measure` calls its `step`."""
    return len(devices) * sum(subject.rounds for subject in chosen)


def loaded_count(devices: Sequence[int]) -> int:
    """With which number of devices load is tried: the first that is enough for it."""
    return next((n for n in sorted(devices) if n >= LOADED_DEVICES), max(devices))


async def _measure(
    samples: Samples, devices: Sequence[int], chosen: Sequence[Subject], step: Step
) -> None:
    """Every first round, then every second one, and so on: all numbers have one."""
    end = trio.current_time() + BUDGET_S
    most = max((subject.rounds for subject in chosen), default=0)
    for number in range(most):
        for count in sorted(devices):
            for subject in chosen:
                if number >= subject.rounds:
                    continue
                what = f"{subject.way}, {subject.guest}, {count:,} devices"
                step(f"{what}, round {number + 1}")
                late = number and subject.guest == MACHINE and trio.current_time() > end
                if not late:
                    loaded = count == loaded_count(devices)
                    await _try(samples, subject, count, loaded=loaded)


async def _try(samples: Samples, subject: Subject, count: int, *, loaded: bool) -> None:
    place = subject.guest, subject.way, count
    if samples.given_up(place):
        return
    try:
        with trio.fail_after(ROUND_S):
            found = await subject.one_round(count, loaded)
    except* (VbusError, OSError, trio.TooSlowError) as group:
        samples.stopped[place] = reason(group)
    else:
        samples.add(place, found)


async def one_round(way: Way, count: int, loaded: bool) -> Round:
    """Start both, measure everything once, end both. Raises SubjectError, VbusError."""
    found = Round()
    async with daemon() as host:
        memory, fds = host.memory, host.fds
        added = [await way.add(host, number) for number in range(count)]
        places = [place for place in added if place is not None]
        found.values["memory_idle"] = (host.memory - memory) / count
        found.values["fds_idle"] = (host.fds - fds) / count
        async with trial_guest(way, count, places, loaded=loaded) as guest:
            await _attached(host, guest, found)
            await _trials(guest, found)
            found.values["memory_open"] = (host.memory - memory) / count
            found.values["fds_open"] = (host.fds - fds) / count
            await _hot_plug(way, host, guest, count, found)
    return found


async def _attached(host: Host, guest: TrialGuest, found: Round) -> None:
    said = await guest.until("attached")
    seen = await host.accesses()
    found.values |= {
        "attach": said["us"],
        "functions": said["functions"],
        "vectors": said["vectors"],
        "config_accesses": seen["config_reads"] + seen["config_writes"],
        "region_accesses": seen["region_reads"] + seen["region_writes"],
    }
    await guest.tell()


async def _trials(guest: TrialGuest, found: Round) -> None:
    while (said := await guest.next())["trial"] != "held":
        if said["trial"] == "loaded":
            found.loads[said["in_flight"]] = {
                "interrupts_per_1000": said["interrupts"],
                "messages_per_s": said["messages"],
            }
        else:
            found.values |= dict(_named(said))


def _named(said: dict[str, Any]) -> Iterator[tuple[str, float]]:
    if said["trial"] == "urgent":
        name = "urgent_first" if said["first"] else "urgent_flat"
        yield f"{name}_high", said["high_us"]
    else:
        names = {"visited": "open_call_close", "called": "call"}
        name = names.get(said["trial"], "round_trip")
    yield name, said["us"]


async def _hot_plug(
    way: Way, host: Host, guest: TrialGuest, count: int, found: Round
) -> None:
    """Devices come and go: from the first request until the guest has said so."""
    numbers = range(count, count + HOT)
    times = []
    for number in numbers:
        began = time.perf_counter()
        place = await way.add(host, number)
        if place is not None:
            await guest.tell(place)
        await guest.until("plugged")
        times.append((time.perf_counter() - began) * 1e6)
    found.values["hot_add"] = median(times)
    if isinstance(way, FunctionEach):
        return  # what goes here is the function, and a process has no slot for it
    times = []
    for number in numbers:
        began = time.perf_counter()
        await remove_device(host, number)
        await guest.until("unplugged")
        times.append((time.perf_counter() - began) * 1e6)
    found.values["hot_remove"] = median(times)


def _result(samples: Samples, not_measured: Mapping[str, str]) -> Measured:
    points = [
        MeasuredPoint(way, guest, devices, samples.stopped.get(place), got)
        for place, got in _points(samples)
        for guest, way, devices in [place]
    ]
    loads = [
        MeasuredLoad(way, guest, devices, in_flight, _quantities(lists))
        for ((guest, way, devices), in_flight), lists in samples.loads.items()
    ]
    return Measured(_machine(), points, loads, {**NOT_MEASURED, **not_measured})


def _points(samples: Samples) -> Iterator[tuple[Place, Quantities]]:
    for place in sorted(samples.points.keys() | samples.stopped.keys()):
        found = _quantities(samples.points.get(place, {}))
        if found and place[:2] == (PROCESS, FunctionEach.name):
            why = "a process has no slot that a function could leave"
            found["hot_remove"] = missing("us", why)
        yield place, found


def _quantities(lists: dict[str, list[float]]) -> Quantities:
    return {
        name: Quantity(
            UNITS[name],
            measured=Sample(median(values), min(values), max(values), len(values)),
        )
        for name, values in lists.items()
    }


def _machine() -> str:
    cpus = len(os.sched_getaffinity(0))
    return (
        f"{cpu_name()}, {cpus} CPUs, Linux {platform.release()},"
        f" Python {platform.python_version()}"
    )
