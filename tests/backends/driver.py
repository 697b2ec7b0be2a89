"""A venet driver in plain Python, written after ABI 7.10: the oracle for our host end.

It does what the Linux driver does, byte by byte, in every mode, and keeps no state that
is not in the rings. Tests may do single steps wrong.
"""

import struct
from dataclasses import dataclass, field
from itertools import pairwise

from ioq import Index
from shm import Locality
from vbus.testing import GuestPeer, NorthRing, Shared

SLOT = 304  # of a kernel whose MAX_SKB_FRAGS is 17 (12.1)
PAGE = 4096
HEAP = 1 << 20
SG = struct.Struct("<QIIHHBxHH2xI")
IOV = struct.Struct("<I4xQ")
COOKIE = 0xFFFF_8880_0000_0000


@dataclass
class Modes:
    """What to negotiate and how large to make the rings."""

    sg: int = 0
    events: int = 0
    l4ro: int = 0
    count: int = 16
    pages: int = 32
    mtu: int = 1500

    @property
    def pmtd(self) -> bool:
        return bool(self.sg & 0x20)

    @property
    def txc(self) -> bool:
        return bool(self.events & 2)


@dataclass
class Received:
    """A frame as the guest got it, with the venet_sg's fields if it came in one."""

    data: bytes
    flags: int = 0
    csum: tuple[int, int] = (0, 0)
    gso: tuple[int, int, int] = (0, 0, 0)
    iovs: int = 1


