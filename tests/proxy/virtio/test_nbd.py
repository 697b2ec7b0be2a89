"""The NBD protocol's state machines, and a disk served at a Unix socket."""

import os
import struct
from pathlib import Path

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from proxy.virtio import nbd
from proxy.virtio.nbdserver import serve_unix
from tests.proxy.virtio.guests import disk_of
from vbus.errors import ExistsError, ProtocolError

EXPORT = nbd.Export("disk0", 1 << 20, nbd.Flag.HAS_FLAGS | nbd.Flag.SEND_FLUSH, 512)
REQUEST = struct.Struct(">IHHQQI")
SIMPLE = struct.Struct(">IIQ")
OPTION = struct.Struct(">8sII")
REPLY = struct.Struct(">QIII")


def option(number: int, data: bytes = b"") -> bytes:
    return OPTION.pack(b"IHAVEOPT", number, len(data)) + data


def go(name: bytes = b"", number: int = 7) -> bytes:
    return option(number, struct.pack(">I", len(name)) + name + b"\0\0")


def replies(data: bytes) -> list[tuple[int, int, bytes]]:
    """(option, kind, payload) of each."""
    found = []
    while data:
        magic, number, kind, size = REPLY.unpack_from(data)
        assert magic == 0x3E889045565A9
        found.append((number, kind, data[REPLY.size : REPLY.size + size]))
        data = data[REPLY.size + size :]
    return found


def test_the_greeting_as_bytes() -> None:
    assert nbd.Handshake.greeting == b"NBDMAGICIHAVEOPT\0\3"


def test_go_describes_the_export_and_begins() -> None:
    shake = nbd.Handshake(EXPORT)
    assert shake.feed(b"\0\0\0\3") == b""
    answer = replies(shake.feed(go(b"disk0") + b"rest"))
    assert answer == [
        (7, 3, struct.pack(">HQH", 0, 1 << 20, 5)),
        (7, 3, struct.pack(">HIII", 3, 512, 4096, 32 << 20)),
        (7, 1, b""),
    ]
    assert shake.done
    assert shake.rest == b"rest"


def test_info_does_not_begin_and_list_lists() -> None:
    shake = nbd.Handshake(EXPORT)
    answer = replies(shake.feed(b"\0\0\0\3" + go(number=6) + option(3)))
    assert [kind for _, kind, _ in answer] == [3, 3, 1, 2, 1]
    assert answer[3][2] == b"\0\0\0\5disk0"
    assert not shake.done
    assert replies(shake.feed(option(2))) == [(2, 1, b"")]
    assert shake.closed


def test_the_old_way_to_name_an_export() -> None:
    for flags, zeroes in ((b"\0\0\0\1", 124), (b"\0\0\0\3", 0)):
        shake = nbd.Handshake(EXPORT)
        answer = shake.feed(flags + option(1, b"disk0"))
        assert answer == struct.pack(">QH", 1 << 20, 5) + bytes(zeroes)
        assert shake.done
    with pytest.raises(ProtocolError, match="no NBD export"):
        nbd.Handshake(EXPORT).feed(b"\0\0\0\3" + option(1, b"other"))


def test_what_is_not_known_is_refused_and_the_handshake_goes_on() -> None:
    shake = nbd.Handshake(EXPORT)
    shake.feed(b"\0\0\0\3")
    assert replies(shake.feed(option(5))) == [(5, 0x80000001, b"")]  # STARTTLS
    assert replies(shake.feed(go(b"other")))[0][1] == 0x80000006
    assert replies(shake.feed(option(7, b"\0\0\0\xff")))[0][1] == 0x80000003
    assert replies(shake.feed(go()))[-1][1] == 1


