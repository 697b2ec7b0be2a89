"""DMA_READ and DMA_WRITE: memory that came without a descriptor (R50)."""

import errno

import pytest
import trio

from vbus.errors import FaultError, InvalidError, NoDeviceError
from vbus.vfio_user import wire
from vbus.vfio_user.wire import Command


@pytest.fixture
def asked(bench, client):
    """Ask the server for DMA in a task; give the function to wait for the outcome."""

    def start(nursery, call, *arguments):
        outcome = []

        async def run():
            try:
                outcome.append(await call(*arguments))
            except Exception as error:
                outcome.append(error)

        nursery.start_soon(run)
        return outcome

    return start


async def until(outcome):
    with trio.fail_after(5):
        while not outcome:
            await trio.lowlevel.checkpoint()
    return outcome[0]


async def test_memory_is_read_by_messages(bench, client, asked, nursery):
    outcome = asked(nursery, bench.server.dma_read, 0x1000, 16)
    request = await client.message()
    assert request.command == Command.DMA_READ
    assert wire.DmaAccess.unpack(request.body) == (0x1000, 16, b"")
    answer = wire.DmaAccess(0x1000, 16, b"0123456789abcdef").pack()
    await client.sock.send(wire.reply(request, answer))
    assert await until(outcome) == b"0123456789abcdef"


async def test_memory_is_written_by_messages(bench, client, asked, nursery):
    outcome = asked(nursery, bench.server.dma_write, 0x1000, b"south")
    request = await client.message()
    assert wire.DmaAccess.unpack_data(request.body) == (0x1000, 5, b"south")
    await client.sock.send(wire.reply(request))
    assert await until(outcome) is None


async def test_region_accesses_are_answered_while_dma_is_under_way(
    bench, client, asked, nursery
):
    """QEMU serves DMA messages only when no vCPU waits for an access."""
    outcome = asked(nursery, bench.server.dma_read, 0, 4)
    request = await client.message()
    assert await client.read(0, 0, 4) == b"\0\1\2\3"
    await client.write(1, 0, b"\0\0\0\0")
    assert outcome == []
    await client.sock.send(wire.reply(request, wire.DmaAccess(0, 4, b"late").pack()))
    assert await until(outcome) == b"late"


async def test_replies_are_told_apart_by_their_ids(bench, client, asked, nursery):
    first = asked(nursery, bench.server.dma_read, 0x1000, 1)
    one = await client.message()
    second = asked(nursery, bench.server.dma_read, 0x2000, 1)
    two = await client.message()
    await client.sock.send(wire.reply(two, wire.DmaAccess(0x2000, 1, b"2").pack()))
    await client.sock.send(wire.reply(one, wire.DmaAccess(0x1000, 1, b"1").pack()))
    assert (await until(first), await until(second)) == (b"1", b"2")


async def test_large_transfers_go_in_pieces(bench, client, asked, nursery):
    """QEMU 11.1 loses its place with replies beyond its socket's buffer."""
    size = 150_000
    outcome = asked(nursery, bench.server.dma_read, 0, size)
    seen = []
    while sum(seen) < size:
        request = await client.message()
        at, length, _ = wire.DmaAccess.unpack(request.body)
        assert at == sum(seen)
        seen.append(length)
        answer = wire.DmaAccess(at, length, bytes([len(seen)]) * length).pack()
        await send_all(client.sock, wire.reply(request, answer))
    assert seen == [65536, 65536, 18928]
    data = await until(outcome)
    assert data == b"\1" * 65536 + b"\2" * 65536 + b"\3" * 18928


async def send_all(sock, data):
    while data:
        data = data[await sock.send(data) :]


async def test_refusal_of_the_client_is_a_fault(bench, client, asked, nursery):
    outcome = asked(nursery, bench.server.dma_write, 0, b"x")
    request = await client.message()
    await client.sock.send(wire.error_reply(request, errno.ENODEV))
    error = await until(outcome)
    assert isinstance(error, FaultError)
    assert "ENODEV" in str(error)


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (b"", InvalidError),
        (wire.DmaAccess(0, 3, b"abc").pack(), FaultError),
        (wire.DmaAccess(0, 4, b"abc").pack(), InvalidError),
    ],
)
async def test_wrong_answer_is_an_error_of_that_read_only(
    bench, client, asked, nursery, answer, kind
):
    outcome = asked(nursery, bench.server.dma_read, 0, 4)
    request = await client.message()
    await client.sock.send(wire.reply(request, answer))
    assert isinstance(await until(outcome), kind)
    assert await client.read(0, 0, 1) == b"\0"


async def test_client_that_leaves_ends_the_wait(bench, client, asked, nursery):
    outcome = asked(nursery, bench.server.dma_read, 0, 4)
    await client.message()
    await client.leave(bench.server)
    assert isinstance(await until(outcome), NoDeviceError)


async def test_without_a_client_there_is_no_memory(bench):
    with pytest.raises(NoDeviceError):
        await bench.server.dma_read(0, 4)
    client = await bench.connect()
    await client.version()
    await client.leave(bench.server)
    with pytest.raises(NoDeviceError):
        await bench.server.dma_write(0, b"x")


async def test_reply_that_nobody_waits_for_any_more_is_dropped(
    bench, client, asked, nursery
):
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as inner:
            inner.start_soon(bench.server.dma_read, 0, 4)
            request = await client.message()
            scope.cancel()
    await client.sock.send(wire.reply(request, wire.DmaAccess(0, 4, b"late").pack()))
    assert await client.read(0, 0, 1) == b"\0"


async def test_reply_to_no_request_ends_the_connection(bench, client):
    await client.sock.send(wire.reply(wire.Message(9, Command.DMA_READ, 0, 0, b"")))
    assert await client.ended()
    assert bench.server.statistics().protocol_errors == 1


async def test_client_that_takes_no_data_gets_no_dma(bench):
    await bench.attach(wire.Capabilities(max_data_xfer_size=0))
    with pytest.raises(Exception, match="no data in messages"):
        await bench.server.dma_read(0, 4)
