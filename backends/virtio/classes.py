"""Classes "virtio-blk", "virtio-net", "virtio-console" and "virtio-rng".

Each makes its model in `setup` and runs it in `serve`. A guest reaches it over the bus
(`adapter`) or as a PCI function of its own, one of them at a time.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

import trio

from backends.venet.base import parse_mac, parse_mtu
from backends.venet.port import find_switch
from backends.venet.session import SPIN_US, parse_spin
from backends.venet.tap import open_tap, parse_ifname, parse_tap_address
from backends.virtio.adapter import AdapterStatistics, VirtioOnBus
from backends.virtio.blk import BlkStatistics, VirtioBlk
from backends.virtio.channels import Channel, LogFile, Pty, UnixSocket
from backends.virtio.console import MAX_PORTS, ConsoleStatistics, Port, VirtioConsole
from backends.virtio.device import VirtioStatistics
from backends.virtio.image import DiskImage
from backends.virtio.net import MAX_PAIRS, NetStatistics, VirtioNet
from backends.virtio.netport import SwitchPort, TapPort
from backends.virtio.rng import RngStatistics, VirtioRng
from vbus.device import Host, attribute
from vbus.errors import InvalidError
from vbus.net import MacAddress
from vbus.virtio.blk import SECTOR

_Words: TypeAlias = tuple[str, ...]
_UNITS: Final = {"K": 10, "M": 20, "G": 30, "T": 40}
_SERIAL_LIMIT: Final = 20
_MAX_QUEUES: Final = 64
_ONE_PTY: Final[_Words] = ("pty",)
_UNNAMED: Final[_Words] = ()


@dataclass(frozen=True)
class DeviceStatistics:
    """The virtio device's life, what it did, and what crossed the bus for it."""

    device: VirtioStatistics
    adapter: AdapterStatistics
    io: BlkStatistics | NetStatistics | ConsoleStatistics | RngStatistics


_Io = BlkStatistics | NetStatistics | ConsoleStatistics | RngStatistics


@dataclass(frozen=True)
class ConsoleDeviceStatistics(DeviceStatistics):
    """Of a console; `places` is where each port is, terminals with their names."""

    places: tuple[str, ...]


def _statistics(device: VirtioOnBus, io: _Io) -> DeviceStatistics:
    return DeviceStatistics(device.model.statistics(), device.adapter_statistics(), io)


def parse_size(value: object) -> int:
    """Take bytes, or their text with K, M, G or T behind it; whole sectors."""
    text = str(value).strip().upper()
    shift = _UNITS.get(text[-1:], 0)
    size = int(text[:-1] if shift else text, 0) << shift
    if size < 0 or size % SECTOR:
        raise InvalidError(f"{size} bytes are not whole sectors of {SECTOR}")
    return size


def _parse_cache(value: object) -> str:
    if value not in ("writeback", "writethrough"):
        raise InvalidError(f"{value!r} is neither writeback nor writethrough")
    return str(value)


def _parse_serial(value: object) -> str:
    serial = str(value)
    if not serial.isascii() or len(serial) > _SERIAL_LIMIT:
        raise InvalidError(f"{serial!r} is not at most {_SERIAL_LIMIT} ASCII letters")
    return serial


def _parse_queues(value: object) -> int:
    return _between(value, 1, _MAX_QUEUES)


def _parse_pairs(value: object) -> int:
    return _between(value, 1, MAX_PAIRS)


def _between(value: object, least: int, most: int) -> int:
    number = int(str(value))
    if not least <= number <= most:
        raise InvalidError(f"{number} is not between {least} and {most}")
    return number


def _parse_rate(value: object) -> int:
    return _between(value, 0, 1 << 40)


def _parse_words(value: object) -> tuple[str, ...]:
    """Take a list, or words with commas between them."""
    if isinstance(value, str):
        value = value.split(",")
    if not isinstance(value, Iterable):
        raise InvalidError(f"{value!r} is neither text nor a list")
    return tuple(str(word).strip() for word in value)


