"""Fds over unix sockets: every one that arrives has an owner or is closed."""

import array
import os
import socket
from collections.abc import AsyncIterator

import pytest
import trio

from shm import ReceivedFds, receive_with_fds, send_with_fds
from shm.errors import InvalidError

Pair = tuple[trio.socket.SocketType, trio.socket.SocketType]


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    left, right = trio.socket.socketpair()
    yield left, right
    left.close()
    right.close()


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


async def test_bytes_and_fds_arrive_together(pair: Pair) -> None:
    left, right = pair
    fd = os.eventfd(0)
    before = open_fds()
    await send_with_fds(left, b"hello", [fd, fd])
    data, fds = await receive_with_fds(right, 100, 2)
    with fds:
        assert (data, len(fds)) == (b"hello", 2)
        mine = fds.take()
        os.eventfd_write(mine, 7)
        assert os.eventfd_read(fd) == 7
        assert not os.get_inheritable(mine)
        os.close(mine)
    assert open_fds() == before
    os.close(fd)


async def test_fds_that_nobody_takes_are_closed(pair: Pair) -> None:
    left, right = pair
    before = open_fds()
    fd = os.eventfd(0)
    await send_with_fds(left, b"x", [fd] * 3)
    os.close(fd)
    _, fds = await receive_with_fds(right, 100, 3)
    fds.close()
    assert open_fds() == before
    with pytest.raises(InvalidError):
        fds.take()


@pytest.mark.parametrize("many", [2, 3, 200])
async def test_more_fds_than_allowed_are_refused_and_closed(
    pair: Pair, many: int
) -> None:
    left, right = pair
    before = open_fds()
    rights = array.array("i", [0] * many).tobytes()
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)]
    await left.sendmsg([b"x"], ancillary)
    with pytest.raises(InvalidError):
        await receive_with_fds(right, 100, 1)
    assert open_fds() == before


async def test_a_long_message_goes_in_pieces_and_its_fds_once(pair: Pair) -> None:
    left, right = pair
    data = os.urandom(1 << 20)
    fd = os.eventfd(0)
    got, total = bytearray(), ReceivedFds()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(send_with_fds, left, data, [fd])
        while len(got) < len(data):
            piece, fds = await receive_with_fds(right, 1 << 16, 1)
            got += piece
            total.add(fds)
    assert got == data
    assert len(total) == 1
    total.close()
    os.close(fd)


async def test_the_end_of_the_stream_is_empty(pair: Pair) -> None:
    left, right = pair
    left.close()
    data, fds = await receive_with_fds(right, 100, 1)
    assert (data, len(fds)) == (b"", 0)


async def test_fds_need_a_byte_to_travel_with(pair: Pair) -> None:
    with pytest.raises(InvalidError):
        await send_with_fds(pair[0], b"", [0])
