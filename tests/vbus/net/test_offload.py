"""Checksum and segmentation against a slow oracle in Python, under sanitizers."""

import struct

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.frames import (
    ACK,
    CWR,
    ECN,
    FIN,
    GSO,
    NEEDS_CSUM,
    PSH,
    SYN,
    TCP4,
    TCP6,
    UDP,
    checksum,
    ether,
    ip4,
    pseudo,
    segments,
    tcp_frame,
)
from tests.vbus.net.harness import Harness

under_hypothesis = settings(
    max_examples=200,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
flags = st.sets(st.sampled_from([FIN, SYN, PSH, ACK, CWR, 0x20, 0x40])).map(sum)
options = st.integers(0, 10).map(lambda n: bytes([1] * 4 * n))


def cut(
    harness: Harness,
    frame: bytes,
    wanted: int,
    *,
    kind: int = 0,
    size: int = 0,
    csum: tuple[int, int] = (0, 0),
) -> list[bytes]:
    """What becomes of a frame for a receiver without offload; [] = refused."""
    offload = struct.pack("<IBxHHH", wanted, kind, size, *csum)
    answer = harness.ask(b"S", offload + frame)
    made = []
    while answer:
        (length,) = struct.unpack_from("<I", answer)
        made.append(answer[4 : 4 + length])
        answer = answer[4 + length :]
    return made


@given(data=st.binary(max_size=3000), start=st.integers(0, 400))
@under_hypothesis
def test_the_sum_is_that_of_rfc_1071(harness: Harness, data: bytes, start: int) -> None:
    """R15: over pieces of odd lengths, from any offset."""
    start = min(start, len(data))
    answer = harness.ask(b"C", struct.pack("<H", start) + data)
    assert struct.unpack("<H", answer)[0] == checksum(data[start:])


@given(
    payload=st.binary(max_size=5000),
    size=st.integers(1, 1600),
    seq=st.integers(0, 2**32 - 1),
    flags=flags,
    options=options,
    six=st.booleans(),
    vlan=st.booleans(),
    extra=st.integers(0, 3),
)
@under_hypothesis
def test_segments_are_those_of_the_oracle(
    harness: Harness,
    payload: bytes,
    size: int,
    seq: int,
    flags: int,
    options: bytes,
    six: bool,
    vlan: bool,
    extra: int,
) -> None:
    """R15 (12.2): pseudo header per segment; FIN and PSH last, CWR first."""
    size = max(size, len(payload) // 300 + 1)
    if six:
        ip_extra = bytes([6, extra - 1, *bytes(8 * extra - 2)]) if extra else b""
    else:
        ip_extra = bytes([1] * 4 * extra)
    frame, at = tcp_frame(
        payload, six=six, vlan=vlan, ip_extra=ip_extra,
        seq=seq, flags=flags, options=options,
    )  # fmt: skip
    kind = TCP6 if six else TCP4
    got = cut(harness, frame, NEEDS_CSUM | GSO, kind=kind, size=size, csum=(at, 16))
    assert got == segments(frame, at, size, six=six)


@given(payload=st.binary(max_size=2000), six=st.booleans(), options=options)
@under_hypothesis
def test_a_needed_checksum_is_the_one_a_host_would_have_sent(
    harness: Harness, payload: bytes, six: bool, options: bytes
) -> None:
    """R15."""
    partial, at = tcp_frame(payload, six=six, options=options)
    whole, _ = tcp_frame(payload, six=six, options=options, partial=False)
    assert cut(harness, partial, NEEDS_CSUM, csum=(at, 16)) == [whole]


@given(payload=st.binary(max_size=200))
@under_hypothesis
def test_a_udp_checksum_of_zero_is_sent_as_ones(
    harness: Harness, payload: bytes
) -> None:
    """R15: 0 would mean that there is none (RFC 768)."""
    length = 8 + len(payload) + 2
    fill = b""
    for last in (b"\0\0", None):
        udp = struct.pack(">HHHH", 53, 53, length, 0) + payload
        if len(payload) % 2:
            udp += b"\0"
            length += 1
            udp = udp[:4] + struct.pack(">H", length) + udp[6:]
        probe = ip4(udp + b"\0\0", protocol=17)
        if last is None:
            last = fill
        segment = udp + last
        head = pseudo(probe, length, 17)
        fill = struct.pack(">H", ~checksum(head + segment) & 0xFFFF)
        length = 8 + len(payload) + 2
    packet = ip4(segment, protocol=17)
    partial = struct.pack(">H", checksum(head))
    frame = ether(packet[:26] + partial + packet[28:], kind=0x0800)
    (got,) = cut(harness, frame, NEEDS_CSUM, csum=(34, 6))
    assert got[40:42] == b"\xff\xff"
    assert got[:40] + got[42:] == frame[:40] + frame[42:]


@given(
    noise=st.binary(min_size=14, max_size=400),
    wanted=st.integers(0, 15),
    kind=st.sampled_from([TCP4, UDP, TCP6, 3, 255]),
    size=st.integers(0, 3),
    csum=st.tuples(st.integers(0, 300), st.integers(0, 300) | st.just(65535)),
    base=st.sampled_from(["noise", "v4", "v6", "vlan"]),
    at=st.integers(0, 120),
)
@under_hypothesis
def test_any_frame_is_cut_or_refused_without_a_slip(
    harness: Harness,
    noise: bytes,
    wanted: int,
    kind: int,
    size: int,
    csum: tuple[int, int],
    base: str,
    at: int,
) -> None:
    """R51: hostile headers, lengths and offsets; the sanitizers watch."""
    if base != "noise":
        good, _ = tcp_frame(noise, six=base == "v6", vlan=base == "vlan")
        noise = good[:at] + noise[:3] + good[at + 3 :]
    made = cut(harness, noise, wanted, kind=kind, size=size, csum=csum)
    for frame in made:
        assert len(frame) >= 14
        assert frame[:12] == noise[:12]


def test_ecn_does_not_change_how_a_frame_is_cut(harness: Harness) -> None:
    """R15: CWR stays on the first segment."""
    frame, at = tcp_frame(bytes(3000), flags=ACK | CWR)
    wanted = NEEDS_CSUM | GSO | ECN
    got = cut(harness, frame, wanted, kind=TCP4, size=1000, csum=(at, 16))
    assert [each[at + 13] & CWR for each in got] == [CWR, 0, 0]
