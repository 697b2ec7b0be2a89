"""Network namespaces for tests that need real interfaces.

    @isolated
    async def test_frames_reach_the_tap() -> None: ...

runs the test in a forked child with a network namespace of its own, where it may do
what it likes: as root, or where user namespaces are permitted as anyone. Inside,
`Netns` makes further namespaces and enters them. Nothing outlives the child.
"""

import ctypes
import errno
import functools
import inspect
import os
import pickle
import socket
import sys
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import Any, TypeVar

import pytest
import trio

from vbus.net import interface

T = TypeVar("T")
_CLONE_NEWUSER = 0x10000000
_CLONE_NEWNET = 0x40000000
_IFF_RUNNING = 0x40
_libc = ctypes.CDLL(None, use_errno=True)


def _unshare(flags: int) -> None:
    if _libc.unshare(flags):
        number = ctypes.get_errno()
        raise OSError(number, f"unshare: {os.strerror(number)}")


def _isolate() -> None:
    """Put this process into a fresh network namespace, as root if need be."""
    uid, gid = os.geteuid(), os.getegid()
    try:
        _unshare(_CLONE_NEWNET)
    except PermissionError:
        _unshare(_CLONE_NEWUSER | _CLONE_NEWNET)
        for file, text in (
            ("setgroups", "deny"),
            ("uid_map", f"0 {uid} 1"),
            ("gid_map", f"0 {gid} 1"),
        ):
            with open(f"/proc/self/{file}", "w") as out:
                out.write(text)
    interface.set_up("lo")


class Netns:
    """A network namespace; `with` it, this thread is inside."""

    def __init__(self) -> None:
        self._outside: list[int] = []
        home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            _unshare(_CLONE_NEWNET)
            self.fd = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
            interface.set_up("lo")
        finally:
            _enter(home)
            os.close(home)

    def __enter__(self) -> "Netns":
        home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        self._outside.append(home)
        _enter(self.fd)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        home = self._outside.pop()
        _enter(home)
        os.close(home)

    def socket(self, kind: socket.SocketKind, protocol: int = 0) -> socket.socket:
        """An IPv4 socket of that namespace, to be used from anywhere."""
        with self:
            return socket.socket(socket.AF_INET, kind, protocol)


def _enter(fd: int) -> None:
    if _libc.setns(fd, _CLONE_NEWNET):
        number = ctypes.get_errno()
        raise OSError(number, f"setns: {os.strerror(number)}")


def run_isolated(function: Callable[[], T]) -> T:
    """Run in a forked child with a network of its own; skips where that is refused.

    What the function returns or raises comes back (if it can be pickled).
    """
    readable, writable = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(readable)
        _run_child(function, writable)
    os.close(writable)
    with os.fdopen(readable, "rb") as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    assert answer, "the isolated child died"
    kind, value, trace = pickle.loads(answer)
    if kind == "refused":
        pytest.skip(f"no network namespace: {value}")
    if kind == "raised":
        sys.stderr.write(trace)
        raise value
    result: T = value
    return result


def _run_child(function: Callable[[], object], writable: int) -> None:
    """Never returns: the child must not go on as a second pytest."""
    try:
        try:
            _isolate()
            tun = os.open("/dev/net/tun", os.O_RDWR)
            os.close(tun)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EACCES, errno.ENOENT):
                raise
            answer: tuple[str, Any, str] = ("refused", str(error), "")
        else:
            answer = ("returned", function(), "")
    except BaseException as error:
        answer = ("raised", error, traceback.format_exc())
    try:
        data = pickle.dumps(answer)
        pickle.loads(data)
    except Exception:
        data = pickle.dumps(("raised", AssertionError(repr(answer[1])), answer[2]))
    with os.fdopen(writable, "wb") as pipe:
        pipe.write(data)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


async def carrier_becomes(name: str, on: bool) -> None:
    """Wait until an interface has, or has not, its carrier: the kernel takes time."""
    with trio.fail_after(5):
        while _running(name) != on:  # noqa: ASYNC110 - the kernel sets no event
            await trio.sleep(0.01)


def _running(name: str) -> bool:
    flags = interface._ioctl(interface._SIOCGIFFLAGS, name)
    return bool(flags[0] & _IFF_RUNNING)


def isolated(test: Callable[..., Any]) -> Callable[..., None]:
    """Run a test, plain or async (under trio), in a network namespace of its own."""

    @functools.wraps(test)
    def wrapper(*args: Any, **kwargs: Any) -> None:
        call = functools.partial(test, *args, **kwargs)
        if inspect.iscoroutinefunction(test):
            call = functools.partial(trio.run, call)
        run_isolated(call)

    # pytest looks through __wrapped__ and would take it for a coroutine function.
    wrapper.__signature__ = inspect.signature(test)  # type: ignore[attr-defined]
    del wrapper.__wrapped__  # type: ignore[attr-defined]
    return pytest.mark.net(wrapper)
