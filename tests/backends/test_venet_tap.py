"""venet-tap, switch-tap: guests that reach the host's kernel through a real TAP."""

import socket
import struct

import pytest
import trio

from tests.backends.driver import Driver, Modes, Received
from tests.backends.stage import Stage, staged
from tests.frames import BROADCAST, ether
from tests.netns import carrier_becomes, isolated
from vbus.errors import NoDeviceError, NotFoundError
from vbus.net import Tap

ADDRESS = "10.9.0.1"


def names() -> set[str]:
    return {name for _, name in socket.if_nameindex()} - {"lo"}


def arp_request(mac: bytes) -> bytes:
    ask = struct.pack(">HHBBH", 1, 0x0800, 6, 4, 1) + mac
    ask += socket.inet_aton("10.9.0.2") + bytes(6) + socket.inet_aton(ADDRESS)
    return ether(ask, to=BROADCAST, by=mac, kind=0x0806)


async def answer(stage: Stage, driver: Driver) -> bytes:
    """The ARP reply of the host's kernel."""
    with trio.fail_after(5):
        while True:
            for got in driver.receive():
                if got.data[12:14] == b"\x08\x06" and got.data[20:22] == b"\0\2":
                    return got.data
            await trio.sleep(0.001)  # the kernel works meanwhile
            stage.peer.take_events()


TAP_DEVICE = {"tap0": ("venet-tap", {"ifname": "host0", "address": f"{ADDRESS}/24"})}
SWITCHED = {
    "lan0": ("switch", {}),
    "up0": (
        "switch-tap",
        {"switch": "lan0", "ifname": "host0", "address": f"{ADDRESS}/24"},
    ),
    "port0": ("venet", {"switch": "lan0"}),
    "port1": ("venet", {"switch": "lan0"}),
}


@pytest.mark.parametrize(
    "devices", [TAP_DEVICE, SWITCHED], ids=["venet-tap", "switch-tap"]
)
@isolated
async def test_the_hosts_kernel_answers_a_guest(devices: dict[str, object]) -> None:
    """R15, R2."""
    async with staged(devices) as stage:
        driver = await stage.driver(modes=Modes(sg=0x2F, l4ro=0x0F, events=3))
        driver.send(arp_request(driver.mac))
        await stage.settle()
        reply = await answer(stage, driver)
        assert reply[:6] == driver.mac
        owner = stage.device("tap0" if "tap0" in devices else "up0")
        assert reply[6:12] == bytes.fromhex(owner.host_mac.replace(":", ""))
    assert names() == set()


@isolated
async def test_a_guest_cannot_speak_with_the_hosts_address() -> None:
    """R51: the uplink's address is fixed to its port."""
    async with staged(SWITCHED) as stage:
        driver = await stage.driver(0)
        other = await stage.driver(1)
        host_mac = bytes.fromhex(stage.device("up0").host_mac.replace(":", ""))
        driver.send(ether(b"spoof", to=BROADCAST, by=host_mac))
        driver.send(ether(b"good", to=BROADCAST, by=driver.mac))
        await stage.settle()
        assert [got.data[14:] for got in other.receive() if b"oo" in got.data] == [
            b"good"
        ]
        assert stage.device("lan0").statistics().spoofed == 1


@isolated
async def test_enabled_makes_and_removes_the_host_interface() -> None:
    """R11, 9.3: ifname and enabled; the guest's link is not touched."""
    async with staged(TAP_DEVICE) as stage:
        device = stage.device("tap0")
        driver = await stage.driver()
        assert (device.ifname, names()) == ("host0", {"host0"})
        device.set_attribute("enabled", "0")
        assert (device.ifname, names()) == ("<disabled>", set())
        driver.send(arp_request(driver.mac))
        await stage.settle()
        assert driver.reap() == 1
        device.set_attribute("enabled", 1)
        assert (device.ifname, names()) == ("host0", {"host0"})
        await stage.settle()
        driver.receive()
        driver.send(arp_request(driver.mac))
        await stage.settle()
        assert await answer(stage, driver)


@isolated
async def test_the_taps_carrier_is_the_guests_link() -> None:
    """R15: down before LINKUP, after LINKDOWN, and when the guest is gone."""
    async with staged(TAP_DEVICE) as stage:
        await carrier_becomes("host0", False)
        driver = await stage.driver()
        await carrier_becomes("host0", True)
        await stage.peer.call(driver.handle, 1)
        await carrier_becomes("host0", False)
        await stage.peer.call(driver.handle, 0)
        await carrier_becomes("host0", True)
        await stage.peer.close_device(driver.handle)
        await carrier_becomes("host0", False)


@isolated
async def test_a_name_that_is_taken_refuses_the_device() -> None:
    """R11: NoDeviceError, and nothing is left behind at the switch."""
    with Tap("host0"):
        for name, (class_name, attributes) in (
            ("tap0", TAP_DEVICE["tap0"]),
            ("up0", SWITCHED["up0"]),
        ):
            async with staged({"lan0": ("switch", {})}) as stage:
                with pytest.raises(NoDeviceError, match="host0"):
                    stage.model.add_device(name, class_name, attributes)
                assert stage.device("lan0").statistics().ports == 0
        assert names() == {"host0"}


async def test_a_port_needs_a_switch_that_is_there() -> None:
    """R11."""
    async with staged({}) as stage:
        for class_name in ("venet", "switch-tap"):
            with pytest.raises(NotFoundError):
                stage.model.add_device("x", class_name, {"switch": "lan0"})


@isolated
async def test_a_frame_of_the_kernel_reaches_one_port_only() -> None:
    """R15: unicast to a guest's fixed address is not flooded."""
    async with staged(SWITCHED) as stage:
        first = await stage.driver(0)
        second = await stage.driver(1)
        first.send(arp_request(first.mac))
        await stage.settle()
        assert await answer(stage, first)
        second.receive()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.sendto(b"hello", ("10.9.0.2", 9))
        with trio.fail_after(5):
            got: list[Received] = []
            while not any(each.data.endswith(b"hello") for each in got):
                got = first.receive()
                await trio.sleep(0.001)  # the kernel works meanwhile
        assert not any(got.data.endswith(b"hello") for got in second.receive())
