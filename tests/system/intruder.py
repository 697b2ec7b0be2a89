"""A device that was broken into: it tries whatever its guest tells it to.

Its guest names the victims, and gets the errno of each attempt, or "ok".
"""

import ctypes
import json
import os
import signal
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.vbus.isolation.children import Steps, outcome
from vbus.device import Connection, Device, call
from vbus.isolation import kernel, policy

_SEIZE, _INTERRUPT, _DETACH = 0x4206, 0x4207, 17
_WALL = 0x40000000
_WORD = 8


class _Vector(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("size", ctypes.c_size_t))


def _call(name: str, *arguments: "int | ctypes.Structure | None") -> int:
    machine = policy.this_machine()
    assert machine is not None
    number = policy.NUMBERS[name][machine.column]
    assert number is not None
    return kernel.syscall(number, *arguments)


def _copy(call: str, pid: int, address: int) -> None:
    """process_vm_readv, or what was just read back by process_vm_writev."""
    word = ctypes.create_string_buffer(_WORD)
    here = _Vector(ctypes.addressof(word), _WORD)
    there = _Vector(address, _WORD)
    if call == "process_vm_writev":
        _call("process_vm_readv", pid, here, 1, there, 1, 0)
    assert _call(call, pid, here, 1, there, 1, 0) == _WORD


def _memory(pid: int, address: int, flags: int) -> None:
    fd = os.open(f"/proc/{pid}/mem", flags)
    try:
        os.pread(fd, _WORD, address)
    finally:
        os.close(fd)


def _reopen(pid: int, fd: int) -> None:
    os.close(os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR))


def _take(pid: int, fd: int) -> None:
    held = os.pidfd_open(pid)
    try:
        os.close(_call("pidfd_getfd", held, fd, 0))
    finally:
        os.close(held)


def _trace(pid: int) -> None:
    _call("ptrace", _SEIZE, pid, 0, 0)
    _call("ptrace", _INTERRUPT, pid, 0, 0)
    os.waitpid(pid, _WALL)
    _call("ptrace", _DETACH, pid, 0, 0)


def against(pid: int, address: int, fd: int) -> Steps:
    """Reach a process: a word of its memory, the memory file it holds as `fd`."""
    return {
        "process_vm_readv": lambda: _copy("process_vm_readv", pid, address),
        "process_vm_writev": lambda: _copy("process_vm_writev", pid, address),
        "/proc/PID/mem": lambda: _memory(pid, address, os.O_RDWR),
        "/proc/PID/maps": Path(f"/proc/{pid}/maps").read_bytes,
        "/proc/PID/fd": lambda: _reopen(pid, fd),
        "pidfd_getfd": lambda: _take(pid, fd),
        "ptrace": lambda: _trace(pid),
        "signal": lambda: os.kill(pid, signal.SIGCONT),
    }


def with_file(path: str) -> Steps:
    """Reach a file, and the folder it lies in."""
    file = Path(path)
    return {
        "read": file.read_bytes,
        "write": lambda: os.close(os.open(file, os.O_WRONLY)),
        "truncate": lambda: os.truncate(file, 1),
        "rename": lambda: file.rename(file),
        "list": lambda: os.listdir(file.parent),
        "make": lambda: file.with_name("made").write_text("x"),
        "remove": file.with_name("doomed").unlink,
    }


def _connect(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(path)


def with_socket(path: str) -> Steps:
    return {"connect": lambda: _connect(path)}


def privileges() -> Steps:
    """Run something, become something, or get out of the box."""
    return {
        "run": lambda: subprocess.run(["/bin/true"], check=True),
        "fork": _fork,
        "namespace": lambda: _call("unshare", 0),
        "udp": lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).close(),
    }


def _fork() -> None:
    pid = os.fork()
    if not pid:
        os._exit(0)
    os.waitpid(pid, 0)


_TRIES: dict[str, Callable[..., Steps]] = {
    "against": against,
    "file": with_file,
    "socket": with_socket,
    "privileges": privileges,
}


class Intruder(Device):
    """Call 0 takes {"try": NAME, ...} as JSON, and pads what it gives with spaces."""

    type = "org.vbus.test.intruder"
    max_connections = 4

    @call(0)
    def attempt(self, connection: Connection, data: bytes) -> bytes:
        said: dict[str, Any] = json.loads(data)
        steps = _TRIES[said.pop("try")](**said)
        found = {name: outcome(step) for name, step in steps.items()}
        return json.dumps(found).encode().ljust(len(data))
