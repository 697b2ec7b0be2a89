"""The same driver code runs in a virtual machine and in a process (issue 3).

Both run `vbus guest run` at the same time, on one switch, and write down what ran.
"""

import json
import signal
import subprocess
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from tests.vm.conftest import Boot, Daemon
from vbus.control.client import ControlClient

NAMES = ("vm1", "process")
CONFIG = """
[[device]]
name = "lan0"
class = "switch"
""" + "".join(
    f"""
[[bus]]
name = "{name}"
[[device]]
name = "net-{name}"
class = "venet"
bus = "{name}"
switch = "lan0"
[[guest]]
name = "{name}"
bus = "{name}"
"""
    for name in NAMES
)
RUN = ("guest", "run", "--json", "--frames")
TRACER = Path(__file__).with_name("traced.py")
SHARED = (
    *("bridge.py", "calls.py", "device.py", "eventqueue.py", "memory.py"),
    *("registry.py", "tasks.py", "drivers/echo.py", "drivers/frames.py"),
    "drivers/venet.py",
)
WITHIN_S = 60


class Reader:
    """The lines a guest says, as events, each looked for in turn."""

    def __init__(self, name: str, lines: AsyncIterator[str]) -> None:
        self._name = name
        self._lines = lines

    async def told(self, **wanted: object) -> dict[str, Any]:
        with trio.move_on_after(WITHIN_S):
            async for line in self._lines:
                event: dict[str, Any] = json.loads(line)
                if wanted.items() <= event.items():
                    return event
        raise AssertionError(f"{self._name} did not tell {wanted}")


async def lines_of(stream: trio.abc.ReceiveStream) -> AsyncGenerator[str, None]:
    rest = b""
    async for part in stream:
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            yield line.decode()


async def scenario(
    control: ControlClient, guests: list[Reader], stop: list[Callable[[int], Any]]
) -> None:
    """Devices come, frames and pings go between the two, a device goes; the end."""
    for guest, name in zip(guests, NAMES, strict=True):
        await guest.told(name=f"net-{name}", state="running")
    for guest, name in zip(guests, NAMES, strict=True):
        about = {"name": f"late-{name}", "class_name": "echo", "buses": [name]}
        await control.request("device.add", **about, attributes={})
        await guest.told(name=f"late-{name}", state="running")
    for guest, send, name in zip(guests, stop, NAMES, strict=True):
        trips = 0
        with trio.fail_after(WITHIN_S):
            while trips < 100:
                send(signal.SIGUSR1)
                shown = await guest.told(event="statistics")
                exchange = shown["devices"][f"net-{name}"]["driver"]["exchange"]
                trips = exchange["round_trips"]
    for guest, name in zip(guests, NAMES, strict=True):
        await control.request("device.remove", name=f"late-{name}")
        await guest.told(name=f"late-{name}", state="gone")
    for send in stop:
        send(signal.SIGTERM)


@asynccontextmanager
async def traced_process(socket: Path, report: Path) -> AsyncIterator[trio.Process]:
    words = [sys.executable, str(TRACER), str(report), *RUN[:2], str(socket), *RUN[2:]]
    process = await trio.lowlevel.open_process(words, stdout=subprocess.PIPE)
    try:
        yield process
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()
            assert process.stdout is not None
            await process.stdout.aclose()


def table(vm: dict[str, Any], process: dict[str, Any]) -> str:
    rows = [f"{'proxy/':22} {'functions':>12} {'lines: VM':>11} {'process':>11}"]
    for name in sorted(vm.keys() | process.keys()):
        empty = {"functions": [], "lines": 0, "all_lines": 0}
        ours, other = vm.get(name, empty), process.get(name, empty)
        both = set(ours["functions"]) & set(other["functions"])
        counts = f"{len(both)} of {len({*ours['functions'], *other['functions']})}"
        shares = (
            f"{one['lines']}/{one['all_lines']}" if one["lines"] else "-"
            for one in (ours, other)
        )
        rows.append(f"{name:22} {counts:>12} " + " ".join(f"{s:>11}" for s in shares))
    return "\n".join(rows)


async def test_the_same_driver_code_runs_in_machines_and_processes(
    daemon: Daemon, boot: Boot, tmp_path: Path
) -> None:
    """R50, R61: function by function; only how the function is reached differs."""
    served = daemon(CONFIG)
    report = tmp_path / "process.json"
    async with (
        ControlClient(served.runtime / "control.sock") as control,
        boot(served.socket("vm1")) as vm,
        traced_process(served.socket("process"), report) as process,
    ):
        await vm.put("/tmp/traced.py", TRACER.read_bytes())
        inside = await vm.start("python3", "/tmp/traced.py", "/tmp/vm.json", *RUN)
        assert process.stdout is not None
        async with aclosing(lines_of(process.stdout)) as lines:
            readers = [Reader("vm1", aiter(inside)), Reader("process", lines)]
            await scenario(control, readers, [inside.signal, process.send_signal])
        with trio.fail_after(WITHIN_S):
            assert (await inside.wait(), await process.wait()) == (0, 0)
        ran = {
            "vm": json.loads(await vm.get("/tmp/vm.json")),
            "process": json.loads(report.read_bytes()),
        }
    print(table(ran["vm"], ran["process"]))
    for name in SHARED:
        assert ran["vm"][name]["functions"] == ran["process"][name]["functions"], name
    assert ran["process"].keys() - ran["vm"].keys() == {"vfio_user.py", "doorbells.py"}
    assert all(
        name.startswith("linux/") for name in ran["vm"].keys() - ran["process"].keys()
    )
