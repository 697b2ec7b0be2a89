"""A tiny guest through /dev/kvm: a loop of one instruction, run and timed.

32-bit protected mode, flat, no paging, 64 KiB of memory at address 0; it ends with HLT.
No devices, no interrupts, no operating system: it is for timing exits and nothing else.
"""

import errno
import os
import signal
import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from fcntl import ioctl
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, MAP_SHARED, mmap
from types import FrameType, TracebackType
from typing import Self

from vbus.errors import CallTimeoutError, NoDeviceError, ProtocolError

# linux/kvm.h, x86-64.
_API_VERSION = 12
_GET_API_VERSION, _CREATE_VM, _GET_VCPU_MMAP_SIZE = 0xAE00, 0xAE01, 0xAE04
_CREATE_VCPU, _SET_TSS_ADDR, _RUN = 0xAE41, 0xAE47, 0xAE80
_SET_USER_MEMORY_REGION, _IOEVENTFD = 0x4020AE46, 0x4040AE79
_SET_REGS, _GET_SREGS, _SET_SREGS = 0x4090AE82, 0x8138AE83, 0x4138AE84
_SREGS_SIZE, _CR0_AT, _SEGMENT_SIZE = 312, 224, 24
_CODE, _DATA = (0,), (1, 2, 3, 4, 5)
_SEGMENT = struct.Struct("<QIH10B")
_REGS = struct.Struct("<18Q")
_REGION = struct.Struct("<IIQQQ")
_IOEVENT = struct.Struct("<QQIiI36x")
_PIO_FLAG = 2
_EXIT_REASON_AT = 8

EXIT_IO, EXIT_HLT, EXIT_MMIO = 2, 5, 6
MEMORY = 64 << 10
CODE_AT = 0x1000
# Where no memory is, so that KVM has to ask somebody.
PORT, PORT_EVENTFD = 0x510, 0x520
MMIO, MMIO_EVENTFD = 0xD000_0000, 0xD000_1000
MAPPED = 0x8000
_TSS_AT = 0x7000_0000
_WITHIN_S = 10.0


def loop(body: bytes) -> bytes:
    """Give code that runs `body` ECX times and halts."""
    decrement = b"\x49"
    back = len(body) + len(decrement) + 2
    return body + decrement + b"\x75" + struct.pack("b", -back) + b"\xf4"


class TinyGuest:
    """One VM with one vCPU; a context manager that closes all it opened.

    Raises NoDeviceError if there is no KVM to be had here, saying why.
    """

    def __init__(self, path: str = "/dev/kvm") -> None:
        self._owned = ExitStack()
        try:
            self._open(path)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close descriptors and mappings."""
        self._owned.close()

    def prepare(self, code: bytes, count: int, *, edx: int = 0, edi: int = 0) -> None:
        """Put in code and registers; EAX holds a hypercall number nobody answers."""
        self._memory[CODE_AT : CODE_AT + len(code)] = code
        values = [0xFFFF, 0, count, edx, 0, edi, *([0] * 10), CODE_AT, 2]
        ioctl(self._vcpu, _SET_REGS, _REGS.pack(*values))

    def run(self, exits: int, reason: int) -> None:
        """Run through so many exits of one kind, and to the halt.

        Raises ProtocolError at any other exit, CallTimeoutError after ten seconds.
        """
        vcpu, command = self._vcpu, _RUN
        with _deadline(_WITHIN_S):
            for _ in range(exits):
                ioctl(vcpu, command)
            self._expect(reason, exits)
            ioctl(vcpu, command)
            self._expect(EXIT_HLT, 1)

    def idle(self, calls: int) -> None:
        """Enter the kernel as often as `run` with the cheapest request there is."""
        kvm, command = self._kvm, _GET_API_VERSION
        for _ in range(calls):
            ioctl(kvm, command)

    def rung(self) -> int:
        """Give how often the eventfds were written since it was asked last."""
        total = 0
        for descriptor in self._eventfds:
            try:
                total += os.eventfd_read(descriptor)
            except BlockingIOError:
                continue
        return total

    def _open(self, path: str) -> None:
        self._kvm = self._own(_open_kvm(path))
        version = ioctl(self._kvm, _GET_API_VERSION)
        if version != _API_VERSION:
            raise NoDeviceError(f"{path} has API version {version}, not 12")
        self._vm = self._own(ioctl(self._kvm, _CREATE_VM))
        ioctl(self._vm, _SET_TSS_ADDR, _TSS_AT)
        memory = mmap(-1, MEMORY, flags=MAP_PRIVATE | MAP_ANONYMOUS)
        self._memory = self._owned.enter_context(memory)
        self._memory[MAPPED : MAPPED + 4096] = b"\xff" * 4096
        region = _REGION.pack(0, 0, 0, MEMORY, _address(memory))
        ioctl(self._vm, _SET_USER_MEMORY_REGION, region)
        self._vcpu = self._own(ioctl(self._vm, _CREATE_VCPU, 0))
        size = ioctl(self._kvm, _GET_VCPU_MMAP_SIZE)
        self._run = self._owned.enter_context(mmap(self._vcpu, size, flags=MAP_SHARED))
        self._enter_protected_mode()
        self._eventfds = [
            self._eventfd(PORT_EVENTFD, _PIO_FLAG),
            self._eventfd(MMIO_EVENTFD, 0),
        ]

    def _own(self, descriptor: int) -> int:
        self._owned.callback(os.close, descriptor)
        return descriptor

    def _eventfd(self, address: int, flags: int) -> int:
        made = self._own(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
        ioctl(self._vm, _IOEVENTFD, _IOEVENT.pack(0, address, 2, made, flags))
        return made

    def _enter_protected_mode(self) -> None:
        sregs = bytearray(_SREGS_SIZE)
        ioctl(self._vcpu, _GET_SREGS, sregs)
        for which, kind in ((_CODE, 0xB), (_DATA, 0x3)):
            for index in which:
                # type, present, dpl, db, s, l, g, avl, unusable, padding
                flat = (0, 0xFFFF_FFFF, 8, kind, 1, 0, 1, 1, 0, 1, 0, 0, 0)
                _SEGMENT.pack_into(sregs, index * _SEGMENT_SIZE, *flat)
        sregs[_CR0_AT] |= 1
        ioctl(self._vcpu, _SET_SREGS, bytes(sregs))

    def _expect(self, reason: int, exits: int) -> None:
        [found] = struct.unpack_from("<I", self._run, _EXIT_REASON_AT)
        if exits and found != reason:
            raise ProtocolError(f"the tiny guest left KVM with exit {found}")


_WHY = {
    errno.ENOENT: "this machine has no KVM, or its module is not loaded",
    errno.EACCES: "your user may not use it: join the group 'kvm'",
}


def _open_kvm(path: str) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        why = _WHY.get(error.errno or 0, error.strerror)
        raise NoDeviceError(f"{path}: {why}") from None


def _address(memory: mmap) -> int:
    """Give where a mapping lies in this process."""
    from ctypes import addressof, c_char

    first = c_char.from_buffer(memory)
    try:
        return addressof(first)
    finally:
        del first


@contextmanager
def _deadline(seconds: float) -> Iterator[None]:
    """Get out of KVM_RUN after so long: a signal makes the kernel leave the guest."""

    def late(number: int, frame: FrameType | None) -> None:
        raise CallTimeoutError(f"the tiny guest did not end in {seconds:g} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
