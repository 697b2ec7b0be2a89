"""Bulk TCP between networks, with checksums at both ends, wherever the ends run."""

import json
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import trio

from tests.system.served import Served

SIZE = 256 << 20
PORT = 5301
WITHIN_S = 120

Call = Callable[..., Awaitable[str]]


def send(host: str, port: int, size: int, pause_s: float = 0) -> str:
    """Send so many bytes, and give their checksum. Runs anywhere, alone.

    `pause_s`: after each MiB, for a connection that is to last.
    """
    import os
    import socket
    import time
    import zlib

    block, state = os.urandom(1 << 20), 0
    end = time.monotonic() + 30
    while True:
        try:
            sock = socket.create_connection((host, port), 5)
            break
        except OSError:  # the sink is about to listen
            if time.monotonic() > end:
                raise
    with sock:
        for number in range(size >> 20):
            part = number.to_bytes(8, "little") + block[8:]
            state = zlib.crc32(part, state)
            sock.sendall(part)
            time.sleep(pause_s)
    return f"{size} {state:08x}"


def receive(port: int) -> str:
    """Take one connection to its end; bytes and checksum. Runs anywhere, alone."""
    import socket
    import zlib

    state = size = 0
    with socket.create_server(("", port)) as server:
        server.settimeout(60)
        sock, _ = server.accept()
        with sock:
            while part := sock.recv(1 << 20):
                state = zlib.crc32(part, state)
                size += len(part)
    return f"{size} {state:08x}"


async def here(
    function: Callable[..., str], *arguments: object, prefix: tuple[str, ...] = ()
) -> str:
    """Run a function in a process of the host."""
    call = (
        "import sys, json; import tests.transfer as m;"
        "print(getattr(m, sys.argv[1])(*json.loads(sys.argv[2])))"
    )
    words = [*prefix, sys.executable, "-c", call, function.__name__]
    done = await trio.run_process([*words, json.dumps(arguments)], capture_stdout=True)
    return done.stdout.decode().strip()


@asynccontextmanager
async def process_guest(
    served: Served, name: str, interface: str
) -> AsyncIterator[tuple[str, ...]]:
    """A host-process guest in a network of its own; gives how to run things there.

    `interface`: DEVICE=ADDRESS/PREFIX.
    """
    words = ("vbus", "guest", "run", str(served.socket(name)), "--json")
    async with in_network(*words, "--address", interface) as prefix:
        yield prefix


@asynccontextmanager
async def in_network(*words: str) -> AsyncIterator[tuple[str, ...]]:
    """Run a module of Python in a network of its own until it says "running"."""
    process = await trio.lowlevel.open_process(
        ["unshare", "--net", sys.executable, "-m", *words], stdout=subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        said = b""
        with trio.fail_after(30):
            while b"running" not in said:
                more = await process.stdout.receive_some()
                assert more, said
                said += more
        yield ("nsenter", "--target", str(process.pid), "--net")
    finally:
        process.terminate()
        with trio.CancelScope(shield=True):
            await process.wait()
            assert process.stdout is not None
            await process.stdout.aclose()


async def transfer(
    source: Call, sink: Call, address: str, what: str, size: int = SIZE
) -> None:
    """So many bytes arrive whole."""
    sums: dict[str, str] = {}

    async def take() -> None:
        sums["received"] = await sink(receive, PORT)

    began = trio.current_time()
    with trio.fail_after(WITHIN_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(take)
            sums["sent"] = await source(send, address, PORT, size)
    seconds = trio.current_time() - began
    print(f"{what}: {size * 8 / seconds / 1e9:.2f} Gbit/s with checksums at both ends")
    assert sums["received"] == sums["sent"]
