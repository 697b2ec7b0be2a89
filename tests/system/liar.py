"""A backend that lies; run as a process of its own.

    python -m tests.system.liar SOCKET LIE

Says hello as a backend should, waits until it is welcome, tells its lie, and then waits
to be hung up on: it exits with 0 when that happens, if it was not killed before.
"""

import array
import os
import socket
import sys
import tempfile
from contextlib import suppress

import msgspec

from vbus.backend import wire

CLASS = wire.ClassInfo("liar", "org.vbus.test.liar")


def hello(
    *classes: wire.ClassInfo, name: str = "liar", version: int = wire.VERSION
) -> bytes:
    return wire.encode(wire.Hello(version, name, classes or (CLASS,)))


def raw(body: bytes, fds: int = 0) -> bytes:
    return wire.HEAD.pack(len(body), fds) + body


def packed(**fields: object) -> bytes:
    return raw(msgspec.msgpack.encode(fields))


BEFORE = {
    "no-hello": wire.encode(wire.Reply(1)),
    "old-version": hello(version=99),
    "method-as-attribute": hello(
        wire.ClassInfo("liar", "", attributes=(wire.AttributeInfo("open"),))
    ),
    "field-as-attribute": hello(
        wire.ClassInfo("liar", "", attributes=(wire.AttributeInfo("connections"),))
    ),
    "private-attribute": hello(
        wire.ClassInfo("liar", "", attributes=(wire.AttributeInfo("_link"),))
    ),
    "bad-class-name": hello(wire.ClassInfo("../../x", "")),
    "long-type": hello(wire.ClassInfo("liar", "x" * 200)),
    "two-of-one-name": hello(CLASS, CLASS),
    "bad-name": hello(name="Not A Name"),
    "no-classes": wire.encode(wire.Hello(1, "liar")),
    "others-name": hello(name="far"),
    "garbage": b"\xff" * 64,
    "no-msgpack": raw(b"\xc1\xc1\xc1"),
    "deep": raw(b"\x91" * 100_000 + b"\x01"),
    "unknown-type": packed(type="mystery"),
    "unknown-field": packed(type="hello", version=wire.VERSION, name="liar", more=1),
    "of-the-daemon": wire.encode(wire.Welcome(wire.VERSION, "liar")),
}
AFTER = {
    "second-hello": hello(),
    "reply-to-nothing": wire.encode(wire.Reply(1 << 40)),
    "reply-twice": wire.encode(wire.Reply(1)) * 2,
    "foreign-connection": wire.encode(wire.Failed(1)),
    "foreign-device": wire.encode(wire.DeviceFailed("echo0")),
    "data-for-no-call": wire.encode(wire.Reply(1, data=b"x")),
    "result-too-wide": packed(type="reply", id=1, result=1 << 40),
    "negative-id": packed(type="reply", id=-1),
    "oversized": wire.HEAD.pack(wire.FRAME_LIMIT + 1, 0),
    "names-descriptors": raw(b"\xc0", 1),
}
WITH_FDS = ("eventfd", "memfd", "file", "socket", "too-many")


def descriptors(lie: str) -> list[int]:
    if lie == "eventfd":
        return [os.eventfd(0)]
    if lie == "memfd":
        return [os.memfd_create("lie")]
    if lie == "file":
        return [tempfile.mkstemp()[0]]
    if lie == "socket":
        return [socket.socket().detach()]
    return [os.eventfd(0) for _ in range(200)]


def tell(sock: socket.socket, lie: str) -> None:
    if lie in BEFORE:
        sock.sendall(BEFORE[lie])
        return
    sock.sendall(hello())
    sock.recv(4)  # welcome
    if lie in AFTER:
        sock.sendall(AFTER[lie])
    elif lie in WITH_FDS:
        rights = array.array("i", descriptors(lie)).tobytes()
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)]
        sock.sendmsg([wire.encode(wire.Failed(1))], ancillary)
    else:
        assert lie == "silent"  # answers nothing at all


def main(path: str, lie: str) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.connect(path)
        tell(sock, lie)
        with suppress(ConnectionResetError):
            while sock.recv(65536):
                pass


LIES = (*BEFORE, *AFTER, *WITH_FDS, "silent")

if __name__ == "__main__":
    main(*sys.argv[1:])