@dataclass
class Driver:
    """One open venet. `await start()` brings it up to LINKUP."""

    peer: GuestPeer
    devid: int = 0
    modes: Modes = field(default_factory=Modes)

    async def start(self, *, up: bool = True) -> None:
        """Steps 2 to 11 of 7.10."""
        modes, peer = self.modes, self.peer
        self.handle = await peer.open(self.devid)
        for group, bits in ((0, modes.sg), (1, modes.events), (2, modes.l4ro)):
            if bits:
                assert await self.negotiate(group, bits) == bits
        self.events: NorthRing | None = None
        self.pages: NorthRing | None = None
        if modes.events:
            await self._share_events()
        if modes.l4ro & 1:
            self.rx_pool = await peer.share(self.handle, 103, SLOT * modes.count)
            self.pages = await peer.share_ring(self.handle, 104, modes.pages)
        self.rx = await peer.share_ring(self.handle, 0, modes.count)
        self.tx = await peer.share_ring(self.handle, 1, modes.count)
        self.buffer_size = modes.mtu + 14
        self.buffers = peer.allocate(self.buffer_size * modes.count)
        self._heap = peer.allocate(HEAP)
        self._next = 0
        self._post_rx()
        self.tx_pool: Shared | None = None
        if modes.pmtd:
            self.tx_pool = await peer.share(self.handle, 100, SLOT * modes.count)
        elif modes.sg & 1:
            self.sg_memory = peer.allocate(SLOT * modes.count)
        self.mac = (await peer.call(self.handle, 2, bytes(6)))[1]
        if up:
            await peer.call(self.handle, 0)

    async def negotiate(self, group: int, bits: int) -> int:
        data = struct.pack("<II", group, bits)
        _, after = await self.peer.call(self.handle, 3, data)
        gid, accepted = struct.unpack("<II", after)
        assert gid == group
        return int(accepted)

    async def _share_events(self) -> None:
        count = self.modes.count
        self.event_pool = await self.peer.share(self.handle, 101, 24 * count)
        self.events = await self.peer.share_ring(self.handle, 102, count)
        entries = [(COOKIE + at, 24 * at, 24) for at in range(count)]
        self.events.ring.push(entries, Index.VALID)

    def _post_rx(self) -> None:
        it = self.rx.ring.iterator(Index.VALID)
        for at in range(self.modes.count):
            it.seek_set(at)
            self._fill_slot(it, at)
            it.push()
        for _ in range(self.modes.pages if self.pages else 0):
            page = self.peer.allocate(PAGE, PAGE)
            assert self.pages is not None
            self.pages.ring.push([(COOKIE + page, page, PAGE)])
        if self.pages is not None:
            self.pages.ring.signal.inject()

    def _fill_slot(self, it: object, at: int) -> None:
        """Make RX descriptor `at` an empty buffer."""
        buffer = self.buffers + at * self.buffer_size
        it.cookie, it.valid = COOKIE + at, True
        if not self.modes.l4ro & 1:
            it.ptr, it.len = buffer, self.buffer_size
            return
        it.ptr, it.len = SLOT * at, SLOT
        slot = SG.pack(COOKIE + at, 0, 0, 0, 0, 0, 0, 0, 1)
        self.rx_pool.view.write(SLOT * at, slot + IOV.pack(self.buffer_size, buffer))

    # Transmit

    def send(
        self,
        data: bytes,
        *,
        flags: int = 0,
        csum: tuple[int, int] = (0, 0),
        gso: tuple[int, int, int] = (0, 0, 0),
        cuts: tuple[int, ...] = (),
        inject: bool = True,
    ) -> None:
        """Push one frame, in fragments that end at `cuts`."""
        at = self.place(data)
        if not self.modes.sg & 1:
            self.push_tx(at, len(data), inject=inject)
            return
        edges = [0, *cuts, len(data)]
        iovs = [(end - begin, at + begin) for begin, end in pairwise(edges)]
        self.send_sg(len(data), iovs, flags, csum, gso, inject=inject)

    def place(self, data: bytes) -> int:
        """Write bytes somewhere in guest memory: where."""
        if self._next + len(data) > HEAP:
            self._next = 0
        at = self._heap + self._next
        self.peer.memory.write(at, data)
        self._next += len(data) + 3 & ~3
        return at

    def send_sg(
        self,
        length: int,
        iovs: list[tuple[int, int]],
        flags: int = 0,
        csum: tuple[int, int] = (0, 0),
        gso: tuple[int, int, int] = (0, 0, 0),
        *,
        size: int | None = None,
        count: int | None = None,
        inject: bool = True,
    ) -> None:
        """Push a venet_sg; `gso` is (type, hdrlen, size)."""
        at = self.tx_position()
        record = SG.pack(
            COOKIE + at,
            flags,
            length,
            *csum,
            *gso,
            len(iovs) if count is None else count,
        )
        record += b"".join(IOV.pack(*iov) for iov in iovs)
        if self.tx_pool is not None:
            self.tx_pool.view.write(SLOT * at, record)
            where = SLOT * at
        else:
            where = self.sg_memory + SLOT * at
            self.peer.memory.write(where, record)
        self.push_tx(where, len(record) if size is None else size, inject=inject)

    def tx_position(self) -> int:
        it = self.tx.ring.iterator(Index.INUSE)
        it.seek_tail()
        return int(it.position)

    def push_tx(self, ptr: int, length: int, *, inject: bool = True) -> None:
        index = Index.INUSE if self.modes.txc else None
        it = self.tx.ring.iterator(index)
        it.seek_tail()
        it.cookie, it.ptr, it.len, it.valid = COOKIE + it.position, ptr, length, True
        it.push()
        if inject:
            self.tx.ring.signal.inject()

    def reap(self) -> int:
        """Without TXC: completed descriptors, popped from `valid` (6.4)."""
        it = self.tx.ring.iterator(Index.VALID, flip_owner=False)
        it.seek_head()
        done = 0
        while it.valid and it.owner == Locality.NORTH:
            it.valid = False
            it.pop()
            done += 1
        return done

    # Receive

    def receive(self, limit: int | None = None) -> list[Received]:
        """Take frames, posting each buffer again; no frame counts as flushed."""
        frames: list[Received] = []
        it = self.rx.ring.iterator(Index.INUSE, auto_update=True)
        it.seek_head()
        while it.owner == Locality.NORTH and len(frames) != limit:
            if it.len == 0 or not self.rx.ring.entries():
                break
            frames.append(self._take(it))
            self._fill_slot(it, it.position)
            it.pop()
        return frames

    def _take(self, it: object) -> Received:
        if not self.modes.l4ro & 1:
            return Received(self.peer.memory.read(it.ptr, it.len))
        slot = self.rx_pool.view.read(it.ptr, SLOT)
        cookie, flags, length, start, offset, kind, hdr, size, count = SG.unpack_from(
            slot
        )
        assert cookie == COOKIE + it.position
        data = b""
        for at in range(count):
            part, ptr = IOV.unpack_from(slot, SG.size + IOV.size * at)
            if at > 0:
                ptr -= COOKIE
            data += self.peer.memory.read(ptr, part)
            if at > 0:
                self._return_page(ptr)
        assert len(data) == length
        return Received(data, flags, (start, offset), (kind, hdr, size), count)

    def _return_page(self, page: int) -> None:
        assert self.pages is not None
        assert self.pages.ring.push([(COOKIE + page, page, PAGE)]) == 1
        self.pages.ring.signal.inject()

    def flushed(self) -> int:
        """Take buffers that came back empty: how many."""
        it = self.rx.ring.iterator(Index.INUSE)
        it.seek_head()
        empty = 0
        while it.owner == Locality.NORTH and self.rx.ring.entries():
            if self.modes.l4ro & 1:
                assert SG.unpack(self.rx_pool.view.read(it.ptr, SG.size))[2] == 0
            else:
                assert it.len == 0
            self._fill_slot(it, it.position)
            it.pop()
            empty += 1
        return empty

    def take_events(self, limit: int | None = None) -> list[bytes]:
        """Take venet events, posting their buffers again."""
        assert self.events is not None
        found: list[bytes] = []
        it = self.events.ring.iterator(Index.INUSE, auto_update=True)
        it.seek_head()
        while (
            it.owner == Locality.NORTH
            and self.events.ring.entries()
            and len(found) != limit
        ):
            at = it.ptr
            size = struct.unpack("<I", self.event_pool.view.read(at + 4, 4))[0]
            found.append(self.event_pool.view.read(at, size))
            it.pop()
        return found
