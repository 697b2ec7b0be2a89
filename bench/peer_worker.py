"""The peers of the rings: `Worker("peer_worker", PEER, ROLE, ...)`.

Each written as its users would write it, between the same two pinned processes. The
message is 64 bytes or more; one of a single byte says that it was the last.
"""

import socket
import sys
import time
from collections.abc import Callable

import msgpack
import trio

from bench.processes import FAR, NEAR, pin, report

_CHUNK = 64
_WARM_UP = 100


class Seqpacket:
    """AF_UNIX SOCK_SEQPACKET, blocking: one send(2), one recv(2) a message."""

    def __init__(self, where: str) -> None:
        self._socket = socket.socket(fileno=int(where))
        self._room = memoryview(bytearray(1 << 17))

    def push(self, message: bytes) -> None:
        self._socket.send(message)

    def pull(self) -> int:
        return self._socket.recv_into(self._room)


class Zmq:
    """pyzmq PUSH and PULL over ipc."""

    def __init__(self, where: str) -> None:
        import zmq

        path, role = where.split(",")
        self._socket = zmq.Context().socket(zmq.PUSH if role == "push" else zmq.PULL)
        if role == "push":
            self._socket.connect(f"ipc://{path}")
        else:
            self._socket.bind(f"ipc://{path}")

    def push(self, message: bytes) -> None:
        self._socket.send(message)

    def pull(self) -> int:
        return len(self._socket.recv())


PEERS: dict[str, Callable[[str], Seqpacket | Zmq]] = {
    "seqpacket": Seqpacket,
    "zmq": Zmq,
}


def push(peer: Seqpacket | Zmq, size: int, milliseconds: int) -> None:
    """Send for some time, after a fifth of it to warm up."""
    message = bytes(size)

    def send_for(for_ms: float) -> int:
        until, sent = time.perf_counter_ns() + int(for_ms * 1e6), 0
        while time.perf_counter_ns() < until:
            for _ in range(_CHUNK):
                peer.push(message)
            sent += _CHUNK
        return sent

    send_for(milliseconds / 5)
    begin = time.perf_counter_ns()
    sent = send_for(milliseconds)
    rate = sent / (time.perf_counter_ns() - begin) * 1e9
    peer.push(b"!")
    report({"rate": rate})


def pull(peer: Seqpacket | Zmq) -> None:
    """Receive up to the last message."""
    count = 1
    while peer.pull() != 1:
        count += 1
    report({"messages": count})


async def ask(stream: trio.SocketStream, milliseconds: int) -> None:
    """A small call protocol: msgpack maps on a trio stream, one call at a time."""
    unpacker = msgpack.Unpacker()
    took: list[int] = []
    until = 0
    while not until or time.perf_counter_ns() < until:
        begin = time.perf_counter_ns()
        request = {"id": len(took), "method": "echo", "data": bytes(64)}
        await stream.send_all(msgpack.packb(request))
        unpacker.feed(await stream.receive_some())
        if next(unpacker)["id"] != len(took):
            raise RuntimeError("an answer to another call")
        took.append(time.perf_counter_ns() - begin)
        if len(took) == _WARM_UP and not until:
            took.clear()
            until = time.perf_counter_ns() + milliseconds * 1_000_000
    took.sort()
    report({"p50_ns": took[len(took) // 2], "p99_ns": took[len(took) * 99 // 100]})


async def answer(stream: trio.SocketStream) -> None:
    """The other end of `ask`."""
    unpacker = msgpack.Unpacker()
    while chunk := await stream.receive_some():
        unpacker.feed(chunk)
        for call in unpacker:
            reply = {"id": call["id"], "result": call["data"]}
            await stream.send_all(msgpack.packb(reply))
    report({})


def main(peer: str, role: str, where: str, size: str, milliseconds: str) -> None:
    pin(NEAR if role in ("push", "ask") else FAR)
    if peer == "trio":
        end = trio.socket.from_stdlib_socket(socket.socket(fileno=int(where)))
        stream = trio.SocketStream(end)
        if role == "ask":
            trio.run(ask, stream, int(milliseconds))
        else:
            trio.run(answer, stream)
    elif role == "push":
        push(PEERS[peer](where), int(size), int(milliseconds))
    else:
        pull(PEERS[peer](where))


if __name__ == "__main__":
    main(*sys.argv[1:])
