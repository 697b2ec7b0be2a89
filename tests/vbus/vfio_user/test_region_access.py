"""REGION_READ, REGION_WRITE, REGION_WRITE_MULTI: what a vCPU waits for."""

import errno
import os

import pytest
import trio

from vbus.errors import BusyError, CallTimeoutError
from vbus.pci.constants import Offset, Region
from vbus.pci.function import Pending
from vbus.vfio_user import wire
from vbus.vfio_user.wire import Command


def access(offset, region, size, data=b""):
    return wire.RegionAccess(offset, region, size, data).pack()


async def test_accesses_reach_the_function(bench, client):
    assert await client.read(0, 4, 4) == b"\4\5\6\7"
    await client.write(1, 8, b"\1\2\3\4")
    assert bench.function.seen("read") == [(0, 4, 4)]
    assert bench.function.seen("write") == [(1, 8, b"\1\2\3\4")]


async def test_configuration_accesses_are_counted(bench, client):
    """R40: the accesses a function really receives, by region."""
    for offset in range(0, 64, 4):
        await client.read(Region.CONFIG, offset, 4)
    await client.write(Region.CONFIG, Offset.COMMAND, b"\6\0")
    await client.write(0, 0, b"\0\0\0\0")
    counters = bench.server.statistics()
    assert counters.region_reads == (0, 0, 0, 0, 0, 0, 0, 16, 0)
    assert counters.region_writes == (1, 0, 0, 0, 0, 0, 0, 1, 0)


async def test_whole_configuration_space_in_one_read(client):
    config = await client.read(Region.CONFIG, 0, 256)
    assert config[:4] == b"\xda\x11\x00\x20"


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(access(0, 0, 0), id="no bytes"),
        pytest.param(access(61, 0, 4), id="over the end"),
        pytest.param(access(64, 0, 1), id="behind the end"),
        pytest.param(access((1 << 64) - 1, 0, 4), id="far"),
        pytest.param(access(0, 3, 4), id="empty BAR"),
        pytest.param(access(0, 9, 4), id="no region"),
        pytest.param(access(0, 0xFFFFFFFF, 4), id="far region"),
        pytest.param(access(0, 7, 0xFFFFFFFF), id="huge"),
        pytest.param(access(0, 0, 4)[:-1], id="short"),
    ],
)
async def test_impossible_reads_are_refused(bench, client, body):
    """R53: nothing outside of a region is reached."""
    assert await client.refused(Command.REGION_READ, body) == errno.EINVAL
    assert bench.function.seen("read") == []


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(access(0, 0, 0), id="no bytes"),
        pytest.param(access(62, 0, 4, b"abcd"), id="over the end"),
        pytest.param(access(0, 0, 8, b"abcd"), id="less data than said"),
        pytest.param(access(0, 0, 2, b"abcd"), id="more data than said"),
        pytest.param(access(0, 9, 4, b"abcd"), id="no region"),
        pytest.param(b"", id="empty"),
    ],
)
async def test_impossible_writes_are_refused(bench, client, body):
    assert await client.refused(Command.REGION_WRITE, body) == errno.EINVAL
    assert bench.function.seen("write") == []


async def test_write_without_reply_is_done_in_order(bench, client):
    await client.send(Command.REGION_WRITE, access(0, 1, 1, b"a"), no_reply=True)
    await client.send(Command.REGION_WRITE, access(99, 1, 1, b"?"), no_reply=True)
    await client.write(1, 1, b"b")
    assert bench.function.seen("write") == [(1, 0, b"a"), (1, 1, b"b")]
    assert bench.server.statistics().errors == 1


async def test_error_of_the_function_is_the_answer(bench, client):
    def refuse(bar, offset, data):
        raise BusyError("not now")

    bench.function.on_write = refuse
    body = access(0, 0, 1, b"x")
    assert await client.refused(Command.REGION_WRITE, body) == errno.EBUSY


async def test_bug_of_the_function_is_an_io_error_and_the_client_stays(
    bench, client, caplog
):
    bench.function.on_read = lambda *_: b"too much data"
    assert await client.refused(Command.REGION_READ, access(0, 0, 4)) == errno.EIO
    bench.function.on_read = lambda *_: 1 // 0
    assert await client.refused(Command.REGION_READ, access(0, 0, 4)) == errno.EIO
    bench.function.on_read = None
    assert await client.read(0, 0, 1) == b"\0"
    assert "ZeroDivisionError" in caplog.text


async def test_writes_in_one_message(bench, client):
    writes = tuple(wire.RegionAccess(n, 1, n, bytes([n] * n)) for n in (1, 2, 4, 8))
    body = wire.WriteMulti(writes).pack()
    reply = await client.ask(Command.REGION_WRITE_MULTI, body)
    assert wire.unpack_write_multi_reply(reply) == 4
    assert bench.function.seen("write") == [(1, w.offset, w.data) for w in writes]
    await client.send(Command.REGION_WRITE_MULTI, body, no_reply=True)
    await client.read(0, 0, 1)
    assert len(bench.function.seen("write")) == 8


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"", id="empty"),
        pytest.param((2).to_bytes(8, "little") + bytes(24), id="one of two"),
        pytest.param((1 << 60).to_bytes(8, "little") + bytes(24), id="huge"),
        pytest.param((201).to_bytes(8, "little") + bytes(24 * 201), id="too many"),
        pytest.param(
            (1).to_bytes(8, "little") + bytes(12) + b"\x09" + bytes(11), id="9 bytes"
        ),
        pytest.param((1).to_bytes(8, "little") + bytes(24), id="no bytes"),
    ],
)
async def test_bad_writes_in_one_message_are_refused(bench, client, body):
    assert await client.refused(Command.REGION_WRITE_MULTI, body) == errno.EINVAL
    assert bench.function.seen("write") == []


