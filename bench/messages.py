"""Messages between two processes: the rings beside the C probe and the peers."""

import socket
import tempfile
from importlib.util import find_spec
from pathlib import Path

from bench.harness import Metric, Round, Suite, Target
from bench.processes import Worker, probe
from bench.rings import BATCH, RingFiles

_MS = 500
_PROBE_MS = 250
_SLOTS = {64: 1024, 1500: 1024, 65536: 64}


def _ring(mode: str, size: int) -> float:
    """Messages a second over a ring; every message sent has arrived."""
    files = RingFiles.create(1, _SLOTS[size])
    words = (mode, *files.words(), size, _MS)
    south = Worker("ring_worker", "south", *words, fds=files.fds)
    north = Worker("ring_worker", "north", *words, fds=files.fds)
    files.close()
    try:
        sent, taken = north.result(), south.result()
    finally:
        north.stop()
        south.stop()
    if sent["messages"] != taken["messages"]:
        raise RuntimeError(f"{sent['messages']} sent, {taken['messages']} arrived")
    return float(sent["rate"])


def probe_ring(size: int) -> float:
    """Messages a second over the C ring."""
    return probe("ring", size, BATCH, _SLOTS[size], _PROBE_MS)[0]


def probe_trip() -> float:
    """Microseconds of a round trip over two eventfds in C."""
    return probe("eventfd", _PROBE_MS)[0] / 1000


def _seqpacket(size: int) -> float:
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    push, pull = (end.fileno() for end in ends)
    taker = Worker("peer_worker", "seqpacket", "pull", pull, size, _MS, fds=[pull])
    giver = Worker("peer_worker", "seqpacket", "push", push, size, _MS, fds=[push])
    for end in ends:
        end.close()
    return _rate(giver, taker)


def _zmq(size: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "zmq")
        taker = Worker("peer_worker", "zmq", "pull", f"{path},pull", size, _MS)
        giver = Worker("peer_worker", "zmq", "push", f"{path},push", size, _MS)
        return _rate(giver, taker)


def _rate(giver: Worker, taker: Worker) -> float:
    try:
        rate = float(giver.result()["rate"])
        taker.result()
    finally:
        giver.stop()
        taker.stop()
    return rate


def one_way(size: int, *, blocking: bool) -> Round:
    """One round for one size."""
    result = {"trio": _ring("trio", size)}
    if blocking:
        result["blocking"] = _ring("blocking", size)
    result["seqpacket"] = _seqpacket(size)
    if find_spec("zmq") is not None:
        result["zmq"] = _zmq(size)
    return result


def _trip(mode: str) -> float:
    files = RingFiles.create(2, 16)
    words = (mode, *files.words(), _MS)
    south = Worker("trip_worker", "south", *words, fds=files.fds)
    north = Worker("trip_worker", "north", *words, fds=files.fds)
    files.close()
    try:
        return float(north.result()["p50_ns"]) / 1000
    finally:
        north.stop()
        south.stop()


def trio_msgpack_trip() -> float:
    """Microseconds of a call over a trio stream with msgpack."""
    ends = socket.socketpair()
    ask, answer = (end.fileno() for end in ends)
    replier = Worker("peer_worker", "trio", "answer", answer, 0, 0, fds=[answer])
    caller = Worker("peer_worker", "trio", "ask", ask, 0, _MS, fds=[ask])
    for end in ends:
        end.close()
    try:
        return float(caller.result()["p50_ns"]) / 1000
    finally:
        caller.stop()
        replier.stop()


def round_trip() -> Round:
    """One round of round trips, microseconds (p50)."""
    return {
        "sleeping": _trip("sleeping"),
        "awake": _trip("awake"),
        "msgpack": trio_msgpack_trip(),
    }


_SIZES = {64: "64 B", 1500: "1500 B", 65536: "64 KiB"}
_PEERS = {"c": "C ring, busy", "seqpacket": "AF_UNIX SEQPACKET", "zmq": "pyzmq ipc"}
_OURS = {"blocking": "IOQ, blocking doorbells", "trio": "IOQ under trio"}


def _one_way_suite(name: str, size: int, targets: tuple[Target, ...]) -> Suite:
    blocking = any(target.metric == "blocking" for target in targets)
    ours = _OURS if blocking else {"trio": _OURS["trio"]}
    return Suite(
        name,
        {
            key: Metric(f"{label}, {_SIZES[size]}", "messages/s")
            for key, label in {**ours, **_PEERS}.items()
        },
        targets,
        lambda: one_way(size, blocking=blocking),
        {"c": lambda: probe_ring(size)},
    )


SUITES = (
    _one_way_suite(
        "ioq-64",
        64,
        (
            Target("IOQ 64 B, blocking / C busy", "blocking", 0.25, "c", later=".5"),
            Target("IOQ 64 B, trio / C busy", "trio", 0.10, "c", later=".25"),
            Target("IOQ 64 B, trio / pyzmq", "trio", 3, "zmq"),
            Target("IOQ 64 B, trio / SEQPACKET", "trio", 5, "seqpacket"),
        ),
    ),
    _one_way_suite(
        "ioq-1500",
        1500,
        (
            Target("IOQ 1500 B, blocking / C busy", "blocking", 0.6, "c", later=".9"),
            Target("IOQ 1500 B, trio / C busy", "trio", 0.35, "c", later=".6"),
        ),
    ),
    _one_way_suite(
        "ioq-64k",
        65536,
        (Target("IOQ 64 KiB, trio / C busy", "trio", 0.7, "c", later=".9"),),
    ),
    Suite(
        "round-trip",
        {
            "sleeping": Metric("IOQ under trio, both ends sleeping, p50", "us"),
            "awake": Metric("IOQ under trio, both ends awake, p50", "us"),
            "c": Metric("C eventfd round trip, p50", "us"),
            "msgpack": Metric("trio stream + msgpack, p50", "us"),
        },
        (
            Target(
                "ring round trip, sleeping / C eventfd",
                "sleeping",
                1.4,
                "c",
                at_most=True,
                later="1.2",
            ),
        ),
        round_trip,
        {"c": probe_trip},
    ),
)
