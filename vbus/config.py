"""The daemon's configuration: a TOML file as frozen structs.

Says what buses, devices and guests there shall be; the daemon makes them. A device's
table holds its name, class and buses (or how it is exposed), and beside them the
attributes of its class, which the class itself checks.

A document is a whole file as plain values: what TOML gives and msgpack carries.
"""

import os
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from vbus.errors import ConfigError, InvalidError

UID_LIMIT = (1 << 32) - 1
Expose = Literal["bridge", "pci"]
"""Behind the bridge of guests, or as a PCI function of its own."""


class DaemonConfig(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True
):
    """The table [daemon]."""

    runtime_dir: str | None = None
    """Where the sockets are; see `runtime_dir()` for the default."""
    group: str | None = None
    """The members of this group may manage and see too; else only our own user."""
    metrics: str | None = None
    """HOST:PORT where Prometheus may ask too, beside metrics.sock."""
    trace: Annotated[int, Meta(ge=0, le=1 << 20)] = 4096
    """How many calls and signals to remember for `vbus trace`."""


class BusConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One [[bus]]."""

    name: str


Uid = Annotated[int, Meta(ge=0, lt=UID_LIMIT)]
SpinUs = Annotated[float, Meta(ge=0, le=10_000)]
DEFAULT_LAYOUT = "modern"
DEFAULT_SPIN_US = 300.0


class Exposure(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True
):
    """How a device is shown that is a PCI function of its own."""

    layout: str = DEFAULT_LAYOUT
    """Its register layout; the class knows which there are."""
    uid: Uid | None = None
    """The user whose socket it is; by default the daemon's own."""
    spin_us: SpinUs = DEFAULT_SPIN_US
    """How long at most its queues look for the next request before they sleep: a
    guest that is emulated needs some 200 for one."""


class DeviceConfig(msgspec.Struct, frozen=True):
    """One [[device]]; `attributes` are all its other keys."""

    name: str
    class_name: str
    buses: tuple[str, ...] = ()
    attributes: Mapping[str, Any] = {}
    exposure: Exposure | None = None
    """expose = "pci", with its layout and uid; None: on buses."""
    backend: str = ""
    """Which backend makes it; by default the first one that has its class."""


class GuestConfig(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True
):
    """One [[guest]]: a bridge onto `bus`, at the socket guests/NAME.sock."""

    name: str
    bus: str
    msix: bool = True
    """Show MSI-X beside MSI."""
    uid: Uid | None = None
    """The user whose socket it is; by default the daemon's own."""
    allow_truncatable: bool = False
    """Take guest memory that could shrink, and with it the risk of SIGBUS."""
    spin_us: SpinUs = 50
    """How long at most to look for the next message before sleeping; 0 suits a
    virtual machine without hardware help, which needs every core itself."""
    call_timeout_s: Annotated[float, Meta(gt=0, le=3600)] = 5.0
    """The deadline of each call of a device."""


Isolation = Literal["auto", "required", "off"]
"""As far as the kernel can; not without; not at all."""
AbsolutePath = Annotated[str, Meta(pattern="^/")]


class BackendConfig(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True
):
    """One [[backend]]: device classes that live in a process of their own."""

    name: str
    classes: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    """What to start; by default `vbus backend run --name NAME CLASS...`."""
    start: bool = True
    """Start it, and again when it ends. Otherwise it comes to backends.sock."""
    deadline_s: Annotated[float, Meta(ge=0.05, le=3600)] = 2.0
    """How long it may owe an answer that no device takes part in; then it is killed."""
    restart_limit: Annotated[int, Meta(ge=0)] = 10
    """Ends in a row after which it is given up."""
    isolation: Isolation = "auto"
    paths: tuple[AbsolutePath, ...] = ()
    """Files and folders it may open, beside those its devices are known to need."""


class Config(msgspec.Struct, frozen=True):
    """A whole configuration; `source` is where it comes from, for messages."""

    source: str = "configuration"
    daemon: DaemonConfig = DaemonConfig()
    buses: tuple[BusConfig, ...] = ()
    devices: tuple[DeviceConfig, ...] = ()
    guests: tuple[GuestConfig, ...] = ()
    backends: tuple[BackendConfig, ...] = ()


class _File(msgspec.Struct, forbid_unknown_fields=True):
    daemon: DaemonConfig = DaemonConfig()
    bus: tuple[BusConfig, ...] = ()
    device: tuple[dict[str, Any], ...] = ()
    guest: tuple[GuestConfig, ...] = ()
    backend: tuple[BackendConfig, ...] = ()


class _DeviceHead(msgspec.Struct):
    name: str
    class_name: str = msgspec.field(name="class")
    bus: str | tuple[str, ...] = ()
    expose: Expose = "bridge"
    layout: str | None = None
    uid: Uid | None = None
    spin_us: SpinUs | None = None
    backend: str = ""


