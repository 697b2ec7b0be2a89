"""The venet driver against the real switch: frames from guest to guest."""

import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from backends.venet import Switch, Venet, VenetLoopback
from proxy.bridge import BridgeDriver
from proxy.drivers.tap import interface_name
from proxy.drivers.venet import VenetDriver
from proxy.guest import attach
from proxy.registry import DriverHost, State
from proxy.tasks import beside
from tests.netns import isolated
from tests.proxy.host import Host, hosted, until
from tests.proxy.test_registry import Log
from vbus.errors import InvalidError
from vbus.net import interface

CLASSES = {"switch": Switch, "venet": Venet, "loopback": VenetLoopback}
DRIVERS = {"virtual-ethernet": VenetDriver}
FRAMES = {"virtual-ethernet": {"frames": True}}


@pytest.fixture
async def host(tmp_path: Path) -> AsyncIterator[Host]:
    async with hosted(tmp_path, CLASSES) as host:
        host.add("lan0", "switch")
        yield host


@asynccontextmanager
async def guest(
    path: Path,
    log: Log,
    defaults: Mapping[str, Mapping[str, object]],
    *,
    compat: bool = False,
) -> AsyncIterator[tuple[BridgeDriver, DriverHost]]:
    async with attach(path, compat=compat) as bridge:
        drivers = DriverHost(bridge, DRIVERS, defaults=defaults, report=log)
        async with beside(drivers.run):
            yield bridge, drivers


@pytest.mark.parametrize(
    "options",
    [{}, {"offload": False}, {"events": True}, {"offload": False, "events": True}],
    ids=["sg", "flat", "sg+txc", "flat+txc"],
)
async def test_two_guests_exchange_frames(
    host: Host, options: dict[str, object]
) -> None:
    """R15, R61: every format, two guests on one switch, one process."""
    first = await host.add_guest("g1", bus="b1")
    second = await host.add_guest("g2", bus="b2")
    host.add("p1", "venet", switch="lan0", bus="b1")
    host.add("p2", "venet", switch="lan0", bus="b2")
    log = Log()
    defaults = {"virtual-ethernet": {"frames": True, **options}}
    async with (
        guest(first, log, defaults) as (_, one),
        guest(second, log, defaults) as (_, two),
    ):
        await log.until("p1", State.RUNNING)
        await log.until("p2", State.RUNNING)
        drivers = [one.drivers["p1"], two.drivers["p2"]]
        await until(
            lambda: all(d.statistics().exchange.round_trips >= 20 for d in drivers)
        )
        for count in [driver.statistics().exchange for driver in drivers]:
            assert count.peers == 1
            assert count.received_bytes > 20 * 31 * 1514
            assert count.lost_pings == 0
            assert count.rtt_us > 0
        link = drivers[0].statistics().link
        assert link is (True if options.get("events") else None)


async def test_a_guest_of_the_original_protocol_has_venet_too(host: Host) -> None:
    path = await host.add_guest()
    host.add("p1", "venet", switch="lan0")
    log = Log()
    async with guest(path, log, FRAMES, compat=True):
        assert "generated frames" in await log.until("dev0", State.RUNNING)


async def test_bulk_frames_take_few_interrupts(host: Host) -> None:
    """R6: frames by the ten thousand, interrupts by the hundred."""
    path = await host.add_guest()
    host.add("p1", "venet", switch="lan0")
    host.add("p2", "venet", switch="lan0")
    log = Log()
    async with guest(path, log, FRAMES) as (bridge, drivers):
        await log.until("p1", State.RUNNING)
        await log.until("p2", State.RUNNING)
        before = sum(bridge.statistics().interrupts.by_vector)
        exchange = drivers.drivers["p1"]
        await until(lambda: exchange.statistics().frames.rx_frames > 10_000)
        frames = sum(d.statistics().frames.rx_frames for d in drivers.drivers.values())
        interrupts = sum(bridge.statistics().interrupts.by_vector) - before
        assert interrupts / frames < 0.1


async def test_options_are_checked(host: Host) -> None:
    path = await host.add_guest()
    host.add("p1", "venet", switch="lan0")
    for options, why in (
        ({"colour": "blue"}, "colour"),
        ({"mtu": "large"}, "mtu"),
        ({"address": "300.0.0.1/24"}, "300.0.0.1"),
        ({"ifname": "a/b"}, "a/b"),
    ):
        log = Log()
        async with guest(path, log, {"virtual-ethernet": options}):
            assert why in await log.until("p1", State.FAILED)


def test_the_interface_is_named_after_the_device() -> None:
    assert interface_name("lan0-g1") == "lan0-g1"
    assert interface_name("fifteen-letters") == "fifteen-letters"
    assert interface_name("sixteen-letters!") == "venet%d"
    with pytest.raises(InvalidError):
        interface_name("")


@isolated
async def test_a_tap_carries_the_frames_of_its_namespace(tmp_path: Path) -> None:
    """R15, R61: the kernel's ARP request for a silent neighbour comes out of port 2."""
    async with hosted(tmp_path, CLASSES) as host:
        path = await host.add_guest()
        host.add("lan0", "switch")
        host.add("p1", "venet", switch="lan0")
        host.add("p2", "venet", switch="lan0")
        log = Log()
        async with attach(path) as bridge:
            options = {
                "p1": {"ifname": "eth0", "address": "10.0.0.1/24", "mtu": 1400},
                "p2": {"frames": True},
            }
            drivers = DriverHost(bridge, DRIVERS, options, log)
            async with beside(drivers.run):
                detail = await log.until("p1", State.RUNNING)
                await log.until("p2", State.RUNNING)
                mac = interface.get_mac("eth0")
                assert detail == f"eth0, {mac}"
                assert interface.get_mtu("eth0") == 1400
                with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                    sock.sendto(b"hello", ("10.0.0.2", 9))
                await until(lambda: drivers.drivers["p1"].statistics().tap.in_frames)
                await until(lambda: drivers.drivers["p2"].statistics().frames.rx_frames)
                host.drop("p1")
                await log.until("p1", State.GONE)
                assert "eth0" not in [name for _, name in socket.if_nameindex()]


async def test_without_the_right_to_a_tap_the_error_says_so(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError

    path = await host.add_guest()
    host.add("p1", "venet", switch="lan0")
    log = Log()
    monkeypatch.setattr("vbus.net.tap.os.open", refuse)
    async with guest(path, log, {}):
        assert "/dev/net/tun: permission" in await log.until("p1", State.FAILED)