@pytest.mark.parametrize(
    "data",
    [
        b"\0\0\0\x04",
        b"\0\0\0\3IHAVEOPX" + bytes(8),
        b"\0\0\0\3" + option(3)[:12] + b"\xff" * 4,
    ],
    ids=["flags", "magic", "length"],
)
def test_nonsense_ends_the_handshake(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        nbd.Handshake(EXPORT).feed(data)


@given(st.lists(st.integers(1, 40)))
def test_bytes_may_come_in_any_pieces(cuts: list[int]) -> None:
    stream = b"\0\0\0\3" + option(3) + go(b"disk0")
    whole = nbd.Handshake(EXPORT).feed(stream)
    shake, answer = nbd.Handshake(EXPORT), b""
    for cut in cuts:
        answer += shake.feed(stream[:cut])
        stream = stream[cut:]
    assert answer + shake.feed(stream) == whole
    requests = REQUEST.pack(0x25609513, 1, 1, 7, 512, 4) + b"data"
    requests += REQUEST.pack(0x25609513, 0, 0, 8, 0, 512)
    parser, found = nbd.Transmission(), []
    for cut in cuts:
        found += parser.feed(requests[:cut])
        requests = requests[cut:]
    found += parser.feed(requests)
    assert [(each.kind, each.data) for each in found] == [(1, b"data"), (0, b"")]
    assert nbd.answer(found[0]) == SIMPLE.pack(0x67446698, 0, 7)


def test_a_bad_request_ends_the_transmission() -> None:
    with pytest.raises(ProtocolError, match="magic"):
        nbd.Transmission().feed(bytes(28))
    with pytest.raises(ProtocolError, match="33554433 bytes"):
        nbd.Transmission().feed(REQUEST.pack(0x25609513, 0, 1, 0, 0, (32 << 20) + 1))


class Client:
    """A client of the Unix socket."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self._got = b""

    async def take(self, size: int) -> bytes:
        with trio.fail_after(10):
            while len(self._got) < size:
                more = await self.stream.receive_some()
                if not more:
                    raise EOFError
                self._got += more
        taken, self._got = self._got[:size], self._got[size:]
        return taken

    async def begin(self) -> int:
        """The handshake: the export's size."""
        await self.take(18)
        await self.stream.send_all(b"\0\0\0\3" + option(1))
        size, _ = struct.unpack(">QH", await self.take(10))
        return int(size)

    async def ask(
        self, kind: int, at: int, size: int, data: bytes = b"", *, flags: int = 0
    ) -> tuple[int, bytes]:
        await self.stream.send_all(
            REQUEST.pack(0x25609513, flags, kind, 77, at, size) + data
        )
        magic, error, cookie = SIMPLE.unpack(await self.take(SIMPLE.size))
        assert (magic, cookie) == (0x67446698, 77)
        back = size if kind == 0 and not error else 0
        return error, await self.take(back)


async def test_a_disk_is_served_at_a_socket(tmp_path: Path) -> None:
    """R13: every command, errors as NBD has them, and a second client."""
    path = tmp_path / "nbd"
    async with disk_of(tmp_path) as (_, disk), trio.open_nursery() as nursery:
        await nursery.start(serve_unix, disk, path)
        stream = await trio.open_unix_socket(str(path))
        client = Client(stream)
        assert await client.begin() == 4 << 20
        data = os.urandom(300 << 10)
        assert await client.ask(1, 8192, len(data), data) == (0, b"")
        assert await client.ask(0, 8192, len(data)) == (0, data)
        assert await client.ask(1, 0, 512, b"f" * 512, flags=1) == (0, b"")
        assert disk.statistics().flushes == 1
        assert await client.ask(3, 0, 0) == (0, b"")
        assert await client.ask(6, 8192, 4096) == (0, b"")
        assert await client.ask(0, 8192, 8192) == (0, bytes(4096) + data[4096:8192])
        assert await client.ask(4, 8192, 4096) == (0, b"")
        for kind, at, size in ((0, 4 << 20, 512), (0, 1, 512), (9, 0, 0)):
            assert await client.ask(kind, at, size) == (22, b"")
        async with await trio.open_unix_socket(str(path)) as second:
            other = Client(second)
            await other.begin()
            assert (await other.ask(0, 0, 512))[1] == b"f" * 512
        async with await trio.open_unix_socket(str(path)) as third:
            await third.send_all(b"nonsense that is no handshake")
            with pytest.raises(EOFError):
                await Client(third).take(100)
        with pytest.raises(ExistsError):
            await serve_unix(disk, path)
        await stream.aclose()
        nursery.cancel_scope.cancel()
    assert not path.exists()
