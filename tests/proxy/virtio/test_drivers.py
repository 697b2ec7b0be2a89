"""The driver of type "virtio": picks by GETID, and what each kind is connected to."""

import os
import tty
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from backends.virtio.small import VirtioNinep
from proxy.bridge import BridgeDriver
from proxy.drivers.virtio import VirtioDriver
from proxy.registry import DriverHost, Options, State, installed_drivers
from proxy.tasks import beside
from tests.proxy.host import Host, hosted, until
from tests.proxy.test_registry import Log
from tests.proxy.virtio.guests import CLASSES, found, guest_of
from vbus.pty import Pty


@asynccontextmanager
async def driven(
    host: Host, options: dict[str, Options] | None = None
) -> AsyncIterator[tuple[BridgeDriver, DriverHost, Log]]:
    log = Log()
    async with guest_of(host) as bridge:
        drivers = DriverHost(bridge, {"virtio": VirtioDriver}, options, log)
        async with beside(drivers.run):
            yield bridge, drivers, log


@pytest.fixture
async def host(tmp_path: Path) -> AsyncIterator[Host]:
    async with hosted(tmp_path, CLASSES) as host:
        yield host


def test_the_driver_is_found_by_the_type_string() -> None:
    """R13: "virtio" is the name that the original gave."""
    assert installed_drivers()["virtio"].load() is VirtioDriver


async def test_every_kind_is_driven_by_its_id(host: Host, tmp_path: Path) -> None:
    """R13: GETID says which; plugging and unplugging as any device (R8)."""
    host.add("disk0", "blk", path=str(tmp_path / "d"), size="1M")
    host.add("rng0", "rng")
    host.add("tty0", "console")
    async with driven(host) as (bridge, drivers, log):
        used = bridge.function.memory.statistics().used
        assert await log.until("disk0", State.RUNNING) == "1048576 bytes"
        assert await log.until("rng0", State.RUNNING) == "random bytes"
        assert "/dev/pts/" in await log.until("tty0", State.RUNNING)
        kinds = {
            name: type(each.kind).__name__ for name, each in drivers.drivers.items()
        }  # type: ignore[attr-defined]
        assert kinds == {
            "disk0": "BlkDriver",
            "rng0": "RngDriver",
            "tty0": "ConsoleDriver",
        }
        for name in ("disk0", "rng0", "tty0"):
            host.drop(name)
            await log.until(name, State.GONE)
        assert bridge.function.memory.statistics().used == used


async def test_a_kind_without_a_driver_is_named(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = host.add("rng0", "rng")
    monkeypatch.setattr(device, "model", VirtioNinep("tag"))
    async with driven(host) as (_, _, log):
        detail = await log.until("rng0", State.FAILED)
        assert detail == "no driver for virtio devices of kind 9"


async def test_options_are_checked_by_the_kind(host: Host, tmp_path: Path) -> None:
    host.add("disk0", "blk", path=str(tmp_path / "d"), size="1M")
    async with driven(host, {"disk0": {"colour": "blue"}}) as (_, _, log):
        assert "colour" in await log.until("disk0", State.FAILED)


@pytest.mark.parametrize("prio", [0, 5])
async def test_a_devices_events_have_the_priority_that_it_was_told(
    host: Host, prio: int
) -> None:
    """R7: used chains come by the vector of that priority, and by no other."""
    host.add("rng0", "rng")
    async with driven(host, {"rng0": {"prio": prio}}) as (bridge, drivers, log):
        await log.until("rng0", State.RUNNING)
        before = bridge.statistics().interrupts.by_vector
        entropy: Any = drivers.drivers["rng0"].kind.entropy  # type: ignore[attr-defined]
        assert len(await entropy.read(5000)) == 5000
        after = bridge.statistics().interrupts.by_vector
        came = {n for n, old in enumerate(before) if after[n] > old}
        assert came == {prio}


@pytest.mark.parametrize("prio", [-1, 8, "high"])
async def test_a_priority_that_there_is_not_is_refused(
    host: Host, prio: object
) -> None:
    host.add("rng0", "rng")
    async with driven(host, {"rng0": {"prio": prio}}) as (_, _, log):
        assert "prio" in await log.until("rng0", State.FAILED)


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
async def test_entropy_is_read(host: Host, packed: bool) -> None:
    """R13: bytes of the host, as many as were asked for, and no two alike."""
    host.add("rng0", "rng")
    options: dict[str, Options] = {"rng0": {"packed": packed}}
    async with driven(host, options) as (_, drivers, log):
        await log.until("rng0", State.RUNNING)
        entropy: Any = drivers.drivers["rng0"].kind.entropy  # type: ignore[attr-defined]
        data = await entropy.read(10_000)
        assert len(data) == 10_000
        assert len(set(data)) == 256
        results = []
        async with trio.open_nursery() as nursery:
            for _ in range(8):

                async def one() -> None:
                    results.append(await entropy.read(64))

                nursery.start_soon(one)
        assert len(set(results)) == 8
        counted = entropy.statistics()
        assert counted.bytes == 10_000 + 8 * 64


async def test_a_failing_device_fails_who_waits(host: Host) -> None:
    """A request that will not be answered does not wait for ever."""
    host.add("rng0", "rng", bytes_per_second=1)
    async with driven(host) as (_, drivers, log):
        await log.until("rng0", State.RUNNING)
        entropy: Any = drivers.drivers["rng0"].kind.entropy  # type: ignore[attr-defined]
        errors = []

        async def ask() -> None:
            try:
                await entropy.read(1 << 20)
            except Exception as error:
                errors.append(type(error).__name__)

        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(ask)
            await trio.testing.wait_all_tasks_blocked(0.01)
            host.drop("rng0")
        assert errors == ["NoDeviceError"] * 4


class Terminal:
    """Somebody at a pseudo-terminal."""

    def __init__(self, path: str) -> None:
        self.fd = os.open(path, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)
        tty.setraw(self.fd)

    async def read(self, size: int) -> bytes:
        data = b""
        with trio.fail_after(5):
            while len(data) < size:
                await trio.lowlevel.wait_readable(self.fd)
                data += os.read(self.fd, size - len(data))
        return data

    async def write(self, data: bytes) -> None:
        while data:
            await trio.lowlevel.wait_writable(self.fd)
            data = data[os.write(self.fd, data) :]

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)


