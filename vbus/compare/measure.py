"""Measures both ways to show devices, on guests that are processes of the host.

Each round starts a daemon and a guest anew; a number is the median over the rounds. So
a disturbance of one round does not decide, and Ctrl-C loses one round at most.
"""

import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import trio

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
from vbus.compare.subjects import (
    WAYS,
    FunctionEach,
    Host,
    SubjectError,
    TrialGuest,
    Way,
    daemon,
    remove_device,
    trial_guest,
)
from vbus.errors import VbusError

GUEST = "process"
HOT = 8
"""Devices that come and go while the guest runs."""
ROUND_S = 180.0
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
}

NOT_MEASURED = {
    "boot time": "a process does not boot",
    "vectors in /proc/interrupts": "a process has no interrupt controller",
    "bulk TCP and frames": "`make bench` and the tests in virtual machines have them",
    "virtio functions": "function-each shows the same echo devices one by one instead,"
    " so that only the number of functions differs",
}

Values = dict[str, float]
Step = Callable[[str], None]


@dataclass(slots=True)
class Samples:
    """What the rounds found, by way, number of devices and messages under way."""

    points: dict[tuple[str, int], dict[str, list[float]]] = field(default_factory=dict)
    loads: dict[tuple[str, int, int], dict[str, list[float]]] = field(
        default_factory=dict
    )
    stopped: dict[tuple[str, int], str] = field(default_factory=dict)

    def add(self, way: str, devices: int, found: "Round") -> None:
        """Take in a whole round."""
        _append(self.points.setdefault((way, devices), {}), found.values)
        for in_flight, values in found.loads.items():
            key = way, devices, in_flight
            _append(self.loads.setdefault(key, {}), values)


@dataclass(slots=True)
class Round:
    """What one round found."""

    values: Values = field(default_factory=dict)
    loads: dict[int, Values] = field(default_factory=dict)


def _append(to: dict[str, list[float]], values: Values) -> None:
    for name, value in values.items():
        to.setdefault(name, []).append(value)


def measure(
    devices: Sequence[int], rounds: int, step: Step = lambda what: None
) -> tuple[Measured, bool]:
    """Measure for every number of devices; give that, and whether it was interrupted.

    `step` is called before each round. A way that fails at some number is not tried
    with more devices; the failure is in the result.
    """
    samples = Samples()
    interrupted = False
    try:
        trio.run(_measure, samples, devices, rounds, step)
    except* KeyboardInterrupt:
        interrupted = True
    return _result(samples), interrupted


def steps(devices: Sequence[int], rounds: int) -> int:
    """How often `measure` calls its `step`."""
    return len(WAYS) * len(devices) * rounds


def loaded_count(devices: Sequence[int]) -> int:
    """With which number of devices load is tried: the first that is enough for it."""
    return next((n for n in sorted(devices) if n >= LOADED_DEVICES), max(devices))


async def _measure(
    samples: Samples, devices: Sequence[int], rounds: int, step: Step
) -> None:
    for count in sorted(devices):
        for number in range(rounds):
            for way in WAYS:
                step(f"{way.name}, {count:,} devices, round {number + 1}")
                if _given_up(samples, way, count):
                    continue
                try:
                    with trio.fail_after(ROUND_S):
                        found = await one_round(
                            way, count, loaded=count == loaded_count(devices)
                        )
                except* (VbusError, OSError, trio.TooSlowError) as group:
                    samples.stopped[way.name, count] = str(_first(group))
                else:
                    samples.add(way.name, count, found)


def _given_up(samples: Samples, way: Way, count: int) -> bool:
    return any(name == way.name and at <= count for name, at in samples.stopped)


def _first(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, trio.TooSlowError):
        return SubjectError(f"a round took longer than {ROUND_S:g} s")
    return error


async def one_round(way: Way, count: int, *, loaded: bool) -> Round:
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


def _result(samples: Samples) -> Measured:
    points = [
        MeasuredPoint(way, GUEST, devices, samples.stopped.get((way, devices)), got)
        for way, devices, got in _points(samples)
    ]
    loads = [
        MeasuredLoad(way, GUEST, devices, in_flight, _quantities(lists))
        for (way, devices, in_flight), lists in samples.loads.items()
    ]
    return Measured(_machine(), points, loads, NOT_MEASURED)


def _points(samples: Samples) -> Iterator[tuple[str, int, Quantities]]:
    for way, devices in sorted(
        samples.points.keys() | samples.stopped.keys(), key=lambda key: (key[0], key[1])
    ):
        found = _quantities(samples.points.get((way, devices), {}))
        if found and way == FunctionEach.name:
            why = "a process has no slot that a function could leave"
            found["hot_remove"] = missing("us", why)
        yield way, devices, found


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
