"""The codec by itself: round trips, any cutting into pieces, and garbage."""

import contextlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vbus.errors import BusyError, InvalidError, ProtocolError
from vbus.vfio_user import wire
from vbus.vfio_user.wire import Command, Connection, Message

u32 = st.integers(0, (1 << 32) - 1)
u64 = st.integers(0, (1 << 64) - 1)
small = st.integers(0, 1 << 40)
blob = st.binary(max_size=300)
areas = st.lists(st.tuples(u64, u64), max_size=5).map(tuple)

capabilities = st.builds(wire.Capabilities, small, small, small, small, st.booleans())
subregions = st.lists(
    st.builds(wire.SubRegion, u64, u64, u32, u32, u32, u64), max_size=6
)


def with_data(kind, *fields):
    return st.tuples(*fields, blob).map(
        lambda values: kind(*values[:-1], len(values[-1]), values[-1])
    )


@given(st.integers(0, 65535), st.integers(0, 65535), capabilities)
def test_version_round_trip(major, minor, caps):
    version = wire.Version(major, minor, caps)
    assert wire.Version.unpack(version.pack()) == version


@given(
    st.one_of(
        st.builds(wire.DmaMap, u32, u64, u64, u64),
        st.builds(wire.DmaUnmap, u32, u64, u64),
        st.builds(wire.DeviceInfo, u32, u32, u32, u32),
        st.builds(wire.IrqInfo, u32, u32, u32, u32),
        st.builds(wire.SetIrqs, u32, u32, u32, u32, blob),
    )
)
def test_fixed_payloads_round_trip(payload):
    assert type(payload).unpack(payload.pack()) == payload


@given(
    st.one_of(with_data(wire.RegionAccess, u64, u32), with_data(wire.DmaAccess, u64))
)
def test_accesses_round_trip_with_and_without_data(payload):
    assert type(payload).unpack_data(payload.pack()) == payload
    bare = payload._replace(data=b"")
    assert type(payload).unpack(bare.pack()) == bare


@given(u32, st.integers(0, 7), u64, u64, areas)
def test_region_info_round_trip(region, flags, size, offset, parts):
    info = wire.RegionInfo(region, flags, size, offset, parts)
    reply = wire.RegionInfo.unpack(info.pack_reply(info.full_size))
    assert (reply.region, reply.size, reply.offset) == (region, size, offset)
    assert reply.areas == parts
    assert reply.argsz == info.full_size == len(info.pack_reply(1 << 20))
    short = wire.RegionInfo.unpack(info.pack_reply(info.full_size - 1))
    assert (short.areas, short.argsz) == ((), info.full_size)


@given(u32, subregions)
def test_region_io_fds_round_trip(region, subs):
    reply = wire.RegionIoFds.unpack(wire.RegionIoFds.pack_reply(region, subs))
    assert (reply.region, reply.subregions) == (region, tuple(subs))
    assert reply.argsz == 16 + 40 * len(subs)


@given(st.lists(st.tuples(u64, u32, st.binary(min_size=1, max_size=8)), max_size=200))
def test_write_multi_round_trip(entries):
    writes = tuple(
        wire.RegionAccess(offset, region, len(data), data)
        for offset, region, data in entries
    )
    body = wire.WriteMulti(writes).pack()
    assert len(body) == 8 + 24 * len(writes)
    assert wire.WriteMulti.unpack(body).writes == writes


UNPACKERS = [
    wire.Version.unpack,
    wire.DmaMap.unpack,
    wire.DmaUnmap.unpack,
    wire.DeviceInfo.unpack,
    wire.RegionInfo.unpack,
    wire.RegionIoFds.unpack,
    wire.IrqInfo.unpack,
    wire.SetIrqs.unpack,
    wire.RegionAccess.unpack,
    wire.RegionAccess.unpack_data,
    wire.DmaAccess.unpack,
    wire.DmaAccess.unpack_data,
    wire.WriteMulti.unpack,
    wire.unpack_write_multi_reply,
]


