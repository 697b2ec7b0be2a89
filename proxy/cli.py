"""`vbus guest run|scan`: be a guest of a bridge; look what bridges there are."""

import signal
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import (
    AbstractAsyncContextManager,
    asynccontextmanager,
    contextmanager,
)
from functools import partial
from typing import Any

import click
import msgspec
import trio

from proxy.again import returning
from proxy.bridge import BridgeDriver
from proxy.guest import MEMORY_MIB, attach
from proxy.linux.devices import PciDevice
from proxy.linux.function import bridges, choose, is_address
from proxy.registry import DriverHost, Report
from proxy.tasks import beside
from vbus.errors import BusyError, UnreachableError, VbusError

VENET = "virtual-ethernet"
VIRTIO = "virtio"
SCAN_MEMORY_MIB = 4
SCAN_QUIET_S = 0.1
"""What is there is announced at once: after such a silence that was all."""
EXIT_REFUSED, EXIT_UNREACHABLE = 1, 3


class _Addresses(click.ParamType[tuple[str, str]]):
    """DEV=ADDRESS."""

    name = "DEV=ADDRESS"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, str]:
        device, equals, address = str(value).partition("=")
        if not (device and equals and address):
            self.fail(f"{value!r} is not DEV=ADDRESS", param, ctx)
        return device, address


class _Settings(click.ParamType[tuple[str, str, str]]):
    """DEV.OPTION=VALUE; the device's name may have dots."""

    name = "DEV.OPTION=VALUE"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, str, str]:
        where, equals, text = str(value).partition("=")
        device, dot, option = where.rpartition(".")
        if not (device and dot and option and equals):
            self.fail(f"{value!r} is not DEV.OPTION=VALUE", param, ctx)
        return device, option, text


class _Output:
    """What happens, as lines or as one JSON object per line."""

    def __init__(self, *, as_json: bool) -> None:
        self._as_json = as_json
        self._subject: tuple[BridgeDriver, DriverHost] | None = None

    def way(self, line: str) -> None:
        """Say how the function is reached."""
        self._tell(line, {"event": "function", "detail": line})

    def attached(self, where: str, bridge: BridgeDriver) -> None:
        statistics = bridge.statistics()
        queues, vectors = statistics.queues, len(statistics.interrupts.by_vector)
        self._tell(
            f"attached to {where}: {queues} event queues, {vectors} vectors",
            {
                "event": "attached",
                "to": where,
                "queues": queues,
                "vectors": vectors,
                "capabilities": statistics.capabilities,
            },
        )

    def device(self, report: Report) -> None:
        device, state = report.device, report.state.value
        detail = f": {report.detail}" if report.detail else ""
        self._tell(
            f"{device.name} ({device.type}): {state}{detail}",
            {
                "event": "device",
                "id": device.id,
                "name": device.name,
                "type": device.type,
                "state": state,
                "detail": report.detail,
            },
        )

    @contextmanager
    def about(self, bridge: BridgeDriver, drivers: DriverHost) -> Iterator[None]:
        """Let `statistics` be about these, and print them at the end."""
        self._subject = bridge, drivers
        try:
            yield
        finally:
            self.statistics()
            self._subject = None

    @property
    def has_subject(self) -> bool:
        return self._subject is not None

    def statistics(self) -> None:
        if self._subject is None:
            return
        bridge, drivers = self._subject
        values = {
            "event": "statistics",
            "bridge": bridge.statistics(),
            "function": bridge.function.statistics(),
            "memory": bridge.function.memory.statistics(),
            "devices": drivers.statistics(),
        }
        click.echo(msgspec.json.encode(values))

    def _tell(self, line: str, values: Mapping[str, object]) -> None:
        click.echo(msgspec.json.encode(values) if self._as_json else line)


def _no_address(
    ctx: click.Context, param: click.Parameter, value: str | None
) -> str | None:
    """Refuse what is no PCI address."""
    if value is not None and not is_address(value):
        raise click.BadParameter(f"{value!r} is no PCI address, as 0000:00:04.0")
    return value


_device = click.option(
    "--device",
    metavar="ADDRESS",
    callback=_no_address,
    help="The bridge at this PCI address of this virtual machine.",
)


