"""The commands of virtio-net's control queue (virtio 1.2, 5.1.6.5)."""

import struct
from enum import IntEnum
from typing import TYPE_CHECKING, Final

from vbus.errors import InvalidError, VbusError
from vbus.net import MacAddress
from vbus.virtio.net import Feature

if TYPE_CHECKING:
    from backends.virtio.net import VirtioNet

OK: Final = 0
ERR: Final = 1
_EXTRA: Final = 2
"""From this receive mode on, CTRL_RX_EXTRA."""


class Class(IntEnum):
    """The first byte."""

    RX = 0
    MAC = 1
    VLAN = 2
    ANNOUNCE = 3
    MQ = 4


_TABLE_SET, _ADDR_SET = 0, 1
_PAIRS_SET = 0


def answer(net: "VirtioNet", request: bytes) -> int:
    """Do a command of at least 2 bytes: OK or ERR. A refused one changes nothing."""
    try:
        _do(net, request[0], request[1], request[2:])
    except VbusError:
        return ERR
    return OK


def _need(net: "VirtioNet", feature: Feature) -> None:
    if not net.has(feature):
        raise InvalidError(f"{feature.name} was not negotiated")


def _do(net: "VirtioNet", kind: int, command: int, data: bytes) -> None:
    if kind == Class.RX:
        _need(net, Feature.CTRL_RX_EXTRA if command >= _EXTRA else Feature.CTRL_RX)
        net.filter.set_mode(command, data)
    elif kind == Class.MAC and command == _TABLE_SET:
        _need(net, Feature.CTRL_RX)
        net.filter.set_table(data)
    elif kind == Class.MAC and command == _ADDR_SET:
        _need(net, Feature.CTRL_MAC_ADDR)
        net.set_mac(MacAddress(data))
    elif kind == Class.MQ and command == _PAIRS_SET:
        _need(net, Feature.MQ)
        _set_pairs(net, data)
    else:  # among them VLAN filters, which we do not offer
        raise InvalidError(f"no command {kind}.{command}")


def _set_pairs(net: "VirtioNet", data: bytes) -> None:
    pairs = struct.unpack("<H", data)[0] if len(data) == 2 else 0
    if not 1 <= pairs <= net.max_pairs:
        raise InvalidError(f"{pairs} queue pairs are not between 1 and {net.max_pairs}")
    net.active_pairs = pairs