async def test_a_console_joins_two_terminals(host: Host) -> None:
    """R13: the host's pseudo-terminal and the guest's, in both directions."""
    device = host.add("tty0", "console")
    async with driven(host) as (_, _, log):
        theirs = await log.until("tty0", State.RUNNING)
        ours = device.statistics().places[0].removeprefix("pty:")  # type: ignore[attr-defined]
        with Terminal(ours) as at_host, Terminal(theirs) as in_guest:
            await in_guest.write(b"login: ")
            assert await at_host.read(7) == b"login: "
            data = os.urandom(30_000)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(at_host.write, data)
                assert await in_guest.read(len(data)) == data
            async with trio.open_nursery() as nursery:
                nursery.start_soon(in_guest.write, data)
                assert await at_host.read(len(data)) == data


async def test_several_ports_have_names_and_places(host: Host, tmp_path: Path) -> None:
    """5.3.6.2: a port each, shown by control messages."""
    log_file = tmp_path / "log"
    host.add("tty0", "console", to=["pty", f"log:{log_file}"], ports="console,agent")
    async with driven(host) as (_, drivers, log):
        await log.until("tty0", State.RUNNING)
        driver: Any = drivers.drivers["tty0"]
        await until(lambda: set(driver.statistics().terminals) == {"console", "agent"})
        assert driver.kind.console.size == (80, 25)
        assert driver.kind.console.ports[0].is_console
        path = driver.statistics().terminals["agent"]
        with Terminal(path) as agent:
            await agent.write(b"hello from the guest")
            await until(lambda: log_file.read_bytes() == b"hello from the guest")


async def test_a_console_is_resized(host: Host) -> None:
    """R25: by configuration, and with several ports by a message."""
    device: Any = host.add("tty0", "console")
    several: Any = host.add("tty1", "console", to="pty,pty")
    async with driven(host) as (_, drivers, log):
        await log.until("tty0", State.RUNNING)
        await log.until("tty1", State.RUNNING)
        for name, each in (("tty0", device), ("tty1", several)):
            driver: Any = drivers.drivers[name]
            await until(lambda driver=driver: driver.kind.console.statistics().ports)
            each.model.resize(132, 50)
            await until(lambda driver=driver: driver.kind.console.size == (132, 50))


async def test_a_used_pseudo_terminal_does_not_block_the_device(host: Host) -> None:
    """Nobody reads the guest's terminal: what comes is dropped and counted."""
    device: Any = host.add("tty0", "console")
    async with driven(host) as (_, drivers, log):
        await log.until("tty0", State.RUNNING)
        ours = device.statistics().places[0].removeprefix("pty:")
        with Terminal(ours) as at_host:
            await at_host.write(b"x" * 5000)
            driver: Any = drivers.drivers["tty0"]
            await until(lambda: driver.statistics().dropped == 5000)


async def test_the_kind_is_checked_twice(host: Host) -> None:
    """GETID and GETINFO agree, or the driver does not begin."""
    host.add("rng0", "rng")
    async with guest_of(host) as bridge, found(bridge, "rng0") as device:
        assert device.identity.device_id == 4
        assert device.identity.queues == 1
        assert device.identity.config_size == 0


async def test_a_terminal_is_raw() -> None:
    pty = Pty()
    try:
        with Terminal(str(pty.path)) as terminal:
            await terminal.write(b"\x03\r\n")
            assert await pty.receive() == b"\x03\r\n"
    finally:
        pty.close()
