"""The vfio-user client against the real server, and against one that misbehaves."""

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
import trio.testing

from proxy.guest import attach
from proxy.memory import BASE_ADDRESS, DmaMemory
from proxy.vfio_user import VfioUserClient, connect
from tests.proxy.host import Host, open_fds, until
from vbus import abi
from vbus.errors import (
    BusyError,
    FaultError,
    InvalidError,
    NoDeviceError,
    ProtocolError,
    UnreachableError,
    VbusError,
)
from vbus.pci.constants import Irq, Region
from vbus.vfio_user import wire
from vbus.vfio_user.wire import Command


async def test_the_function_is_known_after_connecting(host: Host) -> None:
    """R61: regions, interrupts and memory, from the server's own answers."""
    path = await host.add_guest()
    with DmaMemory(1 << 20) as memory:
        async with connect(path, memory) as function:
            assert function.regions[Region.CONFIG].size == 256
            assert function.regions[Region.BAR0].size == abi.BAR_CALLS_SIZE
            assert function.regions[Region.BAR1].size == abi.BAR_SIGNALS_SIZE
            assert function.interrupt_vectors(Irq.MSIX) == 8
            assert function.interrupt_vectors(Irq.MSI) == 1
            assert await function.config_read_u16(0) == abi.VENDOR_ID
            (region,) = host.bridges["g1"].memory.regions()
            assert (region.addr, region.size) == (BASE_ADDRESS, 1 << 20)
            await function.reset()
        await until(lambda: not host.bridges["g1"].memory.regions())


async def test_dma_messages_of_the_server_are_answered(host: Host) -> None:
    """The server reads and writes memory by messages, refused outside of it."""
    path = await host.add_guest()
    server = host.servers["g1"]
    with DmaMemory(4 << 20) as memory:
        async with connect(path, memory):
            memory.space.write(BASE_ADDRESS + 100, b"from the guest")
            assert await server.dma_read(BASE_ADDRESS + 100, 14) == b"from the guest"
            await server.dma_write(BASE_ADDRESS, b"hello" * 500_000)
            assert memory.space.read(BASE_ADDRESS, 2_500_000) == b"hello" * 500_000
            with pytest.raises(FaultError):
                await server.dma_read(0, 1)
            with pytest.raises(FaultError):
                await server.dma_write(BASE_ADDRESS + (4 << 20) - 1, b"xy")


async def test_refusals_are_errors_of_their_errno(host: Host) -> None:
    path = await host.add_guest()
    with DmaMemory(1 << 20) as memory:
        async with connect(path, memory) as function:
            with pytest.raises(InvalidError, match="REGION_READ"):
                await function.bar_read(0, 64, 4)
            with pytest.raises(InvalidError, match="REGION_WRITE"):
                await function.config_write(255, b"ab")
            with pytest.raises(InvalidError):
                await function.enable_interrupts(Irq.MSIX, 9)
            with pytest.raises(InvalidError):
                await function.bar_read(7, 256, 4)


async def test_nobody_there(tmp_path: Path) -> None:
    with DmaMemory(1 << 20) as memory:
        with pytest.raises(UnreachableError, match="No such file"):
            async with connect(tmp_path / "none.sock", memory):
                pytest.fail("connected to nothing")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead:
            dead.bind(str(tmp_path / "dead.sock"))
        with pytest.raises(UnreachableError, match="refused"):
            async with connect(tmp_path / "dead.sock", memory):
                pytest.fail("connected to a dead socket")


async def test_attach_and_leave_leaves_nothing(host: Host) -> None:
    """Nothing leaks: descriptors are what they were, on both sides, many times over."""
    path = await host.add_guest()
    host.add("echo0")
    before = 0
    for round in range(30):
        async with attach(path, memory_mib=1) as bridge:
            proxy = await bridge.device("echo0")
            await proxy.open()
            await proxy.ring(0, 16)
            await proxy.call(0, b"x")
            if round % 2:
                await proxy.close()
            assert bridge.function.statistics().requests > 20
        await until(lambda: host.servers["g1"].statistics().peer is None)
        before = before or open_fds()
    assert open_fds() == before


async def test_hot_plug_leaves_nothing(host: Host) -> None:
    """R5, R8: a device that comes and goes takes its signals and doorbells along."""
    path = await host.add_guest()
    counts = set()
    async with attach(path) as bridge:
        for round in range(30):
            host.add(f"echo{round}")
            proxy = await bridge.device(f"echo{round}")
            await proxy.open()
            await proxy.ring(0, 16)
            await proxy.call(0)
            if round % 2:
                host.drop(f"echo{round}")
                await proxy.gone.wait()
                await proxy.close()
            else:
                await proxy.close()
                host.drop(f"echo{round}")
                await proxy.gone.wait()
            await trio.testing.wait_all_tasks_blocked()
            if round:
                counts.add((open_fds(), bridge.function.memory.statistics().used))
    assert len(counts) == 1


