"""Doorbells: rung from anywhere, awaited by one end, never in anyone's way."""

import os

import pytest
import trio
import trio.testing

from shm import Doorbell
from shm.errors import InvalidError


async def test_wait_returns_how_often_it_was_rung() -> None:
    with Doorbell() as bell:
        bell.ring()
        bell.ring()
        with trio.testing.assert_checkpoints():
            assert await bell.wait() == 2
        assert bell.drain() == 0
        assert bell.statistics().rings == 2
        assert bell.statistics().wakes == 1


async def test_a_sleeping_task_is_woken() -> None:
    with Doorbell() as bell:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(bell.wait)
            await trio.testing.wait_all_tasks_blocked()
            bell.ring()


async def test_a_cancelled_wait_takes_nothing() -> None:
    with Doorbell() as bell:
        bell.ring()
        with trio.CancelScope() as scope:
            scope.cancel()
            await bell.wait()
        assert scope.cancelled_caught
        assert bell.drain() == 1


async def test_closing_ends_a_wait() -> None:
    bell = Doorbell()
    async with trio.open_nursery() as nursery:

        async def waiter() -> None:
            with pytest.raises(trio.ClosedResourceError):
                await bell.wait()

        nursery.start_soon(waiter)
        await trio.testing.wait_all_tasks_blocked()
        bell.close()
    assert bell.closed
    with pytest.raises(trio.ClosedResourceError):
        await bell.wait()


def test_closing_twice_and_outside_trio_is_fine() -> None:
    bell = Doorbell()
    bell.close()
    bell.close()
    assert (bell.closed, bell.fileno()) == (True, -1)


def test_a_peer_that_fills_the_counter_does_not_hang_the_ringer() -> None:
    """The flag that makes a write block belongs to the file, which the peer shares."""
    with Doorbell() as bell:
        peer = os.dup(bell.fileno())
        os.set_blocking(peer, True)
        os.eventfd_write(peer, 2**64 - 2)
        for _ in range(3):
            bell.ring()
        assert bell.drain() == 2**64 - 1
        os.close(peer)


async def test_a_full_counter_wakes() -> None:
    with Doorbell() as bell:
        os.eventfd_write(bell.fileno(), 2**64 - 2)
        bell.ring()
        assert await bell.wait() == 2**64 - 1


def test_every_ring_counts() -> None:
    """More than the kernel queues at once."""
    with Doorbell() as bell:
        for _ in range(1000):
            bell.ring()
        assert bell.drain() == 1000


def test_a_forked_child_rings_too() -> None:
    with Doorbell() as bell:
        bell.ring()
        pid = os.fork()
        if pid == 0:
            bell.ring()
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert bell.drain() == 2


def test_ringing_what_is_closed_is_an_error() -> None:
    bell = Doorbell()
    bell.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        bell.ring()


def test_a_peer_that_makes_the_fd_blocking_does_not_hang_us() -> None:
    """The flag belongs to the file, which the peer shares."""
    with Doorbell() as bell:
        peer = os.dup(bell.fileno())
        os.set_blocking(peer, True)
        assert bell.drain() == 0
        os.close(peer)


def test_a_received_eventfd_is_adopted() -> None:
    fd = os.eventfd(0)
    with Doorbell.adopt(fd) as bell:
        os.eventfd_write(fd, 3)
        assert bell.drain() == 3
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_what_is_no_eventfd_is_refused_and_closed() -> None:
    reader, writer = os.pipe()
    with pytest.raises(InvalidError):
        Doorbell.adopt(reader)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(reader)
    os.close(writer)
