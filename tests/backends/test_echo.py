"""The example device: what comes, goes back."""

from array import array

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from backends.echo import REPLIES, REQUESTS, Echo
from ioq import Index
from vbus.testing import NorthRing, NurseryEffects, RecordedBridge

ROOM = 256


def test_a_call_returns_its_data() -> None:
    """R4: the buffer is input and output."""

    async def play() -> None:
        with RecordedBridge({"echo": Echo}) as recorded:
            recorded.add("echo0", "echo")
            await recorded.peer.start()
            handle = await recorded.peer.open(0)
            for data in (b"", b"x", bytes(range(256)) * 16):
                assert await recorded.peer.call(handle, 0, data) == (0, data)
            with pytest.raises(OSError, match="Invalid argument"):
                await recorded.peer.call(handle, 1, b"x")
            with pytest.raises(OSError, match="Invalid argument"):
                await recorded.peer.share_ring(handle, 2, 4)

    trio.run(play)


def receive(replies: NorthRing) -> list[bytes]:
    """All replies, their buffers posted again."""
    payload, sizes = bytearray(64 * ROOM), array("I", bytes(4 * 64))
    got = []
    while taken := replies.ring.consume(payload, sizes, 64, ROOM):
        at = 0
        for size in sizes[:taken]:
            got.append(bytes(payload[at : at + size]))
            at += size
    replies.ring.signal.inject()
    return got


@given(messages=st.lists(st.binary(max_size=ROOM), max_size=40))
@settings(max_examples=30, deadline=None)
def test_the_ring_returns_every_message_in_order(messages: list[bytes]) -> None:
    """R12: more than both rings hold, through back-pressure."""

    async def play() -> None:
        async with trio.open_nursery() as nursery:
            effects = NurseryEffects(nursery)
            with RecordedBridge({"echo": Echo}, effects=effects) as recorded:
                recorded.add("echo0", "echo")
                peer = recorded.peer
                await peer.start()
                handle = await peer.open(0)
                requests = await peer.share_ring(handle, REQUESTS, 8)
                replies = await peer.share_ring(handle, REPLIES, 5)
                slots = peer.allocate(8 * ROOM)
                for at in range(5):
                    buffer = peer.allocate(ROOM)
                    replies.ring.push([(at, buffer, ROOM)], index=Index.VALID)
                got: list[bytes] = []
                left = messages
                while len(got) < len(messages):
                    sizes = array("I", [len(message) for message in left])
                    if left:
                        done = requests.ring.produce(
                            b"".join(left), sizes, (slots, ROOM)
                        )
                        left = left[done:]
                        requests.ring.signal.inject()
                    await trio.testing.wait_all_tasks_blocked()
                    peer.take_events()
                    got += receive(replies)
                assert got == messages
                await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()

    trio.run(play)
