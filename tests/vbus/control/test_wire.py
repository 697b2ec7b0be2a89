"""Framing and messages of the control protocol, from any bytes."""

import struct

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vbus.control import wire
from vbus.errors import ProtocolError

NAMES = st.text(min_size=1, max_size=8)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.text(max_size=16),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner),
    max_leaves=16,
)
REQUESTS = st.builds(
    wire.Request,
    st.just(wire.VERSION),
    st.integers(0, 1 << 32),
    NAMES,
    st.dictionaries(NAMES, VALUES, max_size=4),
)


def body_of(frame: bytes) -> bytes:
    return frame[4:]


@given(st.lists(REQUESTS, max_size=5), st.data())
def test_requests_survive_any_cut_of_the_stream(
    requests: list[wire.Request], data: st.DataObject
) -> None:
    stream = b"".join(map(wire.encode, requests))
    frames, got = wire.Frames(), []
    while stream:
        cut = data.draw(st.integers(1, len(stream)))
        got += map(wire.to_request, frames.feed(stream[:cut]))
        stream = stream[cut:]
    assert got == requests


@given(st.binary(max_size=256))
def test_garbage_is_a_protocol_error_and_nothing_else(garbage: bytes) -> None:
    for read in (wire.to_request, wire.to_answer, wire.Answers().take):
        try:
            read(garbage)
        except ProtocolError:
            continue


@given(VALUES | st.dictionaries(st.integers(), st.none()))
def test_any_msgpack_is_a_request_or_a_protocol_error(value: object) -> None:
    try:
        packed: bytes = msgpack.packb(value)
    except OverflowError:
        return
    with pytest.raises(ProtocolError):
        wire.to_request(packed)


@pytest.mark.parametrize("length", [wire.FRAME_LIMIT + 1, (1 << 32) - 1])
def test_an_oversize_frame_is_refused_by_its_length_alone(length: int) -> None:
    with pytest.raises(ProtocolError, match="over 1048576"):
        list(wire.Frames().feed(struct.pack("<I", length)))


def test_a_frame_of_the_limit_is_taken() -> None:
    body = bytes(wire.FRAME_LIMIT)
    stream = struct.pack("<I", len(body)) + body
    assert list(wire.Frames().feed(stream)) == [body]


def test_a_request_over_the_limit_is_not_sent() -> None:
    request = wire.Request(1, 1, "stats", {"path": "x" * wire.FRAME_LIMIT})
    with pytest.raises(ProtocolError, match="over 1048576"):
        wire.encode(request)


def test_a_number_without_msgpack_is_not_sent() -> None:
    with pytest.raises(ProtocolError):
        wire.encode(wire.Answer(1, result=1 << 64))


@pytest.mark.parametrize(
    "request_",
    [
        {"version": 2, "id": 1, "op": "tree"},
        {"id": 1, "op": "tree"},
        {"version": 1, "id": "1", "op": "tree"},
        {"version": 1, "id": 1, "op": "tree", "args": []},
        {"version": 1, "id": 1, "op": "tree", "more": 1},
        [1, 1, "tree"],
    ],
)
def test_a_request_of_another_form_is_refused(request_: object) -> None:
    with pytest.raises(ProtocolError):
        wire.to_request(msgpack.packb(request_))


def test_nesting_without_end_is_refused() -> None:
    with pytest.raises(ProtocolError):
        wire.to_request(b"\x91" * 100_000)


@pytest.mark.parametrize("size", [0, wire.FRAME_LIMIT, 3 * wire.FRAME_LIMIT])
def test_an_answer_of_any_size_arrives(size: int) -> None:
    answer = wire.Answer(7, result={"text": "x" * size})
    answers, frames, whole = wire.Answers(), wire.Frames(), []
    for frame in wire.encode_answer(answer):
        assert len(frame) <= 4 + wire.FRAME_LIMIT
        for body in frames.feed(frame):
            taken = answers.take(body)
            if taken is not None:
                whole.append(taken)
    assert whole == [answer]


def test_missing_parts_are_noticed() -> None:
    first, _, last = wire.encode_answer(
        wire.Answer(7, result="x" * (wire.FRAME_LIMIT + 1))
    )
    answers = wire.Answers()
    assert answers.take(body_of(first)) is None
    with pytest.raises(ProtocolError, match="1 parts instead of 2"):
        answers.take(body_of(last))


def test_parts_without_end_are_refused() -> None:
    answers = wire.Answers()
    part = body_of(wire.encode(wire.Answer(7, part=b"x")))
    for _ in range(wire.PARTS_LIMIT):
        assert answers.take(part) is None
    with pytest.raises(ProtocolError, match="more than 256 parts"):
        answers.take(part)
