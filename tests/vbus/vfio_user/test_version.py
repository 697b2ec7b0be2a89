"""VERSION: the first message, and nothing before it."""

import errno
import struct

import pytest

from vbus.vfio_user import wire
from vbus.vfio_user.wire import Command

VERSION_HEAD = struct.Struct("<HH")


async def test_version_is_agreed_on_and_capabilities_are_announced(bench):
    client = await bench.connect()
    reply = wire.Version.unpack(await client.version())
    assert (reply.major, reply.minor) == (0, 1)
    assert reply.capabilities == wire.Capabilities(
        max_msg_fds=16,
        max_data_xfer_size=1 << 20,
        max_dma_maps=65535,
        pgsizes=4096,
        write_multiple=True,
    )
    assert bench.function.seen("attach") == [()]


@pytest.mark.parametrize(("proposed", "agreed"), [(0, 0), (1, 1), (7, 1)])
async def test_minor_version_is_the_smaller_one(bench, proposed, agreed):
    client = await bench.connect()
    body = VERSION_HEAD.pack(0, proposed)
    reply = wire.Version.unpack(await client.ask(Command.VERSION, body))
    assert reply.minor == agreed


async def test_what_qemu_11_proposes_is_understood(bench):
    """QEMU names more capabilities than we know, and version 0.0."""
    client = await bench.connect()
    json = (
        b'{"capabilities": {"migration": {"max_bitmap_size": 268435456, "pgsize":'
        b' 4096}, "pgsizes": 4096, "max_data_xfer_size": 1048576, "write_multiple":'
        b' true, "max_msg_fds": 16, "max_dma_maps": 65535}}\0'
    )
    body = VERSION_HEAD.pack(0, 0) + json
    reply = wire.Version.unpack(await client.ask(Command.VERSION, body))
    assert (reply.major, reply.minor) == (0, 0)


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"\0\0\1", id="short"),
        pytest.param(VERSION_HEAD.pack(1, 0), id="major 1"),
        pytest.param(VERSION_HEAD.pack(0, 1) + b"{}", id="no NUL"),
        pytest.param(VERSION_HEAD.pack(0, 1) + b"{\0", id="no JSON"),
        pytest.param(VERSION_HEAD.pack(0, 1) + b"\xff\xfe\0", id="no UTF-8"),
        pytest.param(
            VERSION_HEAD.pack(0, 1) + b'{"capabilities":{"max_msg_fds":-1}}\0',
            id="negative",
        ),
        pytest.param(
            VERSION_HEAD.pack(0, 1) + b'{"capabilities":{"max_msg_fds":"x"}}\0',
            id="no number",
        ),
        pytest.param(VERSION_HEAD.pack(0, 1) + b"[" * 5000 + b"\0", id="deep"),
    ],
)
async def test_bad_version_is_refused_and_ends_the_connection(bench, body):
    client = await bench.connect()
    assert await client.refused(Command.VERSION, body) == errno.EPROTO
    assert await client.ended()
    assert bench.function.seen("attach") == []
    assert bench.server.statistics().protocol_errors == 1


async def test_nothing_is_answered_before_version(bench):
    client = await bench.connect()
    body = wire.RegionAccess(0, 0, 4).pack()
    assert await client.refused(Command.REGION_READ, body) == errno.EPROTO
    assert await client.ended()
    assert bench.function.seen("read") == []


async def test_second_version_is_refused_and_the_connection_goes_on(client):
    body = wire.Version(0, 1).pack()
    assert await client.refused(Command.VERSION, body) == errno.EINVAL
    assert await client.read(0, 0, 4) == b"\0\1\2\3"


async def test_unknown_commands_are_refused_and_the_connection_goes_on(client):
    for command in (0, 11, 14, 16, 17, 18, 99, 65535):
        assert await client.refused(command) == errno.ENOTSUP
    assert await client.read(0, 0, 4) == b"\0\1\2\3"


async def test_client_that_never_says_version_is_dropped(bench, autojump_clock):
    client = await bench.connect()
    assert await client.ended()
    assert bench.server.statistics().clients == 1
