"""Ethernet frames for tests, and a slow, separate idea of checksum and segmentation."""

import struct

MAC_A = bytes.fromhex("02000000000a")
MAC_B = bytes.fromhex("02000000000b")
BROADCAST = b"\xff" * 6
NEEDS_CSUM, GSO, ECN = 1, 2, 4
TCP4, UDP, TCP6 = 0, 1, 2
FIN, SYN, PSH, ACK, CWR = 1, 2, 8, 16, 128


def ether(
    payload: bytes, *, to: bytes = MAC_B, by: bytes = MAC_A, kind: int = 0x88B5
) -> bytes:
    """A frame with a type for local experiments."""
    return to + by + struct.pack(">H", kind) + payload


def checksum(data: bytes) -> int:
    """RFC 1071, as slow as it reads."""
    if len(data) % 2:
        data += b"\0"
    total = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def pseudo(packet: bytes, length: int, protocol: int = 6) -> bytes:
    """The pseudo header of an IP packet for `length` bytes of transport."""
    if packet[0] >> 4 == 4:
        return packet[12:20] + struct.pack(">BBH", 0, protocol, length)
    return packet[8:40] + struct.pack(">II", length, protocol)


def ip4(
    payload: bytes, *, options: bytes = b"", ident: int = 7, protocol: int = 6
) -> bytes:
    header = struct.pack(
        ">BBHHHBBH4s4s", 0x45 + len(options) // 4, 0, 20 + len(options) + len(payload),
        ident, 0x4000, 64, protocol, 0, bytes([10, 0, 0, 1]), bytes([10, 0, 0, 2]),
    ) + options  # fmt: skip
    total = ~checksum(header) & 0xFFFF
    return header[:10] + struct.pack(">H", total) + header[12:] + payload


def ip6(payload: bytes, *, extension: bytes = b"", protocol: int = 6) -> bytes:
    """`extension` is a whole extension header of type destination options."""
    kind = 60 if extension else protocol
    header = struct.pack(">IHBB", 6 << 28, len(extension) + len(payload), kind, 64)
    return header + bytes(range(32)) + extension + payload


def tcp(
    payload: bytes, *, seq: int = 1000, flags: int = ACK, options: bytes = b""
) -> bytes:
    offset = (20 + len(options)) // 4
    head = struct.pack(">HHIIBBHHH", 80, 4000, seq, 1, offset << 4, flags, 512, 0, 0)
    return head + options + payload


def tcp_frame(
    payload: bytes,
    *,
    six: bool = False,
    partial: bool = True,
    vlan: bool = False,
    to: bytes = MAC_B,
    by: bytes = MAC_A,
    ip_extra: bytes = b"",
    **fields: object,
) -> tuple[bytes, int]:
    """A whole frame and where its TCP header begins.

    `partial`: the checksum field holds the pseudo header's sum, as a sender with
    offload leaves it; else the checksum.
    """
    segment = tcp(payload, **fields)
    packet = ip6(segment, extension=ip_extra) if six else ip4(segment, options=ip_extra)
    at = len(packet) - len(segment)
    head = pseudo(packet, len(segment))
    total = checksum(head) if partial else ~checksum(head + segment) & 0xFFFF
    packet = packet[: at + 16] + struct.pack(">H", total) + packet[at + 18 :]
    tag = b"\x81\x00\x00\x05" if vlan else b""
    header = to + by + tag + struct.pack(">H", 0x86DD if six else 0x0800)
    return header + packet, len(header) + at


def segments(frame: bytes, at: int, size: int, *, six: bool) -> list[bytes]:
    """What a network card makes of a GSO frame: the oracle, headers rebuilt in full."""
    tag = 4 if frame[12:14] == b"\x81\x00" else 0
    ip_at = 14 + tag
    packet, tcp_at = frame[ip_at:], at - ip_at
    header_size = (packet[tcp_at + 12] >> 4) * 4
    payload = packet[tcp_at + header_size :]
    cuts = [payload[i : i + size] for i in range(0, len(payload), size)] or [b""]
    made = []
    for number, cut in enumerate(cuts):
        head = bytearray(packet[tcp_at : tcp_at + header_size])
        seq = int.from_bytes(head[4:8], "big") + number * size
        head[4:8] = (seq & 0xFFFFFFFF).to_bytes(4, "big")
        if number < len(cuts) - 1:
            head[13] &= ~(FIN | PSH)
        if number > 0:
            head[13] &= 0xFF & ~CWR
        head[16:18] = b"\0\0"
        ip = bytearray(packet[:tcp_at])
        if six:
            ip[4:6] = (tcp_at - 40 + len(head) + len(cut)).to_bytes(2, "big")
        else:
            ip[2:4] = (tcp_at + len(head) + len(cut)).to_bytes(2, "big")
            ident = int.from_bytes(ip[4:6], "big") + number
            ip[4:6] = (ident & 0xFFFF).to_bytes(2, "big")
            ip[10:12] = b"\0\0"
            ip[10:12] = (~checksum(bytes(ip)) & 0xFFFF).to_bytes(2, "big")
        whole = pseudo(bytes(ip), len(head) + len(cut)) + bytes(head) + cut
        head[16:18] = ((~checksum(whole) & 0xFFFF) or 0xFFFF).to_bytes(2, "big")
        made.append(frame[:ip_at] + bytes(ip) + bytes(head) + cut)
    return made
