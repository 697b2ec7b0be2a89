"""The bridge driver on a real server over a real socket."""

import pytest
import trio
import trio.lowlevel
import trio.testing

from proxy.bridge import BridgeDriver
from proxy.guest import attach
from tests.proxy.host import BUS, Host
from vbus import abi
from vbus.errors import BusyError, InvalidError, NoDeviceError, NotFoundError


@pytest.mark.parametrize(
    ("msix", "compat", "queues", "vectors"),
    [
        (True, False, 8, 8),
        (False, False, 8, 1),
        (True, True, 1, 1),
        (False, True, 1, 1),
    ],
)
async def test_attach_finds_the_devices_that_are_there(
    host: Host, msix: bool, compat: bool, queues: int, vectors: int
) -> None:
    """R3, R4, R61: with MSI-X or MSI, with extensions or the original handshake."""
    path = await host.add_guest(msix=msix)
    host.add("echo0")
    host.add("echo1")
    async with attach(path, compat=compat) as bridge:
        device = await bridge.device(1)
        assert device.type == "org.vbus.echo"
        assert device.name == ("dev1" if compat else "echo1")
        async with device.opened():
            assert await device.call(0, b"hello") == (0, b"hello")
        statistics = bridge.statistics()
        assert statistics.queues == queues
        assert len(statistics.interrupts.by_vector) == vectors
        assert statistics.events["devadd"] == 2
        assert statistics.events["devname"] == (0 if compat else 2)
        assert statistics.calls.slow_calls == 0
        assert statistics.calls.fast_calls == 3
    assert host.bridges["g1"].statistics().connections == 0


async def test_a_device_comes_and_goes_without_pci_hot_plug(host: Host) -> None:
    """R8, R10: DEVADD and DEVDROP come as events; no region, no vector is added."""
    path = await host.add_guest()
    async with attach(path) as bridge:
        before = bridge.statistics().interrupts
        host.add("late")
        device = await bridge.device("late")
        await device.open()
        assert await device.call(0, b"x") == (0, b"x")
        host.drop("late")
        await device.gone.wait()
        assert "late" not in [each.name for each in bridge.devices.values()]
        with pytest.raises(NoDeviceError, match="late has left the bus"):
            await device.call(0, b"x")
        await device.close()
        with pytest.raises(NoDeviceError):
            await device.open()
        after = bridge.statistics().interrupts
        assert len(after.by_vector) == len(before.by_vector)


async def test_waiting_for_a_device_ends_when_the_host_goes(host: Host) -> None:
    path = await host.add_guest()

    async def guest() -> None:
        async with attach(path) as bridge, trio.open_nursery() as nursery:
            nursery.start_soon(bridge.device, "never")
            await trio.testing.wait_all_tasks_blocked()
            host.stop()
            await trio.testing.wait_all_tasks_blocked()

    with pytest.raises(NoDeviceError, match="host closed the connection"):
        await guest()


async def test_cancelled_from_outside_it_closes_its_devices(host: Host) -> None:
    """R60: the host's answers still come in while the guest leaves."""
    path = await host.add_guest()
    host.add("echo0")

    async def guest(
        task_status: trio.TaskStatus[BridgeDriver] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        async with attach(path) as bridge:
            device = await bridge.device("echo0")
            await device.open()
            task_status.started(bridge)
            await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        bridge = await nursery.start(guest)
        assert host.bridges["g1"].statistics().connections == 1
        nursery.cancel_scope.cancel()
    assert host.bridges["g1"].statistics().connections == 0
    assert bridge.statistics().calls.fast_calls == 2  # DEVOPEN and DEVCLOSE


async def test_open_by_name_is_looked_up_in_the_host(host: Host) -> None:
    """R2, R3: software in the guest asks for "echo1" and not for number 1."""
    path = await host.add_guest()
    host.add("echo0")
    host.add("echo1")
    async with attach(path) as bridge:
        device = await bridge.open("echo1")
        assert (device.id, device.name) == (1, "echo1")
        assert await device.call(0, b"abc") == (0, b"abc")
        with pytest.raises(BusyError):
            await bridge.open("echo1")
        with pytest.raises(NotFoundError):
            await bridge.open("echo2")
        with pytest.raises(InvalidError):
            await bridge.open("x" * 64)
        await device.close()
        await device.open(by_name=True)
        assert device.is_open


async def test_names_are_an_extension(host: Host) -> None:
    path = await host.add_guest()
    host.add("echo0")
    async with attach(path, compat=True) as bridge:
        with pytest.raises(InvalidError):
            await bridge.open("echo0")


async def test_a_second_guest_on_the_socket_is_refused(host: Host) -> None:
    path = await host.add_guest()
    async with attach(path):
        with pytest.raises(BusyError):
            async with attach(path):
                pytest.fail("attached twice")


async def test_two_guests_of_one_bus_see_the_same_devices(host: Host) -> None:
    """R2, R3: each has its own handles; one device, one connection at a time."""
    first, second = await host.add_guest("g1"), await host.add_guest("g2")
    host.add("echo0")
    async with attach(first) as one, attach(second) as two:
        mine = await one.device("echo0")
        other = await two.device("echo0")
        await mine.open()
        with pytest.raises(BusyError):
            await other.open()
        await mine.close()
        await other.open()
        assert await other.call(0, b"2") == (0, b"2")


async def test_a_thousand_devices_cost_one_function(host: Host) -> None:
    """R10: a thousand devices, eight vectors, three BARs; each can be called."""
    path = await host.add_guest()
    for number in range(1000):
        host.add(f"echo{number}")
    with trio.fail_after(30):
        async with attach(path) as bridge:
            await bridge.device("echo999")
            assert len(bridge.devices) == 1000
            for device in list(bridge.devices.values()):
                async with device.opened():
                    assert (await device.call(0, b"1"))[1] == b"1"
            statistics = bridge.statistics()
            assert sum(statistics.interrupts.by_vector) < 500
            assert statistics.events["devadd"] == 1000
            assert statistics.calls.channels < 8
            gone = bridge.devices[0]
            host.model.unlink(BUS, "echo0")
            await gone.gone.wait()
            assert 0 not in bridge.devices


async def test_backlog_is_taken_up_when_the_host_is_told_of_room(host: Host) -> None:
    """R6: more devices than descriptors; the driver rings when it has made room."""
    path = await host.add_guest()
    for number in range(3000):
        host.add(f"echo{number}")
    with trio.fail_after(30):
        async with attach(path, compat=True) as bridge:
            await bridge.device(2999)
            statistics = bridge.statistics()
            assert statistics.doorbells >= 1
            assert statistics.events["devadd"] == 3000
        assert host.bridges["g1"].statistics().events.stalls >= 1


async def test_a_wrong_function_is_not_driven(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = await host.add_guest()
    monkeypatch.setattr(abi, "REVISION", 3)
    with pytest.raises(NotFoundError, match="revision 2"):
        async with attach(path):
            pytest.fail("drove a bridge of another revision")