@given(st.sampled_from(UNPACKERS), st.binary(max_size=400))
def test_any_payload_is_understood_or_invalid(unpack, body):
    with contextlib.suppress(InvalidError):
        unpack(body)


def capability_list(*capabilities):
    head = struct.pack("<IIIIQQ", 0, 8, 0, 32, 0, 0)
    return head + b"".join(capabilities)


def test_region_capabilities_that_go_round_are_invalid():
    for following in (32, 8, 31):
        loop = struct.pack("<HHI", 7, 1, following)
        with pytest.raises(InvalidError, match="backwards"):
            wire.RegionInfo.unpack(capability_list(loop))


def test_unknown_region_capabilities_are_passed_over():
    unknown = struct.pack("<HHI", 2, 1, 40)
    sparse = struct.pack("<HHIIIQQ", 1, 1, 0, 1, 0, 4096, 8192)
    info = wire.RegionInfo.unpack(capability_list(unknown, sparse))
    assert info.areas == ((4096, 8192),)


@pytest.mark.parametrize("count", [2, 1 << 31])
def test_sparse_areas_that_are_not_there_are_invalid(count):
    sparse = struct.pack("<HHIIIQQ", 1, 1, 0, count, 0, 4096, 8192)
    with pytest.raises(InvalidError):
        wire.RegionInfo.unpack(capability_list(sparse))


# Framing

requests = st.lists(st.tuples(st.integers(0, 20), blob, st.booleans()), max_size=8)


@given(requests, st.lists(st.integers(1, 60), min_size=1, max_size=50))
def test_messages_survive_any_cutting(sent, cuts):
    sender, receiver = Connection(), Connection()
    stream = b"".join(
        sender.request(command, body, no_reply=quiet)[1]
        for command, body, quiet in sent
    )
    received, at = [], 0
    while at < len(stream):
        for cut in cuts:
            received += receiver.feed(stream[at : at + cut])
            at += cut
    assert [(m.command, m.body, not m.wants_reply) for m in received] == sent
    assert not any(message.is_reply for message in received)


@given(requests)
def test_replies_find_their_requests_in_any_order(sent):
    client, server = Connection(), Connection()
    asked = {}
    for command, body, quiet in sent:
        ident, data = client.request(command, body, no_reply=quiet)
        (request,) = server.feed(data)
        assert request.wants_reply != quiet
        if not quiet:
            asked[ident] = request
    for number, (ident, request) in enumerate(reversed(asked.items())):
        if number % 2:
            (answer,) = client.feed(wire.reply(request, request.body))
            assert (answer.id, answer.body) == (ident, request.body)
        else:
            (answer,) = client.feed(wire.error_reply(request, 16))
            assert answer.failed
            assert (answer.error, answer.body) == (16, b"")
    assert client.outstanding == 0


@given(st.lists(st.tuples(st.binary(max_size=80), st.integers(0, 3)), max_size=20))
def test_garbage_is_a_protocol_error_and_no_descriptor_is_forgotten(pieces):
    connection = Connection(max_fds=4)
    given_fds, returned = [], []
    try:
        for data, count in pieces:
            fds = list(range(len(given_fds), len(given_fds) + count))
            given_fds += fds
            for message in connection.feed(data, fds):
                returned += message.fds
    except ProtocolError:
        pass
    assert sorted(returned + connection.abandon()) == given_fds


@given(st.lists(st.tuples(blob, st.integers(0, 4)), min_size=1, max_size=12))
def test_descriptors_come_with_their_message(sent):
    """However the kernel joins messages, it stops at one with descriptors."""
    sender, receiver = Connection(), Connection()
    expected, received, chunk, number = [], [], b"", 0
    for body, count in sent:
        _, data = sender.request(1, body)
        chunk += data
        fds = tuple(range(number, number + count))
        number += count
        expected.append(fds)
        if count:
            received += receiver.feed(chunk, fds)
            chunk = b""
    received += receiver.feed(chunk)
    assert [message.fds for message in received] == expected


