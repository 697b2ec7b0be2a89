"""The counters of everything, as one tree: what `vbus stats` and the metrics show."""

import logging
import os
import resource
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import trio

from shm import Gauge
from vbus.control.show import plain
from vbus.device import Device
from vbus.errors import NotFoundError
from vbus.exposed import ExposedDevice
from vbus.guest import Guest

if TYPE_CHECKING:
    from vbus.daemon import Daemon

Source = Callable[[], object]
"""What gives the statistics of one object: a frozen dataclass, or a dict."""

_ALSO = {
    "buses": "bus",
    "devices": "device",
    "functions": "function",
    "backends": "backend",
    "guests": "guest",
}
"""The words of `vbus tree --json` for the same."""
_STARTED = time.monotonic()

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DaemonStatistics:
    """The process: `cpu_s` of processor time since its start."""

    uptime_s: float
    cpu_s: float
    resident_kib: Gauge
    tasks: Gauge
    descriptors: Gauge
    traced: int


def sources(daemon: "Daemon") -> dict[str, Any]:
    """Give what counts: the daemon's own, and by kind and name all others'.

    A device has its own counters and "bus", what the bus counts of it.
    """
    model = daemon.model
    return {
        "daemon": lambda: _daemon_statistics(daemon),
        "bus": {name: bus.statistics for name, bus in model.buses.items()},
        "device": {name: device_source(one) for name, one in model.devices.items()},
        "function": {
            name: function_sources(one) for name, one in daemon.exposed.items()
        },
        "backend": {
            name: one.link.statistics
            for name, one in daemon.backends.named.items()
            if one.link is not None
        },
        "guest": {name: guest_sources(one) for name, one in daemon.guests.items()},
    }


def device_source(device: Device) -> Source:
    def both() -> object:
        return {**_mapping(plain(counted(device.statistics))), "bus": meter(device)}

    return both


def _mapping(value: object) -> Mapping[str, object]:
    return value if isinstance(value, Mapping) else {"value": value}


def meter(device: Device) -> object:
    return device.meter.statistics(len(device.connections))


def guest_sources(guest: Guest) -> dict[str, Source]:
    return {
        "bridge": guest.bridge.statistics,
        "server": guest.server.statistics,
        "memory": guest.bridge.memory.statistics,
    }


def function_sources(exposed: ExposedDevice) -> dict[str, Source]:
    return {
        "function": exposed.function.statistics,
        "server": exposed.server.statistics,
        "memory": exposed.function.memory.statistics,
    }


def statistics(daemon: "Daemon", path: str) -> object:
    """Give all counters as one tree, or the part at `path`. Raises NotFoundError.

    Only what is asked for is counted.
    """
    node: object = sources(daemon)
    steps = [step for step in path.split("/") if step]
    if steps:
        steps[0] = _ALSO.get(steps[0], steps[0])
    for step in steps:
        node = plain(counted(node)) if callable(node) else node
        if not isinstance(node, Mapping) or step not in node:
            raise NotFoundError(f"no statistics at {path!r}: {step!r} is unknown")
        node = node[step]
    return _shown(node)


def _shown(node: object) -> object:
    if isinstance(node, Mapping):
        return {key: _shown(value) for key, value in node.items()}
    return plain(counted(node)) if callable(node) else node


def counted(source: Source) -> object:
    """Ask for statistics; a device's bug must not hide all others' counters."""
    try:
        return source()
    except Exception as error:
        logger.exception("statistics failed")
        return {"error": repr(error)}


def _daemon_statistics(daemon: "Daemon") -> DaemonStatistics:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    with open("/proc/self/statm") as statm:
        pages = int(statm.read().split()[1])
    return DaemonStatistics(
        uptime_s=round(time.monotonic() - _STARTED, 3),
        cpu_s=round(usage.ru_utime + usage.ru_stime, 3),
        resident_kib=pages * resource.getpagesize() // 1024,
        tasks=trio.lowlevel.current_statistics().tasks_living,
        descriptors=len(os.listdir("/proc/self/fd")),
        traced=daemon.trace.total,
    )
