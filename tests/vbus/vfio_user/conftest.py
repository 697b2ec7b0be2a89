"""A served function and a raw client: real sockets, memfds and eventfds."""

import os
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from shm import AddressSpace, create_memfd, receive_with_fds, send_with_fds
from vbus.pci.config_space import Bar, ConfigSpace, Identity, Msi, Msix
from vbus.pci.constants import Region
from vbus.pci.function import (
    ConfiguredFunction,
    InterruptSink,
    IoEventFd,
    Pending,
    RegionInfo,
)
from vbus.vfio_user import wire
from vbus.vfio_user.server import VfioUserServer
from vbus.vfio_user.wire import Command

BAR0_SIZE = 64


class SampleFunction(ConfiguredFunction):
    """A bridge-like function that records what happens to it."""

    def __init__(self) -> None:
        config = ConfigSpace(
            Identity(0x11DA, 0x2000, 0x068000, 2, 0x1AF4, 0x1100),
            {0: Bar(BAR0_SIZE), 1: Bar(32, io=True), 2: Bar(4096)},
            [Msi(), Msix(8, 2, 0x800)],
            interrupt_pin=1,
        )
        super().__init__(config, AddressSpace())
        self.events: list[tuple[Any, ...]] = []
        self.on_read: Callable[[int, int, int], bytes | Pending] | None = None
        self.on_write: Callable[[int, int, bytes], Pending | None] | None = None
        self.offers: list[IoEventFd] = []
        self.mappable: RegionInfo | None = None
        self.limits: list[int] = []
        self.stands = False

    def region(self, index: int) -> RegionInfo:
        if self.mappable is not None and index == Region.BAR0:
            return self.mappable
        return super().region(index)

    def bar_read(self, bar: int, offset: int, size: int) -> bytes | Pending:
        self.events.append(("read", bar, offset, size))
        if self.on_read is not None:
            return self.on_read(bar, offset, size)
        return bytes(range(offset, offset + size))

    def bar_write(self, bar: int, offset: int, data: bytes) -> Pending | None:
        self.events.append(("write", bar, offset, data))
        return None if self.on_write is None else self.on_write(bar, offset, data)

    def line_asserted(self) -> bool:
        return self.stands

    def io_eventfds(self, region: int, limit: int) -> list[IoEventFd]:
        self.limits.append(limit)
        return self.offers[:limit] if region == Region.BAR1 else []

    def attach(self, interrupts: InterruptSink) -> None:
        super().attach(interrupts)
        self.events.append(("attach",))

    def detach(self) -> None:
        self.events.append(("detach",))
        super().detach()

    def reset(self) -> None:
        super().reset()
        self.events.append(("reset",))

    def seen(self, kind: str) -> list[tuple[Any, ...]]:
        return [event[1:] for event in self.events if event[0] == kind]


class RawClient:
    """The other end of the wire; sends what it is told, right or wrong."""

    def __init__(self, sock: "trio.socket.SocketType") -> None:
        self.sock = sock
        self.wire = wire.Connection(max_fds=wire.SCM_MAX_FD)
        self.arrived: list[wire.Message] = []

    async def message(self) -> wire.Message | None:
        """Receive the next message; None at the end of the connection."""
        while not self.arrived:
            data, fds = await receive_with_fds(self.sock, 65536, wire.SCM_MAX_FD)
            if not data:
                return None
            taken = [fds.take() for _ in range(len(fds))]
            self.arrived += self.wire.feed(data, taken)
        return self.arrived.pop(0)

    async def send(
        self, command: int, body: bytes = b"", fds: Any = (), no_reply: bool = False
    ) -> int:
        ident, data = self.wire.request(command, body, no_reply=no_reply)
        await send_with_fds(self.sock, data, list(fds))
        return ident

    async def call(
        self, command: int, body: bytes = b"", fds: Any = ()
    ) -> wire.Message:
        """Send a request and receive its reply, whatever it says."""
        ident = await self.send(command, body, fds)
        message = await self.message()
        assert message is not None, "the server ended the connection"
        assert (message.id, message.command) == (ident, command)
        return message

    async def ask(self, command: int, body: bytes = b"", fds: Any = ()) -> bytes:
        """Make a call that must succeed."""
        message = await self.call(command, body, fds)
        assert not message.failed, wire.error_name(message.error)
        return message.body

    async def refused(self, command: int, body: bytes = b"", fds: Any = ()) -> int:
        """Make a call that must fail; give its errno."""
        message = await self.call(command, body, fds)
        assert message.failed
        assert message.body == b""
        return message.error

    async def ended(self) -> bool:
        """Has the server ended the connection?"""
        try:
            return await self.message() is None
        except ConnectionResetError:
            return True

    async def version(self, capabilities: wire.Capabilities | None = None) -> bytes:
        capabilities = capabilities or wire.Capabilities(max_msg_fds=16)
        return await self.ask(Command.VERSION, wire.Version(0, 1, capabilities).pack())

    async def read(self, region: int, offset: int, size: int) -> bytes:
        body = wire.RegionAccess(offset, region, size).pack()
        reply = await self.ask(Command.REGION_READ, body)
        access = wire.RegionAccess.unpack_data(reply)
        assert access[:3] == (offset, region, size)
        return access.data

    async def write(self, region: int, offset: int, data: bytes) -> None:
        body = wire.RegionAccess(offset, region, len(data), data).pack()
        reply = await self.ask(Command.REGION_WRITE, body)
        assert wire.RegionAccess.unpack(reply) == (offset, region, len(data), b"")

    async def map(self, address: int, size: int, fd: int | None = None) -> None:
        body = wire.DmaMap(3, 0, address, size).pack()
        assert await self.ask(Command.DMA_MAP, body, [] if fd is None else [fd]) == b""

    async def leave(self, server: VfioUserServer) -> None:
        """Close, and wait until the server has cleaned up."""
        self.sock.close()
        with trio.fail_after(5):
            while server.statistics().peer is not None:
                await trio.lowlevel.checkpoint()


class Bench:
    """A server that runs, its function, and clients for it."""

    def __init__(self, server: VfioUserServer, function: SampleFunction) -> None:
        self.server = server
        self.function = function
        self.path = server.path
        self.clients: list[RawClient] = []

    async def connect(self) -> RawClient:
        sock = trio.socket.socket(socket.AF_UNIX)
        self.clients.append(RawClient(sock))
        await sock.connect(str(self.path))
        return self.clients[-1]

    async def attach(self, capabilities: wire.Capabilities | None = None) -> RawClient:
        client = await self.connect()
        await client.version(capabilities)
        return client


@pytest.fixture
async def bench(nursery: trio.Nursery, tmp_path: Path) -> AsyncIterator[Bench]:
    function = SampleFunction()
    server = VfioUserServer(function, tmp_path / "guest.sock", name="guest")
    await nursery.start(server.serve)
    bench = Bench(server, function)
    yield bench
    for client in bench.clients:
        client.sock.close()


@pytest.fixture
async def client(bench: Bench) -> RawClient:
    return await bench.attach()


@pytest.fixture
def memfd() -> "Any":
    fd = create_memfd("guest", 1 << 20)
    yield fd
    os.close(fd)


@pytest.fixture
def eventfds() -> "Any":
    """Make eventfds that are closed at the end of the test."""
    made: list[int] = []

    def make(count: int) -> list[int]:
        fresh = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(count)]
        made.extend(fresh)
        return fresh

    yield make
    for fd in made:
        os.close(fd)


@pytest.fixture
def open_fds() -> Callable[[], int]:
    return lambda: len(os.listdir("/proc/self/fd"))
