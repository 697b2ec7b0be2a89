"""Isolation of real processes: what they can no longer do, and what they still can."""

import ctypes
import fcntl
import mmap
import os
import platform
import resource
import select
import signal
import socket
import stat
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

from shm import Doorbell
from tests.netns import isolated
from tests.vbus.isolation.children import Steps, bystander, in_child, outcome
from vbus.isolation import (
    isolate,
    kernel,
    landlock,
    policy,
    seccomp,
)
from vbus.net import interface

SYSTEM_CALLS = {name: numbers[0] for name, numbers in policy.NUMBERS.items()}
pytestmark = [
    pytest.mark.skipif(platform.machine() != "x86_64", reason="x86-64's numbers"),
    pytest.mark.skipif(
        not landlock.abi() or not seccomp.available(),
        reason="this kernel has no Landlock, or no seccomp filters",
    ),
]


def system_call(name: str, *arguments: "int | ctypes.Structure | None") -> int:
    number = SYSTEM_CALLS[name]
    assert number is not None
    return kernel.syscall(number, *arguments)


def tried(steps: Steps, **isolation: object) -> dict[str, str]:
    """How each step goes in a process that was isolated first."""

    def work() -> dict[str, str]:
        isolate(**isolation)  # type: ignore[arg-type]
        return {name: outcome(step) for name, step in steps.items()}

    result = in_child(work)
    assert isinstance(result, dict)
    return result


# Files


def test_only_its_own_paths_can_be_opened(tmp_path: Path) -> None:
    """R60: read below `read`, write below `write`, nothing beside them."""
    for name in ("given", "own", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("content")
    given, own, other = (tmp_path / name for name in ("given", "own", "other"))
    (own / "way-out").symlink_to(other / "file")
    steps: Steps = {
        "read given": (given / "file").read_bytes,
        "list given": lambda: os.listdir(given),
        "write given": lambda: os.open(given / "file", os.O_WRONLY),
        "truncate given": lambda: os.truncate(given / "file", 0),
        "make in given": lambda: (given / "new").write_text("x"),
        "remove given": (given / "file").unlink,
        "write own": lambda: (own / "file").write_text("x"),
        "make in own": lambda: (own / "new").write_text("x"),
        "folder in own": (own / "folder").mkdir,
        "truncate own": lambda: os.truncate(own / "file", 0),
        "rename own": lambda: (own / "new").rename(own / "newer"),
        "move in own": lambda: (own / "newer").rename(own / "folder" / "newer"),
        "remove own": (own / "folder" / "newer").unlink,
        "node in own": lambda: os.mknod(own / "null", stat.S_IFCHR, os.makedev(1, 3)),
        "read other": (other / "file").read_bytes,
        "list other": lambda: os.listdir(other),
        "by a link": (own / "way-out").read_bytes,
        "by dots": (own / ".." / "other" / "file").read_bytes,
        "out of own": lambda: (own / "file").rename(other / "moved"),
        "truncate other": lambda: os.truncate(other / "file", 0),
        "passwords": Path("/etc/shadow").read_bytes,
        "devices": lambda: os.open("/dev/net/tun", os.O_RDWR),
    }
    assert tried(steps, read=[given], write=[own], required=True) == {
        "read given": "ok",
        "list given": "ok",
        "write given": "EACCES",
        "truncate given": "EACCES",
        "make in given": "EACCES",
        "remove given": "EACCES",
        "write own": "ok",
        "make in own": "ok",
        "folder in own": "ok",
        "truncate own": "ok",
        "rename own": "ok",
        "move in own": "ok" if landlock.abi() > 1 else "EXDEV",
        "remove own": "ok",
        "node in own": "EACCES",
        "read other": "EACCES",
        "list other": "EACCES",
        "by a link": "EACCES",
        "by dots": "EACCES",
        "out of own": "EXDEV" if landlock.abi() < 2 else "EACCES",
        "truncate other": "EACCES",
        "passwords": "EACCES",
        "devices": "EACCES",
    }
    assert (other / "file").read_text() == "content"


def test_a_single_file_can_be_given(tmp_path: Path) -> None:
    (tmp_path / "disk").write_text("content")
    (tmp_path / "other").write_text("content")
    steps: Steps = {
        "disk": lambda: (tmp_path / "disk").write_text("x"),
        "other": (tmp_path / "other").read_bytes,
        "new": lambda: (tmp_path / "new").write_text("x"),
    }
    expected = {"disk": "ok", "other": "EACCES", "new": "EACCES"}
    assert tried(steps, write=[tmp_path / "disk"]) == expected


# Other processes


class _Vector(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("size", ctypes.c_size_t))


def peek(pid: int) -> object:
    """process_vm_readv of 8 bytes that are mapped there: we forked it."""
    here = ctypes.create_string_buffer(8)
    local = _Vector(ctypes.addressof(here), 8)
    remote = _Vector(ctypes.addressof(_SECRET), 8)
    count = system_call("process_vm_readv", pid, local, 1, remote, 1, 0)
    assert count == 8
    assert here.raw == _SECRET.raw
    return here.raw


_SECRET = ctypes.create_string_buffer(b"secret!!", 8)


def read_memory(pid: int) -> object:
    with open(f"/proc/{pid}/mem", "rb") as memory:
        memory.seek(ctypes.addressof(_SECRET))
        return memory.read(8)


def take_memory(pid: int, fd: int) -> object:
    """Open the guest memory another process holds, by its descriptor there."""
    found = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR)
    try:
        return os.pread(found, 6, 0)
    finally:
        os.close(found)