def test_descriptors_of_a_message_in_pieces_wait_for_its_end():
    sender, receiver = Connection(), Connection()
    _, first = sender.request(1, b"one")
    _, second = sender.request(2, b"two")
    (whole,) = receiver.feed(first + second[:5], [3])
    assert whole.fds == ()
    assert receiver.feed(second[5:10], [4]) == []
    (later,) = receiver.feed(second[10:], [5])
    assert later.fds == (3, 4, 5)
    assert receiver.abandon() == []


def test_too_many_descriptors_in_pieces_are_an_error():
    receiver = Connection(max_fds=4)
    _, data = Connection().request(1, b"x" * 100)
    receiver.feed(data[:10], [1, 2, 3])
    with pytest.raises(ProtocolError, match="more than 4 descriptors"):
        receiver.feed(data[10:20], [4, 5])
    assert sorted(receiver.abandon()) == [1, 2, 3, 4, 5]


def test_broken_connection_stays_broken():
    receiver = Connection()
    with pytest.raises(ProtocolError, match="message of 0 bytes"):
        receiver.feed(bytes(16))
    with pytest.raises(ProtocolError, match="message of 0 bytes"):
        receiver.feed(b"", [7])
    assert receiver.abandon() == [7]


def test_lengths_are_limited_before_anything_is_kept():
    header = struct.pack("<HHIII", 0, 1, wire.MAX_MESSAGE_SIZE + 1, 0, 0)
    with pytest.raises(ProtocolError, match="bytes"):
        Connection().feed(header)
    with pytest.raises(InvalidError, match="too large"):
        Connection().request(1, bytes(wire.MAX_MESSAGE_SIZE))


def test_largest_message_passes():
    sender, receiver = Connection(), Connection()
    body = bytes(wire.MAX_MESSAGE_SIZE - wire.HEADER_SIZE)
    _, data = sender.request(Command.REGION_WRITE, body)
    assert receiver.feed(data[:-1]) == []
    assert receiver.missing == 1
    assert receiver.feed(data[-1:])[0].body == body


def test_reply_of_another_command_is_a_protocol_error():
    client = Connection()
    ident, _ = client.request(Command.REGION_READ)
    with pytest.raises(ProtocolError, match="REGION_WRITE where REGION_READ"):
        client.feed(wire.reply(Message(ident, Command.REGION_WRITE, 0, 0, b"")))


def test_ids_are_not_used_twice_at_a_time():
    client = Connection()
    idents = [client.request(1)[0] for _ in range(65535)]
    assert len(set(idents)) == 65535
    with pytest.raises(BusyError):
        client.request(1)
    client.feed(wire.reply(Message(idents[77], 1, 0, 0, b"")))
    client.request(1)
    with pytest.raises(BusyError):
        client.request(1)


def test_header_is_laid_out_as_the_protocol_says():
    """Golden bytes: id, command, size, flags, error."""
    connection = Connection()
    connection.request(1)
    body = wire.RegionAccess(4, 1, 4, b"\7\0\0\0").pack()
    ident, data = connection.request(Command.REGION_WRITE, body)
    assert ident == 1
    assert data == bytes.fromhex(
        "0100 0a00 24000000 00000000 00000000"
        "0400000000000000 01000000 04000000 07000000"
    )
    (request,) = Connection().feed(data)
    assert wire.error_reply(request, 22) == bytes.fromhex(
        "0100 0a00 10000000 21000000 16000000"
    )
    assert wire.reply(request, b"ok") == bytes.fromhex(
        "0100 0a00 12000000 01000000 00000000 6f6b"
    )


def test_names_are_given_for_log_lines():
    assert wire.command_name(10) == "REGION_WRITE"
    assert wire.command_name(77) == "command 77"
    assert wire.error_name(16) == "EBUSY (Device or resource busy)"
    assert wire.error_name(4444) == "4444"