async def test_a_server_that_goes_ends_every_waiter(host: Host) -> None:
    """Peer gone: requests, interrupts and later accesses get the same clear error."""
    path = await host.add_guest()
    errors: list[str] = []

    async def expect(work: Callable[..., object], *arguments: object) -> None:
        try:
            await work(*arguments)  # type: ignore[misc]
        except NoDeviceError as error:
            errors.append(str(error))

    with DmaMemory(1 << 20) as memory:
        async with connect(path, memory) as function:
            interrupts = await function.enable_interrupts(Irq.MSIX, 8)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(expect, interrupts.wait)
                await trio.testing.wait_all_tasks_blocked()
                host.stop()
            await expect(function.config_read, 0, 2)
            with pytest.raises(NoDeviceError):
                function.post_write(0, 0, b"1234")
            with pytest.raises(NoDeviceError):
                function.ring_doorbell(1, 8, 0)
    assert errors == ["the host closed the connection"] * 2


Script = Callable[[socket.socket, wire.Message], bool]


async def misbehaving(
    path: Path, script: Script, task_status: trio.TaskStatus[None]
) -> None:
    """A server that answers VERSION, and all else as `script` says, until False."""
    with trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        await listener.bind(str(path))
        listener.listen(1)
        task_status.started()
        stream, _ = await listener.accept()
    connection = wire.Connection()
    with stream:
        while data := await stream.recv(4096):
            for message in connection.feed(data):
                if message.command == Command.VERSION:
                    answer = wire.reply(message, wire.Version(0, 1).pack())
                    await stream.send(answer)
                elif not script(stream, message):  # type: ignore[arg-type]
                    return


def garbage(sock: socket.socket, message: wire.Message) -> bool:
    os.write(sock.fileno(), b"\xff" * 64)
    return True


def reply_to_nothing(sock: socket.socket, message: wire.Message) -> bool:
    os.write(sock.fileno(), wire.reply(message._replace(id=message.id + 7)))
    return True


def wrong_command(sock: socket.socket, message: wire.Message) -> bool:
    os.write(sock.fileno(), wire.reply(message._replace(command=Command.DMA_MAP)))
    return True


def short_payload(sock: socket.socket, message: wire.Message) -> bool:
    os.write(sock.fileno(), wire.reply(message, b"abc"))
    return True


def silence(sock: socket.socket, message: wire.Message) -> bool:
    return True


def hang_up(sock: socket.socket, message: wire.Message) -> bool:
    return False


@pytest.mark.parametrize(
    ("script", "kind"),
    [
        (garbage, ProtocolError),
        (reply_to_nothing, ProtocolError),
        (wrong_command, ProtocolError),
        (short_payload, ProtocolError),
        (hang_up, NoDeviceError),
        (silence, NoDeviceError),
    ],
)
async def test_a_server_that_breaks_the_protocol_is_left(
    tmp_path: Path,
    script: Script,
    kind: type[VbusError],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nonsense, an end, or no answer at all: a clear error, and nothing left."""
    monkeypatch.setattr("proxy.vfio_user.ANSWER_TIMEOUT_S", 0.2)
    before = open_fds()
    path = tmp_path / "bad.sock"
    async with trio.open_nursery() as nursery:
        await nursery.start(misbehaving, path, script)
        with DmaMemory(1 << 20) as memory, pytest.raises(kind):
            async with connect(path, memory):
                pytest.fail("attached to a server that breaks the protocol")
    assert open_fds() == before


async def test_a_cancelled_request_does_not_disturb_the_next(host: Host) -> None:
    """Its late reply is dropped, and what it brings closed."""
    path = await host.add_guest()
    with DmaMemory(1 << 20) as memory:
        async with connect(path, memory) as function:
            before = open_fds()
            for _ in range(20):
                with trio.CancelScope() as scope:
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(function.config_read, 0, 2)
                        nursery.start_soon(function.config_read, 2, 2)
                        await trio.lowlevel.checkpoint()
                        scope.cancel()
                assert await function.config_read_u16(2) == abi.DEVICE_ID
            assert open_fds() == before


async def test_a_second_client_is_told_why_it_is_refused(host: Host) -> None:
    path = await host.add_guest()
    with DmaMemory(1 << 20) as memory, DmaMemory(1 << 20) as other:
        async with connect(path, memory) as function:
            with pytest.raises(BusyError, match="EBUSY"):
                async with connect(path, other):
                    pytest.fail("attached twice")
            assert isinstance(function, VfioUserClient)
            assert await function.config_read_u16(0) == abi.VENDOR_ID
