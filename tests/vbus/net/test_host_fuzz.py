"""The south end over memory full of garbage, under AddressSanitizer and UBSan."""

import random
import struct
import time

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.vbus.net.harness import Harness

TX, RX, PAGES, EVENTS = 0x0, 0x1000, 0x2000, 0x3000
TX_POOL, RX_POOL, EVENT_POOL = 0x4000, 0x6000, 0x8000
DATA, MEMORY = 0x10000, 1 << 20
COUNT = 16
DESCRIPTOR = struct.Struct("<QQQBB6x")
SG = struct.Struct("<QIIHHBxHH2xI")
IOV = struct.Struct("<I4xQ")
NAMES = (  # of the counters, in the order of struct vn_host_counters, and one more
    *("tx_frames", "tx_bytes", "tx_length_errors", "tx_frame_errors"),
    *("rx_frames", "rx_bytes", "rx_dropped", "rx_length_errors"),
    *("segmented", "checksummed", "deferred", "flushed", "injects"),
)


class Image:
    """Guest memory from the TX ring on, as the harness lays it out."""

    def __init__(self) -> None:
        self.data = bytearray(MEMORY // 4)

    def descriptor(self, ring: int, at: int, ptr: int, length: int) -> None:
        """South-owned, valid."""
        offset = ring + 56 + 32 * at
        DESCRIPTOR.pack_into(self.data, offset, 0x1234 + at, ptr, length, 1, 1)

    def index(self, ring: int, head: int, tail: int, full: int) -> None:
        struct.pack_into("<IIB", self.data, ring + 36, head, tail, full)


def run(
    harness: Harness, image: Image, tx: int, rx: int, txc: int, mitigation: int = 10
) -> tuple[dict[str, int], str]:
    answer = harness.ask(b"V", bytes([tx, rx, txc, mitigation]) + bytes(image.data))
    size = 8 * len(NAMES)
    counters = dict(
        zip(NAMES, struct.unpack(f"<{len(NAMES)}Q", answer[:size]), strict=True)
    )
    return counters, answer[size:].decode()


def good_image(tx: int, rx: int) -> Image:
    """Full rings of frames and buffers, all correct, of 60 bytes."""
    image = Image()
    for at in range(COUNT):
        data = DATA + 2048 * at
        if tx & 1:
            slot = TX_POOL + 320 * at
            SG.pack_into(image.data, slot, 7, 0, 60, 0, 0, 0, 0, 0, 1)
            IOV.pack_into(image.data, slot + 32, 60, data)
            where = 320 * at if tx & 0x20 else 0x1000 + slot
            image.descriptor(TX, at, where, 48)
        else:
            image.descriptor(TX, at, data, 60)
        buffer = DATA + 0x10000 + 2048 * at
        if rx & 1:
            slot = RX_POOL + 320 * at
            SG.pack_into(image.data, slot, 7, 0, 0, 0, 0, 0, 0, 0, 1)
            IOV.pack_into(image.data, slot + 32, 1514, buffer)
            image.descriptor(RX, at, 320 * at, 320)
        else:
            image.descriptor(RX, at, buffer, 1514)
        image.descriptor(PAGES, at, DATA + 0x20000 + 4096 * at, 4096)
        image.descriptor(EVENTS, at, 24 * at, 24)
    return image


def test_the_harness_moves_good_frames(harness: Harness) -> None:
    """The fuzz below starts from something that works in every mode."""
    for tx in (0, 0x0F, 0x2F):
        for rx in (0, 1, 0x0F):
            for txc in (0, 1):
                counters, fault = run(harness, good_image(tx, rx), tx, rx, txc)
                assert (fault, counters["rx_frames"]) == ("", COUNT)


def test_the_guest_is_signalled_after_txmitigation_packets(harness: Harness) -> None:
    """R15 (7.8): N = 0 after each, else after every N and at the end."""
    for mitigation, injects in ((0, 16), (1, 16), (5, 4), (10, 2), (16, 1), (100, 1)):
        counters, _ = run(harness, good_image(0, 0), 0, 0, 0, mitigation)
        assert counters["injects"] == injects


caps = st.sampled_from([0, 1, 0x0F, 0x2F])
places = st.sampled_from([TX, RX, PAGES, EVENTS, TX_POOL, RX_POOL, EVENT_POOL])
_edges = (0, 14, 48, 60, 320, 1514, 65536, MEMORY // 2, MEMORY, 2**31, 2**32, 2**63)
values = st.integers(0, 2**64 - 1) | st.sampled_from(
    [(edge + near) % 2**64 for edge in _edges for near in (-30, -1, 0, 1)]
)


@given(
    tx=caps, rx=caps, txc=st.integers(0, 1),
    pokes=st.lists(
        st.tuples(places, st.integers(0, 0x400), st.sampled_from([1, 2, 4, 8]), values),
        max_size=12,
    ),
)  # fmt: skip
@settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_no_byte_of_the_rings_can_make_the_host_slip(
    harness: Harness,
    tx: int,
    rx: int,
    txc: int,
    pokes: list[tuple[int, int, int, int]],
) -> None:
    """R51: dropped, counted, or a named fault; never out of bounds."""
    image = good_image(tx, rx)
    for place, offset, width, value in pokes:
        at = place + offset // width * width
        image.data[at : at + width] = (value % (1 << 8 * width)).to_bytes(
            width, "little"
        )
    counters, fault = run(harness, image, tx, rx, txc)
    bad = counters["tx_length_errors"] + counters["tx_frame_errors"]
    assert fault or counters["tx_frames"] + bad <= 8 * 64


def test_a_hammer_of_noise(harness: Harness) -> None:
    """R51: for a few seconds, whole structures of random bytes."""
    noise = random.Random(51)
    end = time.monotonic() + 3
    while time.monotonic() < end:
        tx, rx = noise.choice([0, 1, 0x0F, 0x2F]), noise.choice([0, 1, 0x0F])
        image = good_image(tx, rx)
        for _ in range(noise.randrange(1, 30)):
            at = noise.randrange(EVENT_POOL + 24 * COUNT - 64)
            size = noise.choice([1, 2, 4, 8, 32, 64])
            image.data[at : at + size] = noise.randbytes(size)
        run(harness, image, tx, rx, noise.randrange(2))
