"""A Disk over NBD: to clients of a Unix socket, and to this machine's own kernel."""

import contextlib
import fcntl
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import trio

from proxy.linux.devices import load_module
from proxy.virtio import nbd
from proxy.virtio.disk import Disk
from vbus.errors import (
    BusyError,
    ExistsError,
    InvalidError,
    NoDeviceError,
    NotFoundError,
    PermissionDeniedError,
    ProtocolError,
    VbusError,
)
from vbus.virtio.blk import SECTOR, Feature

_RECEIVE: Final = 256 << 10
_IN_FLIGHT: Final = 32
_LOOK_S: Final = 0.01
_SET_SOCK, _SET_BLKSIZE, _DO_IT, _CLEAR_SOCK = 0xAB00, 0xAB01, 0xAB03, 0xAB04
_SET_SIZE_BLOCKS, _DISCONNECT, _SET_FLAGS = 0xAB07, 0xAB08, 0xAB0A
_BLOCKS: Final = Path("/sys/block")


def export_of(disk: Disk, name: str) -> nbd.Export:
    """Describe a disk to NBD clients."""
    flags = nbd.Flag.HAS_FLAGS | nbd.Flag.SEND_FLUSH | nbd.Flag.CAN_MULTI_CONN
    if disk.read_only:
        flags |= nbd.Flag.READ_ONLY
    else:
        flags |= nbd.Flag.SEND_FUA | nbd.Flag.SEND_WRITE_ZEROES
        if disk.device.has(Feature.DISCARD):
            flags |= nbd.Flag.SEND_TRIM
    return nbd.Export(name, disk.size, flags, SECTOR)


class _Client:
    """One client in its transmission."""

    def __init__(self, disk: Disk, stream: trio.SocketStream) -> None:
        self._disk = disk
        self._stream = stream
        self._room = trio.Semaphore(_IN_FLIGHT)
        self._sending = trio.Lock()

    async def serve(self, rest: bytes = b"") -> None:
        """Answer requests until the client leaves. Raises ProtocolError."""
        parser = nbd.Transmission()
        data = rest
        async with trio.open_nursery() as nursery:
            while True:
                for request in parser.feed(data):
                    if request.kind == nbd.Command.DISC:
                        return
                    await self._room.acquire()
                    nursery.start_soon(self._answer, request)
                data = await self._stream.receive_some(_RECEIVE)
                if not data:
                    return

    async def _answer(self, request: nbd.Request) -> None:
        try:
            reply = nbd.answer(request, data=await self._do(request))
        except InvalidError:
            reply = nbd.answer(request, nbd.Error.EINVAL)
        except PermissionDeniedError:
            reply = nbd.answer(request, nbd.Error.EPERM)
        except VbusError:
            reply = nbd.answer(request, nbd.Error.EIO)
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            async with self._sending:
                await self._stream.send_all(reply)
        self._room.release()

    async def _do(self, request: nbd.Request) -> bytes:
        disk, at, size = self._disk, request.offset, request.size
        match request.kind:
            case nbd.Command.READ:
                if size > nbd.MAX_DATA:
                    raise InvalidError(f"a read of {size} bytes")
                return await disk.read(at, size)
            case nbd.Command.WRITE:
                await disk.write(at, request.data)
            case nbd.Command.FLUSH:
                await disk.flush()
            case nbd.Command.TRIM:
                await disk.discard(at, size)
            case nbd.Command.WRITE_ZEROES:
                unmap = not request.flags & nbd.CommandFlag.NO_HOLE
                await disk.write_zeroes(at, size, unmap=unmap)
            case _:
                raise InvalidError(f"no NBD command {request.kind}")
        if request.flags & nbd.CommandFlag.FUA:
            await disk.flush()
        return b""


