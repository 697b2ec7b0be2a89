"""The host's end of a machine's traffic: echoes frames, takes and gives bulk TCP."""

import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import trio

ECHO, SINK, SOURCE = 7007, 7009, 7019
_CHUNK = 1 << 18
_SMALL = 2048


@asynccontextmanager
async def peer(address: str) -> AsyncIterator[None]:
    """Answer at an address of this host. Raises OSError."""
    with trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as frames:
        await frames.bind((address, ECHO))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_echo, frames)
            for port, serve in ((SINK, _sink), (SOURCE, _feed)):
                (listener,) = await trio.open_tcp_listeners(port, host=address)
                nursery.start_soon(_serve, listener, serve)
            yield
            nursery.cancel_scope.cancel()


async def _echo(frames: trio.socket.SocketType) -> None:
    while True:
        data, sender = await frames.recvfrom(_SMALL)
        await frames.sendto(data, sender)


async def _serve(
    listener: trio.SocketListener, serve: Callable[[socket.socket], None]
) -> None:
    """One connection after the other, in a thread: bulk is for a plain loop."""
    async with listener:
        while True:
            stream = await listener.accept()
            with socket.socket(fileno=stream.socket.detach()) as plain:
                plain.setblocking(True)
                try:
                    await trio.to_thread.run_sync(serve, plain, abandon_on_cancel=True)
                except OSError:  # the guest has heard enough, or is gone
                    continue


def _sink(plain: socket.socket) -> None:
    """Take all; say how many bytes that were."""
    buffer, total = bytearray(_CHUNK), 0
    while got := plain.recv_into(buffer):
        total += got
    plain.sendall(b"%d" % total)


def _feed(plain: socket.socket) -> None:
    data = bytes(_CHUNK)
    while True:
        plain.sendall(data)
