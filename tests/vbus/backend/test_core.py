"""The backend protocol without I/O: framing, ids, deadlines, lies."""

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from vbus.backend import wire
from vbus.backend.core import Answered, BackendCore
from vbus.errors import InvalidError, ProtocolError

DEADLINE_S = 2.0
HELLO = wire.encode(wire.Hello(wire.VERSION, "b", (wire.ClassInfo("c", "t"),)))

requests = st.sampled_from(
    (
        lambda id: wire.Ping(id),
        lambda id: wire.Create(id, "d", "c", {}),
        lambda id: wire.Remove(id, "d"),
        lambda id: wire.Open(id, id, 1, "d", 1),
        lambda id: wire.Call(id, 1, 0, b"x", 0),
        lambda id: wire.Close(id, max(id - 1, 0)),
        lambda id: wire.End(id, max(id - 2, 0)),
        lambda id: wire.Unmap(id, 1, 0, 4096),
    )
)


def core() -> BackendCore:
    made = BackendCore(DEADLINE_S)
    made.feed(HELLO)
    return made


def ask(made: BackendCore, request: wire.Request, now: float = 0.0) -> wire.Request:
    made.request(request, now)
    return request


@settings(deadline=None)
@given(
    st.lists(st.binary(max_size=300), max_size=8),
    st.lists(st.integers(1, 50), min_size=1),
)
def test_frames_come_out_as_they_went_in_however_they_are_cut(
    bodies: list[bytes], cuts: list[int]
) -> None:
    stream = b"".join(wire.HEAD.pack(len(body), 0) + body for body in bodies)
    frames, found, at = wire.Frames(), [], 0
    while at < len(stream):
        cut = cuts[at % len(cuts)]
        found += [frame.body for frame in frames.feed(stream[at : at + cut])]
        at += cut
    assert found == bodies
    assert frames.missing == 0


@settings(deadline=None)
@given(st.binary(max_size=2000), st.booleans())
def test_whatever_comes_is_taken_or_a_protocol_error(data: bytes, up: bool) -> None:
    made = core() if up else BackendCore(DEADLINE_S)
    try:
        made.feed(data)
        made.feed(wire.HEAD.pack(len(data), 0) + data)
    except ProtocolError:
        pass
    made.validate()


@settings(deadline=None)
@given(st.recursive(st.none() | st.integers() | st.text() | st.binary(), st.lists))
def test_whatever_map_comes_is_taken_or_a_protocol_error(value: object) -> None:
    for kind in ("hello", "reply", "failed", "devicefailed", "mystery"):
        try:
            body = msgspec.msgpack.encode({"type": kind, "id": value, "x": value})
        except OverflowError:
            return
        with pytest.raises(ProtocolError):
            core().feed(wire.HEAD.pack(len(body), 0) + body)


class Conversation(RuleBasedStateMachine):
    """Requests and replies in any order, beside a shadow of what is unanswered."""

    def __init__(self) -> None:
        super().__init__()
        self.core = core()
        self.asked: dict[int, wire.Request] = {}
        self.now = 0.0
        self.due: dict[int, float] = {}

    @rule(make=requests)
    def ask(self, make: "object") -> None:
        assert callable(make)
        request = make(self.core.next_id())
        assert request.id not in self.asked
        self.core.request(request, self.now)
        self.asked[request.id] = request
        if isinstance(request, wire.Ping | wire.Unmap | wire.End):
            self.due[request.id] = self.now + DEADLINE_S

    @precondition(lambda self: self.asked)
    @rule(data=st.data(), result=st.sampled_from((0, 1, -22)))
    def reply(self, data: st.DataObject, result: int) -> None:
        id = data.draw(st.sampled_from(sorted(self.asked)))
        reply = wire.Reply(id, result)
        (event,) = self.core.feed(wire.encode(reply))
        assert event == Answered(self.asked.pop(id), reply)
        self.due.pop(id, None)

    @rule(seconds=st.floats(0, 1.5))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @invariant()
    def deadlines_are_known(self) -> None:
        late = self.core.overdue(self.now)
        assert (late is not None) == any(due <= self.now for due in self.due.values())
        assert late is None or late.id in self.due

    @invariant()
    def what_is_unanswered_is_known(self) -> None:
        assert self.core.unanswered == len(self.asked)
        self.core.validate()


