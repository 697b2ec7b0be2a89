"""Configure a network interface of this process's network namespace, by ioctl.

Only what a TAP of ours needs: address, MTU, state. Errors are the kernel's OSError.
"""

import contextlib
import fcntl
import ipaddress
import socket
import struct
from typing import Final

from vbus.errors import InvalidError
from vbus.net.mac import MacAddress

_SIOCGIFFLAGS: Final = 0x8913
_SIOCSIFFLAGS: Final = 0x8914
_SIOCSIFADDR: Final = 0x8916
_SIOCSIFNETMASK: Final = 0x891C
_SIOCGIFMTU: Final = 0x8921
_SIOCSIFMTU: Final = 0x8922
_SIOCSIFHWADDR: Final = 0x8924
_SIOCGIFHWADDR: Final = 0x8927
_IFF_UP: Final = 1
_ARPHRD_ETHER: Final = 1
_IFREQ_SIZE: Final = 40
_NAME_SIZE: Final = 16


def check_name(name: str) -> str:
    """Give back a name the kernel takes for an interface. Raises InvalidError."""
    wrong = not name or len(name.encode()) >= _NAME_SIZE or name in (".", "..")
    if wrong or any(c in "/:%" or c.isspace() for c in name):
        raise InvalidError(f"{name!r} cannot name a network interface")
    return name


def parse_address(text: str) -> ipaddress.IPv4Interface:
    """Read 10.0.0.1/24. Raises InvalidError."""
    try:
        return ipaddress.IPv4Interface(text)
    except ValueError as error:
        raise InvalidError(
            f"{text!r} is no IPv4 address with prefix: {error}"
        ) from None


_kept: list[socket.socket] = []


def keep_socket() -> None:
    """Keep a socket to ask the kernel by, for when none can be made any more.

    It cannot send. Raises OSError.
    """
    if not _kept:
        sock = _socket()
        # Linux shuts it down even where it says that there is no connection.
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)
        _kept.append(sock)


def _socket() -> socket.socket:
    return socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)


def _ioctl(request: int, name: str, payload: bytes = b"") -> bytes:
    packet = name.encode().ljust(_NAME_SIZE, b"\0") + payload
    with contextlib.ExitStack() as stack:
        sock = _kept[0] if _kept else stack.enter_context(_socket())
        answer = fcntl.ioctl(sock, request, packet.ljust(_IFREQ_SIZE, b"\0"))
    return answer[_NAME_SIZE:]


def get_mac(name: str) -> MacAddress:
    """Ask for the hardware address."""
    return MacAddress(_ioctl(_SIOCGIFHWADDR, name)[2:8])


def set_mac(name: str, mac: MacAddress) -> None:
    """Set the hardware address."""
    _ioctl(_SIOCSIFHWADDR, name, struct.pack("<H6s", _ARPHRD_ETHER, mac))


def get_mtu(name: str) -> int:
    """Ask for the MTU."""
    return int(struct.unpack_from("<i", _ioctl(_SIOCGIFMTU, name))[0])


def set_mtu(name: str, mtu: int) -> None:
    """Set the MTU, without the 14 bytes of the Ethernet header."""
    _ioctl(_SIOCSIFMTU, name, struct.pack("<i", mtu))


def is_up(name: str) -> bool:
    """Ask whether the interface is up (its carrier is another thing)."""
    flags = struct.unpack_from("<H", _ioctl(_SIOCGIFFLAGS, name))[0]
    return bool(flags & _IFF_UP)


def set_up(name: str, up: bool = True) -> None:
    """Take the interface up or down."""
    flags = struct.unpack_from("<H", _ioctl(_SIOCGIFFLAGS, name))[0]
    wanted = flags | _IFF_UP if up else flags & ~_IFF_UP
    _ioctl(_SIOCSIFFLAGS, name, struct.pack("<H", wanted))


def set_address(name: str, address: ipaddress.IPv4Interface) -> None:
    """Set the IPv4 address and network mask."""
    for request, value in (
        (_SIOCSIFADDR, address.ip),
        (_SIOCSIFNETMASK, address.netmask),
    ):
        _ioctl(request, name, struct.pack("<H2x4s", socket.AF_INET, value.packed))
