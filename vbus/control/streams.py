"""What can be asked for once and is answered on and on, until the client leaves.

A stream gives a first answer, and then one event after the other.
"""

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import msgspec
import trio
from msgspec import Meta

from vbus.control.capture import SNAPLEN_LIMIT, Capture
from vbus.control.feed import EventFeed
from vbus.control.show import show_tree
from vbus.errors import InvalidError
from vbus.trace import Record, Trace

if TYPE_CHECKING:
    from vbus.daemon import Daemon

TRACE_PAUSE_S = 0.1
_RECORDS = 4096
Event = dict[str, object]


class Stream(NamedTuple):
    first: object
    next: Callable[[], Awaitable[Event]]


class Args(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Arguments of a stream."""


class EventsOf(Args, frozen=True):
    tree: bool = False


class CaptureOf(Args, frozen=True):
    device: str
    snaplen: Annotated[int, Meta(ge=14, le=SNAPLEN_LIMIT)] = SNAPLEN_LIMIT


class TraceOf(Args, frozen=True):
    guest: str | None = None
    device: str | None = None
    follow: bool = False


@contextmanager
def _events(daemon: "Daemon", args: EventsOf) -> Iterator[Stream]:
    with EventFeed(daemon.watch) as feed:
        # In one step with the start of the feed: nothing falls in between.
        tree = show_tree(daemon) if args.tree else None
        yield Stream({"tree": tree}, feed.next)


@contextmanager
def _capture(daemon: "Daemon", args: CaptureOf) -> Iterator[Stream]:
    device = daemon.model.device(args.device)
    with Capture(daemon, device, args.snaplen) as capture:
        yield Stream({"class": daemon.model.class_name(device)}, capture.next)


@contextmanager
def _trace(daemon: "Daemon", args: TraceOf) -> Iterator[Stream]:
    if not daemon.trace.on:
        raise InvalidError("this daemon does not trace: [daemon] trace is 0")
    yield Stream(True, _TraceReader(daemon.trace, args).next)


class _TraceReader:
    """Takes records out of the ring now and then, so that recording costs no more."""

    def __init__(self, trace: Trace, args: TraceOf) -> None:
        self._trace = trace
        self._args = args
        self._position = 0
        self._lost = 0
        self._until = None if args.follow else trace.total
        if args.follow:
            self._position = trace.total

    def _wanted(self, record: Record) -> bool:
        return (
            self._args.guest in (None, record.guest)
            and self._args.device in (None, record.device)
        )  # fmt: skip

    async def next(self) -> Event:
        """Wait for {"records": [...], "lost": n}; {"end": ...} after a dump's last."""
        while True:
            lost = self._trace.lost_since(self._position)
            first = self._position + lost
            records = list(self._trace.since(self._position))[:_RECORDS]
            self._position = first + len(records)
            wanted = [tuple(one) for one in records if self._wanted(one)]
            told = lost if self._until is None else 0
            if wanted or told:
                return {"records": wanted, "lost": told}
            if self._until is not None and self._position >= self._until:
                return {"end": "all is told"}
            await trio.sleep(TRACE_PAUSE_S if self._until is None else 0)


Opener = Callable[["Daemon", Any], Any]

STREAMS: dict[str, tuple[type[Args], Opener]] = {
    "events": (EventsOf, _events),
    "capture": (CaptureOf, _capture),
    "trace": (TraceOf, _trace),
}


@contextmanager
def open_stream(daemon: "Daemon", op: str, args: Event) -> Iterator[Stream]:
    """Open a stream of STREAMS. Raises InvalidError, NotFoundError."""
    kind, opener = STREAMS[op]
    try:
        known = msgspec.convert(args, kind)
    except msgspec.ValidationError as error:
        raise InvalidError(f"{op}: {error}") from None
    with opener(daemon, known) as stream:
        yield stream