TestConversation = Conversation.TestCase
TestConversation.settings = settings(deadline=None)


def refused(made: BackendCore, message: wire.Message, fds: int = 0) -> None:
    with pytest.raises(ProtocolError):
        made.feed(wire.encode(message), fds)


def test_nothing_comes_before_hello_and_hello_only_once() -> None:
    refused(BackendCore(DEADLINE_S), wire.Reply(1))
    refused(core(), wire.Hello(wire.VERSION, "b"))
    refused(BackendCore(DEADLINE_S), wire.Hello(wire.VERSION + 1, "b"))


def test_a_reply_comes_once_and_to_what_was_asked() -> None:
    made = core()
    ask(made, wire.Ping(made.next_id()))
    made.feed(wire.encode(wire.Reply(1)))
    refused(made, wire.Reply(1))
    refused(core(), wire.Reply(1))


def test_only_calls_give_data() -> None:
    made = core()
    ask(made, wire.Ping(made.next_id()))
    refused(made, wire.Reply(1, data=b"x"))
    made = core()
    ask(made, wire.Call(made.next_id(), 1, 0, b"", 0))
    assert made.feed(wire.encode(wire.Reply(1, data=b"x")))


def test_connections_are_known_from_open_to_the_reply_to_end() -> None:
    made = core()
    refused(made, wire.Failed(7))
    made = core()
    ask(made, wire.Open(1, 7, 1, "d", 1))
    assert made.feed(wire.encode(wire.Failed(7))) == [wire.Failed(7)]
    made.feed(wire.encode(wire.Reply(1)))
    ask(made, wire.End(2, 7))
    made.feed(wire.encode(wire.Failed(7)))  # it crossed our End
    made.feed(wire.encode(wire.Reply(2)))
    refused(made, wire.Failed(7))


def test_a_refused_open_leaves_no_connection() -> None:
    made = core()
    ask(made, wire.Open(1, 7, 1, "d", 1))
    made.feed(wire.encode(wire.Reply(1, -16)))
    refused(made, wire.Failed(7))


def test_devices_are_known_from_create_to_the_reply_to_remove() -> None:
    made = core()
    ask(made, wire.Create(1, "d", "c", {}))
    made.feed(wire.encode(wire.Reply(1)))
    assert made.feed(wire.encode(wire.DeviceFailed("d")))
    ask(made, wire.Remove(2, "d"))
    made.feed(wire.encode(wire.Reply(2, -16)))  # refused: it is still there
    made.feed(wire.encode(wire.DeviceFailed("d")))
    ask(made, wire.Remove(3, "d"))
    made.feed(wire.encode(wire.Reply(3)))
    refused(made, wire.DeviceFailed("d"))


@pytest.mark.parametrize("fds", [1, 64])
def test_descriptors_from_a_backend_end_it(fds: int) -> None:
    made = core()
    ask(made, wire.Ping(made.next_id()))
    refused(made, wire.Reply(1), fds)


def test_oversized_frames_are_refused_by_their_head() -> None:
    with pytest.raises(ProtocolError):
        core().feed(wire.HEAD.pack(wire.FRAME_LIMIT + 1, 0))
    with pytest.raises(InvalidError):
        wire.encode(wire.Call(1, 1, 0, bytes(wire.FRAME_LIMIT), 0))


def test_the_longest_call_of_the_abi_fits() -> None:
    call = wire.Call(1 << 62, 1 << 62, 0xFFFFFFFF, bytes(1 << 20), 0xFFFFFFFF)
    assert wire.encode(call)