def others(pid: int, memory: int) -> Steps:
    """All ways we know to another process's memory and files, and to harm it."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    return {
        "process_vm_readv": lambda: peek(pid),
        "/proc/PID/mem": lambda: read_memory(pid),
        "/proc/PID/maps": Path(f"/proc/{pid}/maps").read_bytes,
        "/proc/PID/fd": lambda: os.listdir(f"/proc/{pid}/fd"),
        "/proc/PID/fd/N": lambda: take_memory(pid, memory),
        "ptrace": lambda: system_call("ptrace", 0x4206, pid, 0, 0),
        "pidfd_open": lambda: system_call("pidfd_open", pid, 0),
        "kcmp": lambda: system_call("kcmp", pid, pid, 0, 0, 0),
        "prlimit": lambda: resource.prlimit(pid, resource.RLIMIT_NOFILE, limits),
        "signal": lambda: os.kill(pid, 0),
    }


@contextmanager
def guest_memory() -> Iterator[int]:
    """A memfd; the bystander that is forked next has it too, at the same number."""
    memory = os.memfd_create("guest")
    try:
        os.write(memory, b"secret")
        yield memory
    finally:
        os.close(memory)


def test_other_processes_are_out_of_reach() -> None:
    """R60: no memory, no descriptors, no signals: of a process of the same user."""
    with guest_memory() as memory, bystander() as pid:
        steps = others(pid, memory)
        free = in_child(lambda: {name: outcome(step) for name, step in steps.items()})
        assert isinstance(free, dict)
        assert set(free.values()) == {"ok"}, "the ways do work for who is not isolated"
        held = tried(steps)
    files = {name for name in held if name.startswith("/proc")}
    assert {held[name] for name in files} == {"EACCES"}
    assert {held[name] for name in held.keys() - files} == {"EPERM"}


@pytest.mark.skipif(landlock.abi() < 6, reason="Landlock's scopes came with ABI 6")
def test_landlock_alone_keeps_processes_apart_as_well() -> None:
    """Two walls: what the filter would stop is stopped without it too."""

    def work() -> dict[str, str]:
        kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
        with landlock.Ruleset(landlock.abi()) as rules:
            rules.restrict_self()
        steps = others(pid, memory)
        names = ("process_vm_readv", "/proc/PID/fd/N", "ptrace", "signal")
        return {name: outcome(steps[name]) for name in names}

    with guest_memory() as memory, bystander() as pid:
        assert in_child(work) == {
            "process_vm_readv": "EPERM",
            "/proc/PID/fd/N": "EACCES",
            "ptrace": "EPERM",
            "signal": "EPERM",
        }


def test_nothing_is_run_and_nothing_is_forked() -> None:
    steps: Steps = {
        "execve": lambda: os.execv("/bin/true", ["true"]),
        "execveat": lambda: system_call("execveat", -100, 0, 0, 0, 0),
        "fork": os.fork,
        "vfork": lambda: system_call("vfork"),
        "spawn": lambda: subprocess.run(["/bin/true"]),
    }
    assert set(tried(steps, read=[Path("/bin")]).values()) == {"EPERM"}


def test_ways_around_filters_and_out_of_the_box_are_closed() -> None:
    """io_uring makes calls no filter sees; the others reach the whole machine."""
    calls = "io_uring_setup userfaultfd perf_event_open bpf keyctl add_key mount"
    calls += " umount2 unshare setns chroot pivot_root init_module open_by_handle_at"
    calls += " reboot swapon syslog fsopen open_tree move_mount personality"

    def call(name: str) -> Callable[[], object]:
        return lambda: system_call(name, 0, 0, 0, 0)

    steps: Steps = {name: call(name) for name in calls.split()}
    assert set(tried(steps).values()) == {"EPERM"}


# Sockets


def test_no_socket_is_made_and_none_turned_elsewhere(tmp_path: Path) -> None:
    """R51: another guest's socket cannot be reached by its name."""
    path = str(tmp_path / "other.sock")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)

        def connect() -> None:
            socket.socket(socket.AF_UNIX).connect(path)

        steps: Steps = {
            "unix": connect,
            "tcp": lambda: socket.socket(socket.AF_INET),
            "netlink": lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW),
            "turned": lambda: pair[0].connect(path),
            "sent": lambda: pair[0].sendto(b"x", path),
            "datagrams": lambda: socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM),
            "streams": socket.socketpair,
        }
        found = tried(steps)
        for end in pair:
            end.close()
    assert found.pop("streams") == "ok"
    assert set(found.values()) == {"EPERM"}


