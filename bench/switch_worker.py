"""Measures one switch in namespaces of its own: `enter("switch_worker", KIND)`."""

import contextlib
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.daemon import Daemon, GuestProcess, guest_command
from bench.lab import HUB_ADDRESS, PREFIX, Place, ip, measure, tcp_gbit_s
from bench.processes import report

_CONFIG = f"""
[[device]]
name = "lan0"
class = "switch"
[[device]]
name = "uplink0"
class = "switch-tap"
switch = "lan0"
ifname = "hub0"
address = "{HUB_ADDRESS}/{PREFIX}"
"""
_GUEST = """
[[bus]]
name = "{name}"
[[device]]
name = "lan0-{name}"
class = "venet"
bus = "{name}"
switch = "lan0"
[[guest]]
name = "{name}"
bus = "{name}"
"""


def vbus(hub: Place, guests: list[Place]) -> dict[str, float]:
    """Measure the bus: the daemon in the hub, a guest process in each namespace."""
    names = [f"g{nth}" for nth in range(1, 1 + len(guests))]
    config = _CONFIG + "".join(_GUEST.format(name=name) for name in names)
    with Daemon(config) as daemon, contextlib.ExitStack() as stack:
        running = []
        for name, place in zip(names, guests, strict=True):
            address = f"lan0-{name}={place.address}/{PREFIX}"
            command = guest_command(daemon.socket(name), "--address", address)
            guest = GuestProcess(place.command(*command))
            running.append(stack.enter_context(guest))
        result = measure(hub, *guests)
        before = _interrupts_and_frames(running)
        tcp_gbit_s(guests[0], guests[1])
        after = _interrupts_and_frames(running)
        interrupts, frames = (a - b for a, b in zip(after, before, strict=True))
        result["interrupts"] = 1000 * interrupts / frames
        return result


def _interrupts_and_frames(guests: list[GuestProcess]) -> tuple[int, int]:
    """Count them over all guests: frames they sent and received."""
    interrupts = frames = 0
    for guest in guests:
        said = guest.statistics()
        interrupts += sum(said["bridge"]["interrupts"]["by_vector"])
        for device in said["devices"].values():
            counted = device["driver"]["frames"]
            frames += counted["tx_frames"] + counted["rx_frames"]
    return interrupts, frames


def veth(hub: Place, guests: list[Place]) -> None:
    """Connect by pairs of interfaces on the kernel's bridge."""
    ip("link add name hub0 type bridge")
    for nth, guest in enumerate(guests, 1):
        ip(f"link add name g{nth} type veth peer name port{nth}")
        ip(f"link set port{nth} master hub0")
        ip(f"link set port{nth} up")
        guest.take(f"g{nth}")
    hub.up("hub0")


def vde_switch(hub: Place, guests: list[Place], folder: Path) -> None:
    """Connect by one vde_switch process that owns a TAP for each."""
    names = ["hub0", *(f"g{nth}" for nth in range(1, 1 + len(guests)))]
    taps = [word for name in names for word in ("-tap", name)]
    _start_vde_switch(folder / "vde", *taps)
    hub.up("hub0")
    for name, guest in zip(names[1:], guests, strict=True):
        guest.take(name)


def vde_plug2tap(hub: Place, guests: list[Place], folder: Path) -> None:
    """Connect by vde_switch and a process for each TAP."""
    switch = folder / "vde"
    _start_vde_switch(switch)
    for nth, place in enumerate([hub, *guests]):
        subprocess.Popen(place.command("vde_plug2tap", "-s", switch, f"plug{nth}"))
        _wait_for_interface(place, f"plug{nth}")
        place.up(f"plug{nth}")


def _start_vde_switch(switch: Path, *options: str) -> None:
    # A pipe that stays open: it ends with its standard input.
    command = ["vde_switch", "-sock", str(switch), *options]
    quiet = subprocess.DEVNULL
    subprocess.Popen(command, stdin=subprocess.PIPE, stdout=quiet, stderr=quiet)
    _wait_for(switch / "ctl")


def _wait_for(path: Path) -> None:
    subprocess.run(
        ["timeout", "5", "sh", "-c", f"until [ -e {path} ]; do sleep 0.02; done"],
        check=True,
    )


def _wait_for_interface(place: Place, name: str) -> None:
    loop = f"until ip link show {name} >/dev/null 2>&1; do sleep 0.02; done"
    place.run("timeout", "5", "sh", "-c", loop)


def main(kind: str) -> None:
    hub = Place.hub()
    guests = [Place.guest(1), Place.guest(2)]
    if kind == "vbus":
        report(vbus(hub, guests))
        return
    with tempfile.TemporaryDirectory() as folder:
        if kind == "veth":
            veth(hub, guests)
        elif shutil.which(kind) is None:
            report({})
            return
        elif kind == "vde_switch":
            vde_switch(hub, guests, Path(folder))
        else:
            vde_plug2tap(hub, guests, Path(folder))
        report(measure(hub, *guests))


if __name__ == "__main__":
    main(*sys.argv[1:])
