"""Guest and host as two processes: the command, signals, and sudden deaths."""

import json
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from proxy.guest import attach
from tests.proxy.host import Host, open_fds, until
from vbus.errors import NoDeviceError

GUEST = "from proxy.cli import run; run(prog_name='guest')"


class Lines:
    """The lines of JSON a process prints."""

    def __init__(self, stream: trio.abc.ReceiveStream) -> None:
        self._stream = stream
        self._buffer = b""
        self._passed: list[dict[str, Any]] = []

    async def text(self) -> str:
        with trio.fail_after(10):
            while b"\n" not in self._buffer:
                data = await self._stream.receive_some()
                if not data:
                    raise EOFError
                self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line.decode()

    async def until(self, **wanted: object) -> dict[str, Any]:
        """Give the first object with these values that was not given before."""
        for values in self._passed:
            if wanted.items() <= values.items():
                self._passed.remove(values)
                return values
        while True:
            values = json.loads(await self.text())
            if wanted.items() <= values.items():
                return values
            self._passed.append(values)


@asynccontextmanager
async def process(
    *arguments: str, **options: Any
) -> AsyncIterator[tuple[trio.Process, Lines]]:
    """Run Python with `arguments`; it is killed if it has not ended by itself."""
    async with trio.open_nursery() as nursery:
        running: trio.Process = await nursery.start(
            partial(
                trio.run_process,
                [sys.executable, *arguments],
                stdout=subprocess.PIPE,
                check=False,
                **options,
            )
        )
        assert running.stdout is not None
        try:
            yield running, Lines(running.stdout)
        finally:
            if running.poll() is None:
                running.kill()
            running.stdout.close()  # type: ignore[attr-defined]


def guest(path: Path, *options: str) -> Any:
    return process("-c", GUEST, str(path), "--json", *options)


def host_process(path: Path) -> Any:
    return process("-m", "tests.proxy.serve", str(path))


async def ended(running: trio.Process) -> int:
    with trio.fail_after(10):
        return await running.wait()


async def test_the_command_runs_drivers_until_told_to_end(host: Host) -> None:
    """R61: attach, devices that come and go, statistics, an orderly end."""
    path = await host.add_guest()
    host.add("echo0")
    async with guest(path) as (running, lines):
        attached = await lines.until(event="attached")
        assert (attached["queues"], attached["vectors"]) == (8, 8)
        device = await lines.until(event="device", name="echo0", state="running")
        assert device["type"] == "org.vbus.echo"
        host.add("echo1")
        await lines.until(name="echo1", state="running")
        host.drop("echo1")
        await lines.until(name="echo1", state="gone")
        running.send_signal(signal.SIGUSR1)
        values = await lines.until(event="statistics")
        assert values["bridge"]["events"]["devdrop"] == 1
        assert values["devices"]["echo0"]["state"] == "running"
        assert values["bridge"]["calls"]["fast_calls"] == 8
        running.send_signal(signal.SIGTERM)
        await lines.until(event="statistics")
        await lines.until(name="echo0", state="ended")
        assert await ended(running) == 0
    await until(lambda: host.servers["g1"].statistics().peer is None)
    assert host.bridges["g1"].statistics().connections == 0


async def test_the_command_is_as_good_on_the_original_protocol(host: Host) -> None:
    path = await host.add_guest(msix=False)
    host.add("echo0")
    async with guest(path, "--compat") as (running, lines):
        assert (await lines.until(event="attached"))["queues"] == 1
        await lines.until(name="dev0", state="running")
        running.send_signal(signal.SIGINT)
        assert await ended(running) == 0


async def test_the_command_says_what_is_wrong(host: Host, tmp_path: Path) -> None:
    """Exit status 3: nobody there; 1: refused; 2: misused; each with one line."""
    path = await host.add_guest()
    async with attach(path):
        for arguments, status, text in (
            ([str(tmp_path / "none.sock")], 3, b"cannot reach"),
            ([str(path)], 1, b"EBUSY"),
            ([str(path), "--address", "p1"], 2, b"DEV=ADDRESS"),
        ):
            result = await trio.run_process(
                [sys.executable, "-c", GUEST, *arguments],
                capture_stderr=True,
                check=False,
            )
            assert result.returncode == status
            assert text in result.stderr
            assert b"Traceback" not in result.stderr


async def test_a_killed_guest_leaves_nothing_in_the_host(host: Host) -> None:
    """SIGKILL: the host closes what was open, and the next guest attaches."""
    path = await host.add_guest()
    host.add("echo0")
    before = open_fds()
    for _ in range(3):
        async with guest(path) as (running, lines):
            await lines.until(name="echo0", state="running")
            assert host.bridges["g1"].statistics().signals == 2
            running.kill()
            await ended(running)
        await until(lambda: not host.bridges["g1"].memory.regions())
        assert host.bridges["g1"].statistics().connections == 0
    await until(lambda: open_fds() == before)


async def test_a_killed_host_is_a_clear_error_in_the_guest(tmp_path: Path) -> None:
    """Whoever waits gets the error, and nothing of the connection stays."""
    before = open_fds()
    path = tmp_path / "g1.sock"

    async def use(running: trio.Process) -> None:
        async with attach(path) as bridge:
            proxy = await bridge.device("echo0")
            await proxy.open()
            _, shm = await proxy.ring(0, 16)
            assert await proxy.call(0, b"hello") == (0, b"hello")
            running.kill()
            await shm.wake.wait()

    async with host_process(path) as (running, lines):
        assert await lines.text() == "ready"
        with pytest.raises(NoDeviceError, match="host closed the connection"):
            await use(running)
    assert open_fds() == before


async def test_the_command_ends_when_its_host_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "g1.sock"
    async with host_process(path) as (host, lines):
        assert await lines.text() == "ready"
        async with guest(path, "--frames") as (running, output):
            await output.until(name="p1", state="running")
            host.kill()
            await output.until(name="p1", state="gone")
            assert await ended(running) == 1


async def test_generated_frames_cross_from_process_to_process(tmp_path: Path) -> None:
    """R15, R61: without any right at all, real frames through the real switch."""
    path = tmp_path / "g1.sock"
    async with host_process(path) as (_, lines):
        assert await lines.text() == "ready"
        async with guest(path, "--frames") as (running, output):
            await output.until(name="p1", state="running")
            await output.until(name="p2", state="running")
            exchanged = 0
            with trio.fail_after(10):
                while exchanged < 1000:
                    running.send_signal(signal.SIGUSR1)
                    values = await output.until(event="statistics")
                    driver = values["devices"]["p1"]["driver"]
                    exchanged = driver["exchange"]["received_frames"]
            assert driver["exchange"]["peers"] == 1
            assert driver["frames"]["rx_errors"] == 0
            running.send_signal(signal.SIGTERM)
            assert await ended(running) == 0
