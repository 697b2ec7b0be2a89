"""Generated Ethernet frames, for a guest that may not make a TAP.

Everybody announces itself by broadcast. To each peer it hears of it sends bursts of
full-size frames, each burst ended by a ping which the peer answers, so that the network
is never flooded and the round trip is known.

    ethertype 0x88b5 | kind u8 | pad | sequence u32 | time_ns u64 | filling
"""

import struct
import time
from collections import deque
from dataclasses import dataclass
from statistics import median

import trio

from vbus.net import FrameBatch, GuestPump, MacAddress

_BROADCAST = b"\xff" * 6
_ETHERTYPE = b"\x88\xb5"  # for local experiments, IEEE 802
_HEADER = struct.Struct("<BxxxIQ")
_HELLO, _DATA, _PING, _PONG = range(4)
_FRAME_SIZE = 1514
_BURST = 31
_HELLO_PERIOD_S = 0.2
_PONG_TIMEOUT_S = 1.0
_PAUSE_S = 0.001
_SAMPLES = 1000


@dataclass(frozen=True)
class ExchangeStatistics:
    """Frames and bytes of full-size bursts and pings; the median round trip."""

    peers: int
    sent_frames: int
    received_frames: int
    received_bytes: int
    lost_pings: int
    round_trips: int
    rtt_us: float | None


class FrameExchange:
    """Sends to and answers all others on the same network."""

    def __init__(self, pump: GuestPump, mac: MacAddress) -> None:
        self._pump = pump
        self._mac = bytes(mac)
        self._peers: dict[bytes, trio.Event] = {}
        self._sequence = 0
        self._sent = self._received = self._received_bytes = 0
        self._lost = self._round_trips = 0
        self._rtts: deque[float] = deque(maxlen=_SAMPLES)

    async def run(self) -> None:
        """Exchange frames until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._announce)
            nursery.start_soon(self._receive, nursery)

    async def _announce(self) -> None:
        while True:
            await self._send([self._frame(_BROADCAST, _HELLO, bytes(46))])
            await trio.sleep(_HELLO_PERIOD_S)

    async def _talk(self, peer: bytes) -> None:
        """Bursts to one peer, for ever."""
        filling = bytes(_FRAME_SIZE - 14 - _HEADER.size)
        data = self._frame(peer, _DATA, filling)
        while True:
            answered = self._peers[peer] = trio.Event()
            await self._send([data] * _BURST + [self._frame(peer, _PING, bytes(46))])
            with trio.move_on_after(_PONG_TIMEOUT_S):
                await answered.wait()
            self._lost += not answered.is_set()
            await trio.sleep(_PAUSE_S)

    def _frame(self, to: bytes, kind: int, filling: bytes, time_ns: int = 0) -> bytes:
        self._sequence = (self._sequence + 1) & 0xFFFFFFFF
        stamp = time_ns or time.monotonic_ns()
        header = _HEADER.pack(kind, self._sequence, stamp)
        return to + self._mac + _ETHERTYPE + header + filling

    async def _send(self, frames: list[bytes]) -> None:
        batch = FrameBatch()
        batch.load([(frame, 0, 0, 0, 0, 0) for frame in frames])
        done = 0
        while done < len(frames):
            await self._pump.room()
            done += self._pump.send(batch, done, len(frames) - done)
        self._sent += len(frames)

    async def _receive(self, nursery: trio.Nursery) -> None:
        batch = FrameBatch()
        while True:
            await self._pump.wait()
            self._pump.receive(batch)
            frames = [batch.frame(n)[0] for n in range(len(batch))]
            self._pump.done()
            pongs = []
            for frame in frames:
                self._received += 1
                self._received_bytes += len(frame)
                pongs += self._take(frame, nursery)
            if pongs:
                await self._send(pongs)
            await trio.lowlevel.checkpoint()

    def _take(self, frame: bytes, nursery: trio.Nursery) -> list[bytes]:
        """Handle one frame; give the frames that answer it."""
        if frame[12:14] != _ETHERTYPE or len(frame) < 14 + _HEADER.size:
            return []
        source = frame[6:12]
        kind, _, stamp = _HEADER.unpack_from(frame, 14)
        if source not in self._peers:
            self._peers[source] = trio.Event()
            nursery.start_soon(self._talk, source)
        if kind == _PING:
            return [self._frame(source, _PONG, bytes(46), stamp)]
        if kind == _PONG:
            self._rtts.append((time.monotonic_ns() - stamp) / 1000)
            self._round_trips += 1
            self._peers[source].set()
        return []

    def statistics(self) -> ExchangeStatistics:
        """A snapshot of the counters."""
        return ExchangeStatistics(
            len(self._peers),
            self._sent,
            self._received,
            self._received_bytes,
            self._lost,
            self._round_trips,
            median(self._rtts) if self._rtts else None,
        )
