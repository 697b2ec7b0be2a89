"""Traffic for the demo, run inside a network namespace: what ping and iperf would do.

python -m vbus.cli.demo.traffic WORD ...

ping ADDRESS COUNT          prints microseconds, a line for each answer
sink PORT                   prints "ready", and at the end bytes and seconds
source ADDRESS PORT SECONDS
receive PORT                prints "ready", at the end bytes, seconds and CRC-32
send ADDRESS PORT MIB       prints "sending", and at the end bytes and CRC-32
"""

import os
import socket
import struct
import sys
import time
import zlib

_ECHO_REQUEST, _ECHO_REPLY = 8, 0
_HEADER = struct.Struct("!BBHHH")
_REPLY_WITHIN_S = 0.5
_CONNECT_WITHIN_S = 5
_STALLED_AFTER_S = 30
_CHUNK = 1 << 20


def checksum(data: bytes) -> int:
    """The Internet checksum (RFC 1071) of an even number of bytes."""
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def _echo(ident: int, sequence: int) -> bytes:
    body = bytes(56)
    plain = _HEADER.pack(_ECHO_REQUEST, 0, 0, ident, sequence) + body
    return _HEADER.pack(_ECHO_REQUEST, 0, checksum(plain), ident, sequence) + body


def ping(address: str, count: int) -> None:
    """Print the round trip of each echo that was answered in time."""
    ident = os.getpid() & 0xFFFF
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as sock:
        sock.settimeout(_REPLY_WITHIN_S)
        sock.connect((address, 0))
        for sequence in range(count):
            start = time.perf_counter()
            try:
                sock.send(_echo(ident, sequence))
                while not _answers(sock.recv(2048), ident, sequence):
                    pass
            except OSError:  # nothing came in time, or no way yet
                continue
            print(round((time.perf_counter() - start) * 1e6, 1), flush=True)


def _answers(packet: bytes, ident: int, sequence: int) -> bool:
    at = (packet[0] & 15) * 4
    kind, _, _, *who = _HEADER.unpack_from(packet, at)
    return kind == _ECHO_REPLY and who == [ident, sequence]


def sink(port: int) -> None:
    """Take one connection's bytes; print how many, and in how many seconds."""
    buffer = memoryview(bytearray(_CHUNK))
    with socket.create_server(("", port)) as server:
        print("ready", flush=True)
        connection, _ = server.accept()
        with connection:
            start, total = time.perf_counter(), 0
            while size := connection.recv_into(buffer):
                total += size
            print(total, time.perf_counter() - start, flush=True)


def source(address: str, port: int, seconds: float) -> None:
    """Send as much as goes."""
    data = bytes(_CHUNK)
    with socket.create_connection((address, port), _CONNECT_WITHIN_S) as sock:
        sock.settimeout(_CONNECT_WITHIN_S + seconds)
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            sock.sendall(data)


def receive(port: int) -> None:
    """As `sink`, and tell what it was."""
    buffer = memoryview(bytearray(_CHUNK))
    with socket.create_server(("", port)) as server:
        print("ready", flush=True)
        connection, _ = server.accept()
        with connection:
            start, total, crc = time.perf_counter(), 0, 0
            while size := connection.recv_into(buffer):
                total += size
                crc = zlib.crc32(buffer[:size], crc)
            print(total, time.perf_counter() - start, f"{crc:08x}", flush=True)


def send(address: str, port: int, mib: int) -> None:
    """Send what no two MiB of are alike, and tell what it was."""
    block, crc = os.urandom(_CHUNK), 0
    with socket.create_connection((address, port), _CONNECT_WITHIN_S) as sock:
        sock.settimeout(_STALLED_AFTER_S)
        for number in range(mib):
            part = number.to_bytes(8, "little") + block[8:]
            crc = zlib.crc32(part, crc)
            sock.sendall(part)
            if number == 0:
                print("sending", flush=True)
    print(mib * _CHUNK, f"{crc:08x}", flush=True)


def main(words: list[str]) -> None:
    """Do what the first word says."""
    match words:
        case ["ping", address, count]:
            ping(address, int(count))
        case ["sink", port]:
            sink(int(port))
        case ["source", address, port, seconds]:
            source(address, int(port), float(seconds))
        case ["receive", port]:
            receive(int(port))
        case ["send", address, port, mib]:
            send(address, int(port), int(mib))
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
