"""`vbus top`: what goes on right now, from two looks at the counters at a time."""

import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import click
import trio

from vbus.cli.asking import as_json, client, console, printable

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

_FROM = ("tx_frames", "in_frames", "reads")
_TO = ("rx_frames", "out_frames", "writes")
_BYTES_FROM = ("tx_bytes", "in_bytes", "read_bytes")
_BYTES_TO = ("rx_bytes", "out_bytes", "written_bytes")
_BITS = 8
Counters = Mapping[str, Any]
Shown = dict[str, Any]


@click.command()
@click.option(
    "--interval",
    type=click.FloatRange(0.1, 3600),
    default=1,
    show_default=True,
    help="Seconds between two looks.",
)
@click.option("--once", is_flag=True, help="Show one interval and end.")
@as_json
def top(interval: float, once: bool, as_json: bool) -> None:
    """Show rates of devices and guests, until interrupted.

    \b
    from/to       frames or requests a second from the guest and to it
    signals       to guests; coalesced: those that told nothing new
    p50, p99      how long calls of the device took, in microseconds: under so much

    With --json each interval is an object on a line.
    """
    trio.run(_run, interval, once, as_json)


async def _run(interval: float, once: bool, as_json: bool) -> None:
    out = console()
    live: Any = nullcontext()
    if out.is_terminal and not (once or as_json):
        from rich.live import Live

        live = Live(console=out, screen=True, auto_refresh=False)
    with live as screen:
        async for seen in _intervals(interval):
            if as_json:
                click.echo(json.dumps(seen))
            elif screen is not None:
                screen.update(_tables(seen), refresh=True)
            else:
                with out.capture() as text:
                    out.print(_tables(seen))
                click.echo(text.get())
            if once:
                return


async def _intervals(interval: float) -> AsyncIterator[Shown]:
    async with client() as control:
        before, at = await control.request("stats"), trio.current_time()
        while True:
            await trio.sleep_until(at + interval)
            after, now = await control.request("stats"), trio.current_time()
            yield rates(before, after, now - at)
            before, at = after, now


# From counters to rates


def rates(before: Counters, after: Counters, seconds: float) -> Shown:
    """Give what happened in between, a second: of what is there in both."""
    return {
        "seconds": round(seconds, 3),
        "daemon": _daemon(before["daemon"], after["daemon"], seconds),
        "devices": {
            name: _device(before["device"][name], one, seconds)
            for name, one in after["device"].items()
            if name in before["device"]
        },
        "guests": {
            name: _guest(before["guest"][name], one, seconds)
            for name, one in after["guest"].items()
            if name in before["guest"]
        },
    }


class _Rates:
    def __init__(self, before: Counters, after: Counters, seconds: float) -> None:
        self._before, self._after, self._seconds = before, after, seconds

    def change(self, *names: str) -> float:
        """How much the first of these counters that is there went up.

        0 if it went down: the object was made anew under the same name.
        """
        for name in names:
            if name in self._after:
                gone_up: float = self._after[name] - self._before.get(name, 0)
                return max(0, gone_up)
        return 0

    def per_second(self, *names: str) -> float:
        return round(self.change(*names) / self._seconds, 1)


def _share(part: float, whole: float) -> float | None:
    """Give a part in percent; None of nothing."""
    return round(100 * part / whole, 1) if whole else None


def _daemon(before: Counters, after: Counters, seconds: float) -> Shown:
    used = after["cpu_s"] - before["cpu_s"]
    return {
        "cpu_percent": round(100 * used / seconds, 1),
        "resident_kib": after["resident_kib"],
        "tasks": after["tasks"],
        "descriptors": after["descriptors"],
    }


def _device(before: Counters, after: Counters, seconds: float) -> Shown:
    own, bus = _Rates(before, after, seconds), after["bus"]
    by_bus = _Rates(before["bus"], bus, seconds)
    taken = [
        max(0, now - then)
        for then, now in zip(
            before["bus"]["latency"]["buckets"], bus["latency"]["buckets"], strict=True
        )
    ]
    return {
        "connections": bus["connections"],
        "from_per_s": own.per_second(*_FROM),
        "to_per_s": own.per_second(*_TO),
        "from_bits_per_s": round(own.per_second(*_BYTES_FROM) * _BITS),
        "to_bits_per_s": round(own.per_second(*_BYTES_TO) * _BITS),
        "signals_per_s": by_bus.per_second("signals"),
        "coalesced_percent": _share(
            by_bus.change("coalesced"), by_bus.change("signals")
        ),
        "calls_per_s": by_bus.per_second("calls"),
        "p50_us": percentile(taken, 50),
        "p99_us": percentile(taken, 99),
    }


def percentile(buckets: Sequence[int], percent: float) -> float | None:
    """Give the limit in microseconds that so many of the calls were under.

    None if there were none; for those in the last bucket, which has none, twice the
    limit of the one before.
    """
    wanted = sum(buckets) * percent / 100
    if not wanted:
        return None
    below = 0
    for index, count in enumerate(buckets):
        below += count
        if below >= wanted:
            return float(2**index)
    raise AssertionError("more calls than there were")


def _guest(before: Counters, after: Counters, seconds: float) -> Shown:
    bridge = _Rates(before["bridge"], after["bridge"], seconds)
    server = _Rates(before["server"], after["server"], seconds)
    events = _Rates(before["bridge"]["events"], after["bridge"]["events"], seconds)
    taken, more = events.change("posted"), events.change("coalesced")
    return {
        "attached": after["server"]["peer"] is not None,
        "connections": after["bridge"]["connections"],
        "bridge_calls_per_s": bridge.per_second("bridge_calls"),
        "fast_calls_per_s": bridge.per_second("fast_calls"),
        "doorbells_per_s": bridge.per_second("doorbells"),
        "interrupts_per_s": server.per_second("interrupts"),
        "events_per_s": events.per_second("delivered"),
        "coalesced_percent": _share(more, taken + more),
        "messages_per_s": server.per_second("messages"),
    }


# To look at


def _tables(seen: Shown) -> "RenderableType":
    from rich.console import Group
    from rich.text import Text

    daemon = seen["daemon"]
    head = (
        f"vbus: {daemon['cpu_percent']:.0f}% cpu, {daemon['resident_kib'] // 1024} MiB,"
        f" {daemon['tasks']} tasks, {daemon['descriptors']} descriptors;"
        f" rates a second, over {seen['seconds']:.1f} s"
    )
    devices, guests = seen["devices"], seen["guests"]
    return Group(Text(head), _table("device", devices), _table("guest", guests))


def _table(what: str, rows: Shown) -> "Table":
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE, pad_edge=False)
    table.add_column(what, no_wrap=True)
    keys = list(next(iter(rows.values()), {}))
    for key in keys:
        table.add_column(_heading(key), justify="right")
    for name, row in rows.items():
        table.add_row(Text(printable(name)), *(_cell(row[key]) for key in keys))
    return table


def _heading(key: str) -> str:
    words = key.removesuffix("_per_s").removesuffix("_percent").replace("_", " ")
    return f"{words} %" if key.endswith("_percent") else words


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    assert isinstance(value, int | float)
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if value >= size:
            return f"{value / (1e3 if unit == 'k' else size):.1f}{unit}"
    return f"{value:.0f}" if value >= 100 or value == int(value) else f"{value:.1f}"