async def serve_unix(
    disk: Disk,
    path: Path,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve a disk at a Unix socket to any number of clients, until cancelled.

    Raises ExistsError if something lies there, InvalidError.
    """
    sock = _listen(path)
    listener = trio.SocketListener(trio.socket.from_stdlib_socket(sock))
    try:
        async with trio.open_nursery() as nursery:
            task_status.started()
            while True:
                stream = await listener.accept()
                nursery.start_soon(_greet, disk, path.name, stream)
    finally:
        _forget(path)
        with trio.CancelScope(shield=True):
            await listener.aclose()


def _listen(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        sock.bind(str(path))
        sock.listen()
    except OSError as error:
        sock.close()
        if path.exists():
            message = f"{path} exists; remove it if nobody listens there"
            raise ExistsError(message) from None
        raise InvalidError(f"{path}: {error.strerror or error}") from None
    return sock


def _forget(path: Path) -> None:
    path.unlink(missing_ok=True)


async def _greet(disk: Disk, name: str, stream: trio.SocketStream) -> None:
    """Serve one client, whose breaking of the protocol ends only itself."""
    async with stream:
        with contextlib.suppress(
            ProtocolError, trio.BrokenResourceError, trio.ClosedResourceError
        ):
            handshake = nbd.Handshake(export_of(disk, name))
            await stream.send_all(handshake.greeting)
            while not handshake.done:
                data = await stream.receive_some(_RECEIVE)
                if not data:
                    return
                await stream.send_all(handshake.feed(data))
                if handshake.closed:
                    return
            await _Client(disk, stream).serve(handshake.rest)


@asynccontextmanager
async def in_kernel(disk: Disk) -> AsyncIterator[str]:
    """Have this machine's kernel use the disk: gives its name, such as /dev/nbd0.

    Raises NotFoundError without the kernel's module nbd, BusyError without a free
    device, PermissionDeniedError.
    """
    if not (_BLOCKS / "nbd0").exists():
        await trio.to_thread.run_sync(load_module, "nbd")
    ours, kernels = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with contextlib.ExitStack() as stack:
        stack.enter_context(ours)
        stack.enter_context(kernels)
        node, fd = _claim(kernels, disk)
        stack.callback(os.close, fd)
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(ours))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_Client(disk, stream).serve)
            lent = trio.Event()
            nursery.start_soon(_lend_thread, fd, lent)
            try:
                await _connected(node, disk, lent)
                nursery.start_soon(_follow_size, fd, disk)
                yield f"/dev/{node}"
            finally:
                with contextlib.suppress(OSError):
                    fcntl.ioctl(fd, _DISCONNECT)
                kernels.shutdown(socket.SHUT_RDWR)
                nursery.cancel_scope.cancel()


async def _lend_thread(fd: int, ended: trio.Event) -> None:
    """Lend the kernel a thread until the device is disconnected."""
    await trio.to_thread.run_sync(_do_it, fd)
    ended.set()


async def _follow_size(fd: int, disk: Disk) -> None:
    while True:
        await disk.resized.wait()
        fcntl.ioctl(fd, _SET_SIZE_BLOCKS, disk.size // SECTOR)


async def _connected(node: str, disk: Disk, ended: trio.Event) -> None:
    """Wait until the kernel uses it. Raises NoDeviceError."""
    while not _is_used(node, disk):  # the kernel tells nobody
        if ended.is_set():
            raise NoDeviceError(f"the kernel does not take /dev/{node}")
        await trio.sleep(_LOOK_S)


def _is_used(node: str, disk: Disk) -> bool:
    """Is it connected? The kernel gives it its size only after its user's name."""
    if not (_BLOCKS / node / "pid").exists():
        return False
    return not disk.size or int((_BLOCKS / node / "size").read_text()) > 0


def _claim(sock: socket.socket, disk: Disk) -> tuple[str, int]:
    """Take the first device that nobody uses: its name and fd."""
    for number in range(len(list(_BLOCKS.glob("nbd*")))):
        node = f"nbd{number}"
        if (_BLOCKS / node / "pid").exists():
            continue
        try:
            fd = os.open(f"/dev/{node}", os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            raise NotFoundError(f"/dev/{node}: the kernel has no device nbd") from None
        except PermissionError:
            raise PermissionDeniedError(f"/dev/{node}: permission denied") from None
        except OSError:  # somebody has it for himself
            continue
        try:
            fcntl.ioctl(fd, _SET_SOCK, sock.fileno())
            fcntl.ioctl(fd, _SET_BLKSIZE, SECTOR)
            fcntl.ioctl(fd, _SET_SIZE_BLOCKS, disk.size // SECTOR)
            fcntl.ioctl(fd, _SET_FLAGS, int(export_of(disk, node).flags))
        except OSError:  # somebody was faster
            os.close(fd)
            continue
        return node, fd
    raise BusyError("every /dev/nbdN is in use; modprobe nbd nbds_max=N makes more")


def _do_it(fd: int) -> None:
    with contextlib.suppress(OSError):
        fcntl.ioctl(fd, _DO_IT)
    with contextlib.suppress(OSError):
        fcntl.ioctl(fd, _CLEAR_SOCK)