@pytest.mark.skipif(landlock.abi() < 6, reason="Landlock's scopes came with ABI 6")
def test_with_sockets_only_abstract_names_of_others_are_closed(
    tmp_path: Path,
) -> None:
    """What the ABI allows to hold back is held back even then."""
    path, name = str(tmp_path / "s"), f"\0vbus-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as one, socket.socket(socket.AF_UNIX) as two:
        for listener, address in ((one, path), (two, name)):
            listener.bind(address)
            listener.listen()
        steps: Steps = {
            "path": lambda: socket.socket(socket.AF_UNIX).connect(path),
            "abstract": lambda: socket.socket(socket.AF_UNIX).connect(name),
        }
        found = tried(steps, sockets=True)
    assert found == {"path": "ok", "abstract": "EPERM"}


def test_sockets_to_listen_at_are_made_in_their_folder_only(tmp_path: Path) -> None:
    """R60: a console's port; who makes it cannot connect with it."""
    for name in ("own", "given", "other"):
        (tmp_path / name).mkdir()

    def listen(folder: str) -> None:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(str(tmp_path / folder / "port"))
            sock.listen()

    def connect() -> None:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(tmp_path / "own" / "port"))

    steps: Steps = {
        "own": lambda: listen("own"),
        "given": lambda: listen("given"),
        "other": lambda: listen("other"),
        "connect": connect,
        "datagrams": lambda: socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM),
        "file": (tmp_path / "own" / "file").touch,
        "remove": (tmp_path / "own" / "port").unlink,
    }
    found = tried(steps, write=[tmp_path / "given"], listen=[tmp_path / "own"])
    assert found == {
        "own": "ok",
        "given": "ok",
        "other": "EACCES",
        "connect": "EPERM",
        "datagrams": "EPERM",
        "file": "EACCES",
        "remove": "ok",
    }


