"""`vbus trace`: calls and signals between guests and devices, lately or from now on."""

import json
from datetime import UTC, datetime
from errno import errorcode
from typing import Any

import click
import trio

from vbus.cli.asking import as_json, client, printable
from vbus.trace import Record

_NS_PER_S = 1_000_000_000


@click.command()
@click.option("--follow", "-f", is_flag=True, help="Go on from now, until interrupted.")
@click.option("--dump", is_flag=True, help="Print what is remembered; the default.")
@click.option("--guest", help="Only of this guest.")
@click.option("--device", help="Only of this device.")
@as_json
def trace(
    follow: bool, dump: bool, guest: str | None, device: str | None, as_json: bool
) -> None:
    """Print calls and signals between guests and devices.

    The daemon remembers the last ones: [daemon] trace in its configuration says how
    many, 4096 if nothing else. With --json each is an object on a line.
    """
    if follow and dump:
        raise click.UsageError("--follow or --dump, not both")
    trio.run(_run, {"guest": guest, "device": device, "follow": follow}, as_json)


async def _run(args: dict[str, Any], as_json: bool) -> None:
    async with client() as control:
        await control.request("trace", **args)
        while True:
            event: dict[str, Any] = await control.next_event()
            if "end" in event:
                return
            if event["lost"]:
                lost = {"kind": "lost", "count": event["lost"]}
                click.echo(json.dumps(lost) if as_json else f"{lost['count']} lost")
            lines = [_line(Record(*one), as_json) for one in event["records"]]
            click.echo("\n".join(lines))


def _line(record: Record, as_json: bool) -> str:
    seconds, rest = divmod(record.time_ns, _NS_PER_S)
    at = f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{rest // 1000:06}Z"
    if as_json:
        return json.dumps({"time": at, **record._asdict()})
    words = [at, f"{record.kind:<6}", record.guest, record.device, str(record.number)]
    if record.size:
        words.append(f"{record.size} bytes")
    if record.result is not None:
        words.append("ok" if not record.result else f"-{errorcode[-record.result]}")
        words.append(f"{record.duration_ns / 1000:.1f} us")
    return printable(" ".join(words))
