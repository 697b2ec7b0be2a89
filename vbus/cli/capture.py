"""`vbus capture`: the frames of a device as pcapng, for tshark and its kind."""

import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import click
import trio

from vbus import pcapng
from vbus.cli.asking import client

_SNAPLEN = 256 << 10
_LAST_WRITE_S = 2
"""How long a full pipe may hold up the end of an interrupted capture."""
_NEEDS_CHECKSUM, _GSO = 1, 2
_GSO_TYPES = {0: "TCP/IPv4", 1: "UDP", 2: "TCP/IPv6"}


@click.command()
@click.argument("device")
@click.option(
    "--write",
    "-w",
    "file",
    type=click.Path(path_type=Path, allow_dash=True),
    required=True,
    help="Where to; - is the standard output.",
)
@click.option(
    "--snaplen",
    "-s",
    type=click.IntRange(14, _SNAPLEN),
    default=_SNAPLEN,
    help="How much of each frame; all of it if not given.",
)
@click.option("--count", "-c", type=click.IntRange(1), help="End after so many frames.")
def capture(device: str, file: Path, snaplen: int, count: int | None) -> None:
    """Write the frames of DEVICE as pcapng until interrupted.

    Of a venet or an uplink: what comes from it and goes to it. Of a switch: what comes
    from each port, as an interface of its own. Frames are shown as they are on the bus,
    with segmentation and checksums still to be done. What cannot be written fast enough
    is dropped and counted; the device does not wait for it.

    \b
        vbus capture lan0 -w - | tshark -r -
    """
    if str(file) == "-" and sys.stdout.isatty():
        raise click.UsageError("packets on a terminal do no good: -w FILE, or a pipe")
    blocks = Blocks(device, snaplen, count)
    with click.open_file(str(file), "wb") as out:
        trio.run(_Capturing(blocks, out).run)
    frames, dropped = blocks.received.total(), blocks.dropped.total()
    click.echo(f"{frames} frames captured, {dropped} dropped", err=True)


class _Capturing:
    """From the daemon to the file, until interrupted."""

    def __init__(self, blocks: "Blocks", out: IO[bytes]) -> None:
        self._blocks = blocks
        self._out = out
        self._whole = True
        self._writing = trio.CancelScope(shield=True)

    async def run(self) -> None:
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._take, nursery.cancel_scope)
                await anext(signals)
                self._writing.deadline = trio.current_time() + _LAST_WRITE_S
                nursery.cancel_scope.cancel()
        if self._whole:
            self._write(self._blocks.end())

    async def _take(self, scope: trio.CancelScope) -> None:
        blocks = self._blocks
        async with client() as control:
            about = {"device": blocks.device, "snaplen": blocks.snaplen}
            started = await control.request("capture", **about)
            await self._write_patiently(blocks.begin(started["class"]))
            while not blocks.enough:
                event = await control.next_event()
                if "end" in event:
                    click.echo(f"vbus: {event['end']}", err=True)
                    break
                await self._write_patiently(b"".join(blocks.take(event)))
        scope.cancel()

    async def _write_patiently(self, data: bytes) -> None:
        """Write in a thread: a pipe may be full, and its reader pausing."""
        self._whole = False  # given up in the middle, nothing more may follow
        with self._writing:
            await trio.to_thread.run_sync(self._write, data, abandon_on_cancel=True)
            self._whole = True
        self._writing = trio.CancelScope(shield=True, deadline=self._writing.deadline)

    def _write(self, data: bytes) -> None:
        self._out.write(data)
        self._out.flush()


class Blocks:
    """The blocks of one file, and how many frames are in it."""

    def __init__(self, device: str, snaplen: int, count: int | None = None) -> None:
        self.device = device
        self.snaplen = snaplen
        self.received: Counter[str] = Counter()
        self.dropped: Counter[str] = Counter()
        self._count = count
        self._class = ""
        self._interfaces: dict[str, int] = {}
        self._lost: Counter[str] = Counter()

    @property
    def enough(self) -> bool:
        return self._count is not None and self.received.total() >= self._count

    def begin(self, class_name: str) -> bytes:
        """Make the blocks before all others."""
        self._class = class_name
        section = pcapng.section(f"vbus {version('vbus')}")
        return b"".join([section, *self._interface(self.device)])

    def _interface(self, port: str) -> list[bytes]:
        """Describe a port when it is first seen."""
        if port in self._interfaces:
            return []
        self._interfaces[port] = len(self._interfaces)
        about = f"{self._class} {self.device}"
        if port != self.device:
            about = f"port {port} of {about}"
        return [pcapng.interface(port, about, self.snaplen)]

    def take(self, event: dict[str, Any]) -> Iterator[bytes]:
        """Make the packets of what the daemon sent."""
        for port, time_ns, direction, length, flags, gso_type, size, data in event[
            "frames"
        ]:
            if self.enough:
                return
            yield from self._interface(port)
            self.received[port] += 1
            yield pcapng.packet(
                self._interfaces[port],
                time_ns,
                data,
                length,
                direction=direction,
                dropped=self._lost.pop(port, 0),
                comment=_offload(flags, gso_type, size),
            )
        for port, count in event["dropped"].items():
            yield from self._interface(port)
            self.dropped[port] += count
            self._lost[port] += count

    def end(self) -> bytes:
        """Say how many frames each interface had."""
        now = time.time_ns()
        return b"".join(
            pcapng.statistics(
                number,
                now,
                self.received[port] + self.dropped[port],
                self.dropped[port],
            )
            for port, number in self._interfaces.items()
        )


def _offload(flags: int, gso_type: int, size: int) -> str:
    """Say what is still to be done to a frame; nothing for most."""
    words = []
    if flags & _GSO:
        kind = _GSO_TYPES.get(gso_type, f"type {gso_type}")
        words.append(f"to be cut into {kind} segments of {size} bytes")
    if flags & _NEEDS_CHECKSUM:
        words.append("checksum to be filled in")
    return "; ".join(words)
