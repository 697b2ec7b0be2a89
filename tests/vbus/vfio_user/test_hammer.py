"""A client that sends anything it can: only its own connection may suffer."""

import contextlib
import os
import random
import socket
import struct

import pytest
import trio

from shm import create_memfd
from vbus.vfio_user import wire
from vbus.vfio_user.server import VfioUserServer
from vbus.vfio_user.wire import Command

_EDGES = (0, 1, 2, 4, 8, 16, 63, 64, 4096, 65535, 1 << 31, (1 << 32) - 1, 1 << 63)


class Hammer:
    """Makes messages that are right in part, and descriptors of all kinds."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        memfd = create_memfd("hammer", 1 << 16)
        truncatable = os.memfd_create("soft")
        reader, writer = os.pipe()
        self.fds = [memfd, truncatable, reader, writer, os.eventfd(0, os.EFD_NONBLOCK)]

    def close(self):
        for fd in self.fds:
            os.close(fd)

    def number(self, bits):
        edge = self.random.choice(_EDGES) + self.random.choice((-1, 0, 0, 0, 1))
        return edge % (1 << bits)

    def body(self):
        kind = self.random.randrange(4)
        if kind == 0:
            return self.random.randbytes(self.random.randrange(80))
        form = self.random.choice(("<IIQQQ", "<IIQQ", "<IIII", "<QII", "<IIIII", "<Q"))
        sizes = {"I": 32, "Q": 64}
        numbers = [self.number(sizes[letter]) for letter in form[1:]]
        return struct.pack(form, *numbers) + bytes(self.random.choice((0, 0, 4, 24)))

    def message(self):
        command = self.random.choice((*Command, *Command, 0, 14, 99))
        body = self.body()
        size = 16 + len(body)
        flags = self.random.choice((0, 0, 0, 0, 0x10))
        if self.random.random() < 0.02:
            size, flags = self.number(32), self.number(32)
        header = struct.pack("<HHIII", self.number(16), command, size, flags, 0)
        fds = self.random.choices(self.fds, k=self.random.choice((0, 0, 0, 1, 1, 2, 9)))
        return header + body, fds


async def drain(sock):
    try:
        while data := await sock.recv(65536):
            del data
    except OSError:
        pass


async def strike(bench, hammer):
    """One connection's worth of nonsense."""
    sock = trio.socket.socket(socket.AF_UNIX)
    await sock.connect(str(bench.path))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(drain, sock)
        with contextlib.suppress(OSError):  # the server has had enough
            if hammer.random.random() < 0.9:
                version = wire.Version(0, 1).pack()
                await sock.send(wire.Connection().request(1, version)[1])
            for _ in range(100):
                data, fds = hammer.message()
                rights = struct.pack(f"{len(fds)}i", *fds)
                ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)]
                await sock.sendmsg([data], ancillary if fds else [])
            sock.shutdown(socket.SHUT_WR)
    sock.close()


@pytest.mark.parametrize("seed", range(4))
async def test_other_guests_and_the_daemon_do_not_notice(
    nursery, tmp_path, bench, open_fds, seed
):
    """R3, R50, R51: descriptors and mappings are what they were; the others go on."""
    other_path = tmp_path / "other.sock"
    other_function = type(bench.function)()
    await nursery.start(VfioUserServer(other_function, other_path).serve)
    victim_path, bench.path = bench.path, other_path
    witness = await bench.attach()
    bench.path = victim_path
    before = open_fds()
    hammer = Hammer(seed)
    try:
        for _ in range(30):
            await strike(bench, hammer)
            assert await witness.read(0, 0, 4) == b"\0\1\2\3"
    finally:
        hammer.close()
    client = await bench.attach()
    assert await client.read(0, 0, 4) == b"\0\1\2\3"
    await client.leave(bench.server)
    assert open_fds() == before
    assert bench.function.memory.regions() == []
    counters = bench.server.statistics()
    assert counters.clients == 31
    assert counters.errors > 100