def _parse_terminal(value: object) -> str:
    """Take columns and rows, as 80x25."""
    columns, times, rows = str(value).partition("x")
    if not times:
        raise InvalidError(f"{value!r} is not COLUMNSxROWS")
    return f"{_between(columns, 1, 0xFFFF)}x{_between(rows, 1, 0xFFFF)}"


def _columns_and_rows(terminal: str) -> tuple[int, int]:
    columns, rows = terminal.split("x")
    return int(columns), int(rows)


def _parse_places(value: object) -> tuple[str, ...]:
    places = _parse_words(value)
    for place in places:
        kind, _, path = place.partition(":")
        if place != "pty" and not (kind in ("unix", "log") and path):
            raise InvalidError(f"{place!r} is not pty, unix:PATH or log:PATH")
    if not 1 <= len(places) <= MAX_PORTS:
        raise InvalidError(f"{len(places)} ports are not between 1 and {MAX_PORTS}")
    return places


class VirtioBlkDevice(VirtioOnBus):
    """A disk: a file, or a block device of the host."""

    path = attribute(str, doc="the image: a file, or a block device")
    size = attribute(
        parse_size,
        default=0,
        writable=True,
        doc="bytes (or 512M, 2G): make a file of that size if there is none; can grow",
    )
    serial = attribute(_parse_serial, default="", doc="at most 20 letters")
    queues = attribute(_parse_queues, default=1, doc="request queues")
    cache = attribute(
        _parse_cache,
        default="writeback",
        doc="writethrough: each write is on the medium when it is answered",
    )
    readonly = attribute(bool, default=False, doc="refuse writes")
    discard = attribute(bool, default=True, doc="let the guest punch holes")

    model: VirtioBlk

    def setup(self) -> None:
        path = Path(self.path)
        if self.size and not self.readonly:
            _make_image(path, self.size)
        image = DiskImage(path, read_only=self.readonly)
        try:
            self._check_size(image)
            self.model = VirtioBlk(
                image,
                serial=self.serial or self.name[:_SERIAL_LIMIT],
                queues=self.queues,
                write_cache=self.cache == "writeback",
                discard=self.discard,
            )
        except BaseException:
            image.close()
            raise

    def _check_size(self, image: DiskImage) -> None:
        found = image.sectors() * SECTOR
        if self.size and self.size != found:
            raise InvalidError(f"{self.path} has {found} bytes, not {self.size}")
        self.size = found

    def attribute_changed(self, name: str) -> None:
        image = self.model.image
        if image.read_only or image.is_block_device:
            raise InvalidError(f"{self.path} cannot grow from here")
        if self.size < image.sectors() * SECTOR:
            raise InvalidError(f"{self.path} cannot shrink to {self.size} bytes")
        try:
            os.truncate(image.fileno(), self.size)
        except OSError as error:
            raise InvalidError(f"{self.path}: {error.strerror}") from None
        self.model.resized()

    def released(self) -> None:
        self.model.image.close()

    def statistics(self) -> DeviceStatistics:
        """A snapshot of the counters."""
        return _statistics(self, self.model.io_statistics())