class Slow:
    """Accesses that end when the test says so."""

    def __init__(self, timeout_s=10.0):
        self.timeout_s = timeout_s
        self.gates = []
        self.outcomes = []

    def pending(self, answer=None):
        gate = trio.Event()
        self.gates.append(gate)

        async def work():
            await gate.wait()
            return len(self.gates)

        def complete(outcome):
            self.outcomes.append(outcome)
            outcome.unwrap()
            return answer

        return Pending(work, complete, self.timeout_s)


async def test_slow_access_holds_up_no_other(bench, client):
    """R9: replies come when they are ready, known by their ids."""
    slow = Slow()
    bench.function.on_write = lambda *_: slow.pending()
    first = await client.send(Command.REGION_WRITE, access(4, 1, 4, b"\0\0\0\0"))
    second = await client.send(Command.REGION_WRITE, access(4, 1, 4, b"\1\0\0\0"))
    assert await client.read(0, 0, 2) == b"\0\1"
    assert bench.server.statistics().pending == 2
    slow.gates[1].set()
    assert (await client.message()).id == second
    slow.gates[0].set()
    assert (await client.message()).id == first
    assert bench.server.statistics().pending == 0


async def test_slow_read_gets_its_data(bench, client):
    slow = Slow()
    bench.function.on_read = lambda *_: slow.pending(b"data")
    ident = await client.send(Command.REGION_READ, access(0, 0, 4))
    while not slow.gates:
        await trio.lowlevel.checkpoint()
    slow.gates[0].set()
    message = await client.message()
    assert message.id == ident
    assert wire.RegionAccess.unpack_data(message.body).data == b"data"


async def test_slow_access_ends_at_its_deadline(bench, client, autojump_clock):
    """The function learns of it and may still answer; here it does not."""
    slow = Slow(timeout_s=3.0)
    bench.function.on_read = lambda *_: slow.pending(b"")
    start = trio.current_time()
    body = access(0, 0, 4)
    assert await client.refused(Command.REGION_READ, body) == errno.ETIMEDOUT
    assert trio.current_time() - start == pytest.approx(3.0, abs=0.1)
    assert isinstance(slow.outcomes[0].error, CallTimeoutError)


async def test_writes_in_one_message_wait_for_the_slow_ones(bench, client):
    slow = Slow()
    bench.function.on_write = lambda _bar, offset, _data: (
        slow.pending() if offset else None
    )
    writes = tuple(wire.RegionAccess(n, 1, 1, b"x") for n in (0, 1, 2))
    await client.send(Command.REGION_WRITE_MULTI, wire.WriteMulti(writes).pack())
    assert await client.read(0, 0, 1) == b"\0"
    for gate in reversed(slow.gates):
        gate.set()
    reply = await client.message()
    assert wire.unpack_write_multi_reply(reply.body) == 3


async def test_client_that_leaves_cancels_its_slow_accesses(bench, client):
    slow = Slow()
    bench.function.on_write = lambda *_: slow.pending()
    await client.send(Command.REGION_WRITE, access(4, 1, 1, b"x"))
    await client.read(0, 0, 1)
    await client.leave(bench.server)
    assert slow.outcomes == []
    assert bench.server.statistics().pending == 0
    assert bench.function.events[-1] == ("reset",)


async def test_exception_in_slow_work_reaches_the_function(bench, client):
    async def work():
        raise OSError("the device broke")

    bench.function.on_read = lambda *_: Pending(
        work, lambda outcome: str(outcome.error).encode()[:4], 1.0
    )
    assert await client.read(0, 0, 4) == b"the "


async def test_pipelined_requests_are_all_answered_in_order(client):
    sent = [await client.send(Command.REGION_READ, access(0, 0, 4)) for _ in range(500)]
    answered = [(await client.message()).id for _ in sent]
    assert answered == sent


async def test_client_that_reads_no_replies_is_held_back(bench, client):
    """The daemon's memory does not grow: requests wait in the client instead."""
    _, request = client.wire.request(Command.REGION_READ, access(0, Region.CONFIG, 256))
    flood, blocked = request * 1000, 0
    while blocked < 1000:
        try:
            sent = os.write(client.sock.fileno(), flood)
            flood, blocked = flood[sent:] or request * 1000, 0
        except BlockingIOError:
            blocked += 1
        await trio.lowlevel.checkpoint()
    assert bench.server.statistics().messages < 40_000
    answers = (bench.server.statistics().messages - 1) * (16 + 16 + 256)
    while answers > 0:
        answers -= len(await client.sock.recv(1 << 20))
