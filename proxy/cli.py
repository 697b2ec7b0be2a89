"""`vbus guest run`: be a guest of a bridge, with the drivers of its devices."""

import signal
from collections.abc import Mapping
from typing import Any

import click
import msgspec
import trio

from proxy.bridge import BridgeDriver
from proxy.guest import MEMORY_MIB, attach
from proxy.registry import DriverHost, Report
from proxy.tasks import beside
from vbus.errors import UnreachableError, VbusError

VENET = "virtual-ethernet"
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


class _Output:
    """What happens, as lines or as one JSON object per line."""

    def __init__(self, *, as_json: bool) -> None:
        self._as_json = as_json

    def attached(self, socket: str, bridge: BridgeDriver) -> None:
        statistics = bridge.statistics()
        queues, vectors = statistics.queues, len(statistics.interrupts.by_vector)
        self._tell(
            f"attached to {socket}: {queues} event queues, {vectors} vectors",
            {
                "event": "attached",
                "socket": socket,
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

    def statistics(self, bridge: BridgeDriver, drivers: DriverHost) -> None:
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


@click.command("run")
@click.argument("socket", type=click.Path())
@click.option(
    "--address",
    "addresses",
    type=_Addresses(),
    multiple=True,
    help="Give the interface of a venet device an address: lan0-g1=10.0.0.2/24.",
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
@click.option("-j", "--json", "as_json", is_flag=True, help="One JSON object per line.")
def run(
    socket: str,
    addresses: tuple[tuple[str, str], ...],
    frames: bool,
    memory_mib: int,
    compat: bool,
    as_json: bool,
) -> None:
    """Be a guest of the bridge served at SOCKET until interrupted.

    Devices get their drivers as they come. SIGUSR1 prints statistics, SIGTERM and
    SIGINT print them and end.
    """
    options: dict[str, dict[str, object]] = {}
    for device, address in addresses:
        options.setdefault(device, {})["address"] = address
    defaults = {VENET: {"frames": True}} if frames else {}
    output = _Output(as_json=as_json)

    async def main() -> None:
        await _run(socket, output, memory_mib, compat, options, defaults)

    try:
        trio.run(main)
    except VbusError as error:
        click.echo(f"vbus: {error}", err=True)
        unreachable = isinstance(error, UnreachableError)
        code = EXIT_UNREACHABLE if unreachable else EXIT_REFUSED
        raise click.exceptions.Exit(code) from error


async def _run(
    socket: str,
    output: _Output,
    memory_mib: int,
    compat: bool,
    options: Mapping[str, Mapping[str, object]],
    defaults: Mapping[str, Mapping[str, object]],
) -> None:
    with trio.open_signal_receiver(
        signal.SIGTERM, signal.SIGINT, signal.SIGUSR1
    ) as signals:
        async with attach(socket, memory_mib=memory_mib, compat=compat) as bridge:
            output.attached(socket, bridge)
            drivers = DriverHost(
                bridge, options=options, defaults=defaults, report=output.device
            )
            async with beside(drivers.run):
                try:
                    async for number in signals:
                        if number != signal.SIGUSR1:
                            break
                        output.statistics(bridge, drivers)
                finally:
                    output.statistics(bridge, drivers)