def _make_image(path: Path, size: int) -> None:
    """Make a file of that size, all holes, unless there is one."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o640)
    except FileExistsError:
        return
    except OSError as error:
        raise InvalidError(f"cannot make {path}: {error.strerror}") from None
    try:
        os.ftruncate(fd, size)
    except OSError as error:
        path.unlink()
        raise InvalidError(f"{path}: {size} bytes: {error.strerror}") from None
    finally:
        os.close(fd)


class VirtioNetDevice(VirtioOnBus):
    """A network card: on a port of a switch, where its address stays reserved, or with
    a TAP of the host to itself."""

    switch = attribute(str, default="", doc="name of the switch")
    ifname = attribute(
        parse_ifname, default="", doc="instead of a switch: the TAP's name"
    )
    address = attribute(
        parse_tap_address, default="", doc="the TAP's IPv4 address with prefix"
    )
    host_mac = attribute(parse_mac, default="", doc="the TAP's hardware address")
    spin_us = attribute(parse_spin, default=SPIN_US, doc="the TAP's; see class venet")
    mac = attribute(
        parse_mac, default="", doc="made from the device's name if not given"
    )
    mtu = attribute(parse_mtu, default=1500, doc="without the Ethernet header")
    pairs = attribute(_parse_pairs, default=1, doc="pairs of queues")

    model: VirtioNet

    def __init__(self, name: str, host: Host, /, **attributes: object) -> None:
        super().__init__(name, host, **attributes)
        if not self.mac:
            self.mac = str(MacAddress.from_name(name))
        if not self.host_mac:
            self.host_mac = str(MacAddress.from_name(f"{name}/host"))

    def setup(self) -> None:
        if bool(self.switch) == bool(self.ifname):
            raise InvalidError("a card is on a switch, or has a TAP named by ifname")
        self._port: SwitchPort | TapPort
        if self.switch:
            self._port = SwitchPort(self.name, find_switch(self, self.switch))
        else:
            self._port = TapPort(open_tap(self, self.ifname, up=bool(self.address)))
        address = MacAddress.parse(self.mac)
        self.model = VirtioNet(self._port, address, mtu=self.mtu, pairs=self.pairs)
        self._port.plug(self.model)

    async def serve(self) -> None:
        if isinstance(self._port, SwitchPort):
            await super().serve()
            return
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._port.run)
            await super().serve()

    def teardown(self) -> None:
        super().teardown()
        self._port.unplug()

    def statistics(self) -> DeviceStatistics:
        """A snapshot of the counters."""
        return _statistics(self, self.model.io_statistics())


class VirtioConsoleDevice(VirtioOnBus):
    """A console, or several ports: each goes to a pty, a Unix socket or a log file."""

    to = attribute(
        _parse_places,
        default=_ONE_PTY,
        doc="pty, unix:PATH or log:PATH; a list makes as many ports",
    )
    ports = attribute(
        _parse_words,
        default=_UNNAMED,
        doc="the ports' names; the first is a console",
    )
    terminal = attribute(
        _parse_terminal,
        default="80x25",
        writable=True,
        doc="columns and rows of the first port",
    )

    model: VirtioConsole
    places: _Words = ()
    """Where each port is, now that pseudo-terminals have names."""

    def setup(self) -> None:
        if self.ports and len(self.ports) != len(self.to):
            raise InvalidError(f"{len(self.ports)} names for {len(self.to)} ports")
        names = self.ports or ("",) * len(self.to)
        channels: list[Channel] = []
        try:
            for place in self.to:
                channels.append(_open_channel(place))
            self.places = tuple(map(_place_of, self.to, channels))
            self.model = VirtioConsole(
                [
                    Port(channel, name, console=number == 0)
                    for number, (channel, name) in enumerate(
                        zip(channels, names, strict=True)
                    )
                ],
                size=_columns_and_rows(self.terminal),
            )
        except BaseException:
            for channel in channels:
                channel.close()
            raise

    def attribute_changed(self, name: str) -> None:
        self.model.resize(*_columns_and_rows(self.terminal))

    def released(self) -> None:
        for port in self.model.ports:
            port.channel.close()

    def statistics(self) -> ConsoleDeviceStatistics:
        """A snapshot of the counters."""
        about = _statistics(self, self.model.io_statistics())
        return ConsoleDeviceStatistics(
            about.device, about.adapter, about.io, self.places
        )


def _open_channel(place: str) -> Channel:
    kind, _, path = place.partition(":")
    if kind == "unix":
        return UnixSocket(Path(path))
    return LogFile(Path(path)) if kind == "log" else Pty()


def _place_of(place: str, channel: Channel) -> str:
    return f"pty:{channel.path}" if isinstance(channel, Pty) else place


class VirtioRngDevice(VirtioOnBus):
    """The kernel's random bytes."""

    bytes_per_second = attribute(_parse_rate, default=0, doc="the limit; 0: none")

    model: VirtioRng

    def setup(self) -> None:
        self.model = VirtioRng(bytes_per_second=self.bytes_per_second)

    def statistics(self) -> DeviceStatistics:
        """A snapshot of the counters."""
        return _statistics(self, self.model.io_statistics())


__all__ = [
    "DeviceStatistics",
    "VirtioBlkDevice",
    "VirtioConsoleDevice",
    "VirtioNetDevice",
    "VirtioRngDevice",
]