@click.command("run")
@click.argument("socket", type=click.Path(), required=False)
@_device
@click.option(
    "--address",
    "addresses",
    type=_Addresses(),
    multiple=True,
    help="Give the interface of a venet device an address: lan0-g1=10.0.0.2/24.",
)
@click.option(
    "--set",
    "settings",
    type=_Settings(),
    multiple=True,
    help="Tell the driver of a device something: disk0.nbd=/run/disk0.sock.",
)
@click.option(
    "--frames", is_flag=True, help="Generate frames instead of making TAP interfaces."
)
@click.option(
    "--memory-mib",
    type=click.IntRange(1, 1 << 20),
    default=MEMORY_MIB,
    show_default=True,
)
@click.option("--compat", is_flag=True, help="Keep to the original protocol.")
@click.option(
    "--reconnect",
    "patience_s",
    type=click.FloatRange(0, 86400),
    default=0,
    metavar="SECONDS",
    help="If the host goes, wait so long for it to come back.",
)
@click.option("-j", "--json", "as_json", is_flag=True, help="One JSON object per line.")
def run(
    socket: str | None,
    device: str | None,
    addresses: tuple[tuple[str, str], ...],
    settings: tuple[tuple[str, str, str], ...],
    frames: bool,
    memory_mib: int,
    compat: bool,
    patience_s: float,
    as_json: bool,
) -> None:
    """Be a guest of a bridge until interrupted.

    A process of the host names the SOCKET at which its bridge is served. In a virtual
    machine the bridge is the PCI function found there.

    Devices get their drivers as they come. SIGUSR1 prints statistics, SIGTERM and
    SIGINT print them and end.
    """
    if socket is not None and device is not None:
        raise click.UsageError("SOCKET and --device exclude each other")
    options: dict[str, dict[str, object]] = {}
    for name, address in addresses:
        options.setdefault(name, {})["address"] = address
    for name, key, value in settings:
        options.setdefault(name, {})[key] = value
    # What is behind the bridge of a virtual machine is for the kernel in it.
    defaults: dict[str, dict[str, object]] = {VIRTIO: {"kernel": socket is None}}
    if frames:
        defaults[VENET] = {"frames": True}
    output = _Output(as_json=as_json)

    async def once(told: trio.Event) -> None:
        where = socket or choose(device).address
        attaching = attach(where, memory_mib=memory_mib, compat=compat, say=output.way)
        await _attached(where, attaching, output, options, defaults, told)

    async def main() -> None:
        async with _obeying(output) as told:
            await returning(partial(once, told), patience_s)

    try:
        trio.run(main)
    except VbusError as error:
        click.echo(f"vbus: {error}", err=True)
        unreachable = isinstance(error, UnreachableError)
        code = EXIT_UNREACHABLE if unreachable else EXIT_REFUSED
        raise click.exceptions.Exit(code) from error


@asynccontextmanager
async def _obeying(output: _Output) -> AsyncIterator[trio.Event]:
    """Set the event at SIGTERM or SIGINT; SIGUSR1 prints statistics.

    A body that is attached ends by itself then, in order; any other is cancelled.
    """
    told = trio.Event()
    numbers = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1
    with trio.open_signal_receiver(*numbers) as signals, trio.CancelScope() as scope:

        async def obey() -> None:
            async for number in signals:
                if number == signal.SIGUSR1:
                    output.statistics()
                    continue
                told.set()
                if not output.has_subject:
                    scope.cancel()

        async with beside(obey):
            yield told


async def _attached(
    where: str,
    attaching: AbstractAsyncContextManager[BridgeDriver],
    output: _Output,
    options: Mapping[str, Mapping[str, object]],
    defaults: Mapping[str, Mapping[str, object]],
    told: trio.Event,
) -> None:
    """Be a guest until told to end; raises NoDeviceError when the host goes."""
    async with attaching as bridge:
        output.attached(where, bridge)
        drivers = DriverHost(
            bridge, options=options, defaults=defaults, report=output.device
        )
        async with beside(drivers.run):
            with output.about(bridge, drivers):
                await told.wait()


@click.command("scan")
@_device
@click.option("-j", "--json", "as_json", is_flag=True, help="Print JSON.")
def scan(device: str | None, as_json: bool) -> None:
    """Show the bridges of this virtual machine and the devices behind each.

    Attaches to each bridge for a moment, unless another process has it.
    """
    found = [choose(device)] if device is not None else bridges()
    shown = [trio.run(_look, bridge) for bridge in found]
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(shown)))
        return
    for one in shown:
        click.echo(f"{one['address']}  {one['driver'] or 'no driver'}  {one['state']}")
        for name, about in one["devices"].items():
            click.echo(f"    {name}  {about['type']}  id {about['id']}")
    if not shown:
        click.echo("this machine has no bridge", err=True)


async def _look(function: PciDevice) -> dict[str, Any]:
    """Describe one bridge. What stands in the way of attaching is its state."""
    about: dict[str, Any] = {
        "address": function.address,
        "driver": function.driver,
        "iommu_group": function.iommu_group,
        "state": "free",
        "devices": {},
    }
    try:
        async with attach(function.address, memory_mib=SCAN_MEMORY_MIB) as bridge:
            await _settle(bridge)
            about["devices"] = {
                device.name: {"id": device.id, "type": device.type}
                for device in bridge.devices.values()
            }
    except BusyError as error:
        about["state"] = f"busy: {error}"
    except VbusError as error:
        about["state"] = f"failed: {error}"
    return about


async def _settle(bridge: BridgeDriver) -> None:
    """Wait until no more devices are announced."""
    known = -1
    while known != len(bridge.devices):
        known = len(bridge.devices)
        await trio.sleep(SCAN_QUIET_S)