@pytest.mark.net
@isolated
def test_a_socket_kept_for_interfaces_asks_and_sends_nothing() -> None:
    """R51: it is of a family that could send, to whom it likes."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sink:
        sink.bind(("127.0.0.1", 0))
        address = sink.getsockname()

        def send(sock: socket.socket) -> object:
            return sock.sendmsg([b"x"], [], 0, address)

        def work() -> dict[str, str]:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as plain:
                free = outcome(lambda: send(plain))
            interface.keep_socket()
            isolate()
            (kept,) = interface._kept
            return {
                "free": free,
                "kept": outcome(lambda: send(kept)),
                "mtu": outcome(lambda: interface.set_mtu("lo", 1400)),
                "down": outcome(lambda: interface.set_up("lo", False)),
            }

        assert in_child(work) == {
            "free": "ok",
            "kept": "EPIPE",
            "mtu": "ok",
            "down": "ok",
        }


# What a backend needs goes on


def check_memory(fd: int) -> None:
    with mmap.mmap(fd, 4096) as memory:
        memory[:4] = b"ring"
        assert memory[:4] == b"ring"


def check_eventfd(fd: int) -> None:
    os.eventfd_write(fd, 3)
    assert os.eventfd_read(fd) == 3


def check_epoll(fd: int) -> None:
    with select.epoll() as poll:
        poll.register(fd, select.EPOLLIN)
        os.eventfd_write(fd, 1)
        assert poll.poll(5) == [(fd, select.EPOLLIN)]
    os.eventfd_read(fd)


def check_thread() -> None:
    thread = threading.Thread(target=lambda: None)
    thread.start()
    thread.join()


def check_trio() -> None:
    async def main() -> None:
        doorbell = Doorbell()
        doorbell.ring()
        await doorbell.wait()
        await trio.to_thread.run_sync(lambda: None)

    trio.run(main)


def check_late_import() -> None:
    for name in ("wave", "_lsprof"):  # one of them compiled
        assert name not in sys.modules
        __import__(name)


def test_descriptors_of_before_and_passed_later_work() -> None:
    """Guest memory, eventfds, epoll, threads, trio, imports: the data path."""
    ours, theirs = socket.socketpair()
    memory, event = os.memfd_create("guest"), os.eventfd(0, os.EFD_NONBLOCK)
    os.ftruncate(memory, 4096)

    def receive() -> None:
        _, fds, _, _ = socket.recv_fds(ours, 1, 2)
        check_memory(fds[0])
        check_eventfd(fds[1])

    socket.send_fds(theirs, [b"x"], [memory, event])
    steps: Steps = {
        "memory": lambda: check_memory(memory),
        "eventfd": lambda: check_eventfd(event),
        "epoll": lambda: check_epoll(event),
        "passed": receive,
        "own memory": lambda: os.ftruncate(os.memfd_create("own"), 4096),
        "threads": check_thread,
        "trio": check_trio,
        "imports": check_late_import,
        "limits": lambda: resource.setrlimit(
            resource.RLIMIT_NOFILE, resource.getrlimit(resource.RLIMIT_NOFILE)
        ),
        "own signal": lambda: os.kill(os.getpid(), signal.SIGCONT),
        "abort": lambda: signal.raise_signal(signal.SIGCONT),
    }
    try:
        assert set(tried(steps).values()) == {"ok"}
    finally:
        for fd in (memory, event):
            os.close(fd)
        ours.close()
        theirs.close()


@pytest.mark.net
@isolated
def test_a_tap_that_was_opened_before_moves_frames() -> None:
    tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    try:
        name = b"vbus-iso%d"
        request = struct.pack("16sH22x", name, 0x1002)
        name = fcntl.ioctl(tap, 0x400454CA, request)[:16].rstrip(b"\0")
        with socket.socket() as control:  # up: SIOCSIFFLAGS
            flags = struct.pack("16sH22x", name, 0x43)
            fcntl.ioctl(control, 0x8914, flags)
        frame = bytes(12) + b"\x88\xb5" + bytes(60)
        steps: Steps = {
            "write": lambda: os.write(tap, frame),
            "carrier": lambda: fcntl.ioctl(tap, 0x400454E2, struct.pack("i", 1)),
            "another": lambda: os.open("/dev/net/tun", os.O_RDWR),
        }
        found = tried(steps)
    finally:
        os.close(tap)
    assert found == {"write": "ok", "carrier": "ok", "another": "EACCES"}