def load(path: str | os.PathLike[str]) -> Config:
    """Read a file. Raises ConfigError, which names the file and the place in it."""
    try:
        config = parse(Path(path).read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except (ConfigError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from None
    return msgspec.structs.replace(config, source=os.fspath(path))


def parse(text: str) -> Config:
    """Take the text of a file. Raises ConfigError, which names the place."""
    try:
        return from_document(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(str(error)) from None


def from_document(document: object) -> Config:
    """Take a document. Raises ConfigError, which names the place."""
    try:
        file = msgspec.convert(document, _File)
    except msgspec.ValidationError as error:
        raise ConfigError(_place(error, "")) from None
    devices = tuple(_device(number, table) for number, table in enumerate(file.device))
    for table, names in (
        ("bus", [bus.name for bus in file.bus]),
        ("device", [device.name for device in devices]),
        ("guest", [guest.name for guest in file.guest]),
        ("backend", [backend.name for backend in file.backend]),
    ):
        _check_unique(table, names)
    return Config(
        daemon=file.daemon,
        buses=file.bus,
        devices=devices,
        guests=file.guest,
        backends=file.backend,
    )


def to_document(config: Config) -> dict[str, Any]:
    """Give what `from_document` takes, without what is left at its default."""
    document = {
        "daemon": msgspec.to_builtins(config.daemon),
        "backend": msgspec.to_builtins(config.backends),
        "bus": msgspec.to_builtins(config.buses),
        "device": [_table(device) for device in config.devices],
        "guest": msgspec.to_builtins(config.guests),
    }
    return {key: value for key, value in document.items() if value}


def _table(device: DeviceConfig) -> dict[str, Any]:
    table: dict[str, Any] = {"name": device.name, "class": device.class_name}
    if device.buses:
        one = len(device.buses) == 1
        table["bus"] = device.buses[0] if one else list(device.buses)
    if device.exposure is not None:
        table.update(expose="pci", **msgspec.to_builtins(device.exposure))
    if device.backend:
        table["backend"] = device.backend
    return {**table, **device.attributes}


def _check_unique(table: str, names: Sequence[str]) -> None:
    seen: set[str] = set()
    for number, name in enumerate(names):
        if name in seen:
            raise ConfigError(f"{table}[{number}].name: a second {name!r}")
        seen.add(name)


def _device(number: int, table: dict[str, Any]) -> DeviceConfig:
    try:
        head = msgspec.convert(table, _DeviceHead)
    except msgspec.ValidationError as error:
        raise ConfigError(_place(error, f".device[{number}]")) from None
    buses = (head.bus,) if isinstance(head.bus, str) else head.bus
    own = {field.encode_name for field in msgspec.structs.fields(_DeviceHead)}
    spin = head.spin_us
    if head.expose != "pci":  # an attribute, which many devices have
        spin = None
        own.remove("spin_us")
    try:
        shown = exposure(head.expose, buses, head.layout, head.uid, spin)
    except InvalidError as error:
        raise ConfigError(f"device[{number}]: {error}") from None
    rest = {key: value for key, value in table.items() if key not in own}
    return DeviceConfig(head.name, head.class_name, buses, rest, shown, head.backend)


def exposure(
    expose: Expose,
    buses: Sequence[str],
    layout: str | None = None,
    uid: int | None = None,
    spin_us: float | None = None,
) -> Exposure | None:
    """Put together what was said of a device's exposure; None for the bridge.

    Raises InvalidError for words that do not go together.
    """
    if expose == "pci":
        if buses:
            raise InvalidError(
                'a device with expose = "pci" is a PCI function of its own, and on no'
                f" bus: leave {', '.join(buses)} out"
            )
        spin = DEFAULT_SPIN_US if spin_us is None else spin_us
        return Exposure(layout or DEFAULT_LAYOUT, uid, spin)
    if (layout, uid, spin_us) != (None, None, None):
        raise InvalidError('layout, uid and spin_us go with expose = "pci" only')
    return None


def _place(error: msgspec.ValidationError, prefix: str) -> str:
    """Turn msgspec's "... - at `$.guest[0].msix`" into "guest[0].msix: ..."."""
    message, _, path = str(error).partition(" - at `$")
    place = (prefix + path.rstrip("`")).lstrip(".")
    return f"{place}: {message}" if place else message


def runtime_dir(configured: str | None = None) -> Path:
    """Where a daemon of this user keeps its sockets: VBUS_RUNTIME_DIR goes first.

    Raises ConfigError if this user has no directory for such things.
    """
    told = os.environ.get("VBUS_RUNTIME_DIR") or configured
    if told:
        return Path(told)
    if os.geteuid() == 0:
        return Path("/run/vbus")
    base = os.environ.get("XDG_RUNTIME_DIR")
    if not base:
        raise ConfigError("neither VBUS_RUNTIME_DIR nor XDG_RUNTIME_DIR is set")
    return Path(base) / "vbus"
