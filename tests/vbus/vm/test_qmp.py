"""QEMU's monitor protocol: the codec, and its edge against a scripted peer."""

import itertools
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from vbus.errors import ProtocolError
from vbus.vm.errors import GuestGoneError, QmpError
from vbus.vm.qmp import Protocol, Qmp

GREETING = b'{"QMP": {"version": {}}}\r\n'
MESSAGES = [{"event": "RESET"}, {"return": {}, "id": 1}, {"error": {}, "id": 2}]


@given(st.lists(st.integers(0, 200)))
def test_messages_are_whole_however_they_are_cut(cuts: list[int]) -> None:
    data = b"".join(json.dumps(one).encode() + b"\r\n" for one in MESSAGES)
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    protocol = Protocol()
    found = []
    for start, end in itertools.pairwise(edges):
        found += protocol.feed(data[start:end])
    assert found == MESSAGES


@pytest.mark.parametrize("line", [b"nonsense\n", b"[1]\n", b"{\n", b"\xff\n"])
def test_what_is_no_message_is_refused(line: bytes) -> None:
    with pytest.raises(ProtocolError, match="QMP"):
        Protocol().feed(line)


def test_an_endless_line_is_refused() -> None:
    with pytest.raises(ProtocolError, match="line of more"):
        Protocol().feed(b"x" * ((1 << 22) + 1))


@asynccontextmanager
async def connected() -> AsyncIterator[tuple[Qmp, trio.SocketStream]]:
    ours, theirs = trio.socket.socketpair()
    peer = trio.SocketStream(theirs)
    with ours:
        async with peer, trio.open_nursery() as nursery:
            qmp = Qmp(ours)

            async def greet() -> None:
                await peer.send_all(GREETING)
                await answer(peer, "qmp_capabilities", {"return": {}})

            nursery.start_soon(greet)
            nursery.start_soon(qmp.run)
            await qmp.negotiate()
            yield qmp, peer
            nursery.cancel_scope.cancel()


async def answer(peer: trio.SocketStream, name: str, about: dict[str, object]) -> None:
    command = json.loads(await peer.receive_some())
    assert command["execute"] == name
    await peer.send_all(json.dumps({**about, "id": command["id"]}).encode() + b"\n")


async def test_a_refusal_is_an_error_and_events_between_are_kept() -> None:
    async with connected() as (qmp, peer), trio.open_nursery() as nursery:
        await peer.send_all(b'{"event": "STOP"}\n')
        error = {"class": "GenericError", "desc": "no such thing"}
        nursery.start_soon(answer, peer, "stop", {"error": error})
        with pytest.raises(QmpError, match="stop: no such thing") as raised:
            await qmp.execute("stop")
        assert raised.value.kind == "GenericError"
        assert [event["event"] for event in qmp.events] == ["STOP"]


async def test_a_command_fails_when_qemu_ends() -> None:
    async with connected() as (qmp, peer), trio.open_nursery() as nursery:

        @nursery.start_soon
        async def leave() -> None:
            await peer.receive_some()
            await peer.aclose()

        with pytest.raises(GuestGoneError, match="answered stop"):
            await qmp.execute("stop")
        with pytest.raises(GuestGoneError):
            await qmp.execute("cont")
        with pytest.raises(GuestGoneError, match="RESET"):
            await qmp.wait_event("RESET")


async def test_waiting_for_an_event_ends_with_it() -> None:
    async with connected() as (qmp, peer), trio.open_nursery() as nursery:

        @nursery.start_soon
        async def reset() -> None:
            await trio.testing.wait_all_tasks_blocked()
            await peer.send_all(b'{"event": "STOP"}\n{"event": "RESET", "n": 1}\n')

        assert await qmp.wait_event("RESET") == {"event": "RESET", "n": 1}
