"""TAP devices: an Ethernet interface of the kernel whose other side is a file of ours.

Opened with a vnet header before each frame, so that the kernel leaves segmentation and
checksums to whoever comes last: bulk TCP crosses in frames of up to 64 KiB.
"""

import contextlib
import fcntl
import ipaddress
import os
import struct
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

import trio

from ioq import AdaptiveSpin
from vbus.errors import NoDeviceError, PermissionDeniedError
from vbus.net import interface
from vbus.net._core import TapEnd
from vbus.net.mac import MacAddress

_TUNSETIFF: Final = 0x400454CA
_TUNGETIFF: Final = 0x800454D2
_TUNSETOFFLOAD: Final = 0x400454D0
_TUNSETVNETHDRSZ: Final = 0x400454D8
_TUNSETCARRIER: Final = 0x400454E2
_IFF_TAP: Final = 0x0002
_IFF_NO_PI: Final = 0x1000
_IFF_VNET_HDR: Final = 0x4000
_IFF_TUN_EXCL: Final = 0x8000
_CSUM, _TSO4, _TSO6, _TSO_ECN = 1, 2, 4, 8
_HEADER_SIZE: Final = 12


@dataclass(frozen=True)
class TapStatistics:
    """Frames from the kernel (in) and to it (out).

    `in_errors`: frames we could not use; `out_errors`: frames the kernel refused, as
    it does while the interface is down.
    """

    in_frames: int
    in_bytes: int
    in_errors: int
    out_frames: int
    out_bytes: int
    out_errors: int


def _open(name: str) -> tuple[int, str]:
    try:
        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise NoDeviceError("no /dev/net/tun; run as root: modprobe tun") from None
    except PermissionError:
        raise PermissionDeniedError("/dev/net/tun: permission denied") from None
    try:
        flags = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR | _IFF_TUN_EXCL
        request = struct.pack("16sH22x", name.encode(), flags)
        given = fcntl.ioctl(fd, _TUNSETIFF, request)[:16]
        fcntl.ioctl(fd, _TUNSETVNETHDRSZ, struct.pack("i", _HEADER_SIZE))
    except PermissionError:
        os.close(fd)
        raise PermissionDeniedError(
            f"cannot make a TAP {name}: CAP_NET_ADMIN is needed in this network"
            " namespace"
        ) from None
    except BaseException:
        os.close(fd)
        raise
    return fd, given.rstrip(b"\0").decode()


def _name_of(fd: int) -> str:
    """Give the name of an open TAP's interface. Raises OSError if it is none."""
    given = fcntl.ioctl(fd, _TUNGETIFF, bytes(40))[:16]
    return given.rstrip(b"\0").decode()


class Tap:
    """One TAP interface, made by opening and gone with close().

    `end` is its end of the hub (see `vbus.net._core`). The interface belongs to the
    network namespace it was opened in; configure it from there.
    """

    def __init__(
        self,
        name: str = "tap%d",
        *,
        offload: bool = True,
        spin: AdaptiveSpin | None = None,
        fd: int | None = None,
    ) -> None:
        """Make the interface, `%d` standing for a free number.

        With `fd`, the descriptor of an earlier Tap, which becomes ours: that interface.
        Without `offload` only plain frames come out, none longer than the MTU. Raises
        NoDeviceError, PermissionDeniedError, or the kernel's OSError (EBUSY: taken).
        """
        self._fd, self.name = _open(name) if fd is None else (fd, _name_of(fd))
        self._spin = spin
        self.end = TapEnd(self._fd, _HEADER_SIZE)
        features = _CSUM | _TSO4 | _TSO6 | _TSO_ECN if offload else 0
        fcntl.ioctl(self._fd, _TUNSETOFFLOAD, features)

    def fileno(self) -> int:
        """The fd, still owned by the Tap; -1 once closed."""
        return self._fd

    def configure(
        self,
        *,
        mac: MacAddress | None = None,
        mtu: int | None = None,
        address: ipaddress.IPv4Interface | None = None,
        up: bool | None = None,
    ) -> None:
        """Set what is given, in an order the kernel accepts. Raises OSError."""
        if mac is not None:
            interface.set_mac(self.name, mac)
        if mtu is not None:
            interface.set_mtu(self.name, mtu)
        if address is not None:
            interface.set_address(self.name, address)
        if up is not None:
            interface.set_up(self.name, up)

    def set_carrier(self, on: bool) -> None:
        """Tell the kernel whether the other side is there."""
        fcntl.ioctl(self._fd, _TUNSETCARRIER, struct.pack("i", on))

    @property
    def mac(self) -> MacAddress:
        """The interface's hardware address."""
        return interface.get_mac(self.name)

    async def wait(self) -> None:
        """Wait until a frame can be read: a checkpoint if it has to.

        `trio.ClosedResourceError` once closed.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        if self._fd < 0:
            raise trio.ClosedResourceError
        if self.end.ready(0):
            return
        start = time.perf_counter_ns()
        if self._spin is None or not await self._spin.look(self.end.ready):
            await trio.lowlevel.wait_readable(self._fd)
        if self._spin is not None:
            self._spin.learn(time.perf_counter_ns() - start)

    def statistics(self) -> TapStatistics:
        """A snapshot of the counters."""
        return TapStatistics(*self.end._counters())

    def close(self) -> None:
        """Remove the interface; a task in `wait` gets ClosedResourceError."""
        if self._fd < 0:
            return
        fd, self._fd = self._fd, -1
        self.end = TapEnd(-1, _HEADER_SIZE)
        with contextlib.suppress(RuntimeError):  # no trio run, so no task waits
            trio.lowlevel.notify_closing(fd)
        os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
