"""A virtual machine under a trio task: boot it, run things in it, and it is gone.

    async with boot(image, [daemon.socket("vm1")]) as vm:
        done = await vm.run("lspci", "-vv")
        devices = await vm.python(function, "argument")

QEMU is killed when the block is left, however it is left. Nothing stays but the log
folder with the console.
"""

import base64
import inspect
import json
import math
import os
import shutil
import socket
import subprocess
import tempfile
import textwrap
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType
from typing import Any

import trio

from vbus.errors import InvalidError
from vbus.vm import accelerator, arguments, qemu
from vbus.vm.arguments import Iommu
from vbus.vm.channel import Channel, GuestProcess
from vbus.vm.console import Console
from vbus.vm.errors import (
    GuestCommandError,
    GuestError,
    GuestGoneError,
    GuestPythonError,
    GuestTimeoutError,
)
from vbus.vm.image import GuestImage
from vbus.vm.qmp import Qmp

BOOT_TIMEOUT_S = 60
RUN_TIMEOUT_S = 60
_PUT_CHUNK = 1 << 18


@dataclass(frozen=True)
class Done:
    """How a program in the guest ended; status is negative for a signal."""

    argv: tuple[str, ...]
    status: int
    stdout: str
    stderr: str


class VirtualMachine:
    """A running QEMU whose guest has been up once. Made by `boot`."""

    def __init__(self, process: "subprocess.Popen[bytes]", log: Path) -> None:
        self._process = process
        self.pid = process.pid
        self.log = log
        self.console = log / "console"
        self.boot_seconds = math.nan
        """From the start of QEMU to the agent's first word."""
        self.qmp: Qmp
        self._channel: Channel
        self._screen: Console
        self._exited = trio.Event()

    @property
    def gone(self) -> bool:
        """QEMU has ended."""
        return self._exited.is_set()

    # What runs in the guest

    async def run(
        self,
        *argv: str,
        check: bool = True,
        timeout_s: float = RUN_TIMEOUT_S,
        env: dict[str, str] | None = None,
    ) -> Done:
        """Run a program to its end.

        Raises GuestCommandError (status other than 0, if `check`), GuestTimeoutError,
        GuestGoneError, GuestError (no such program). If cancelled, it is killed.
        """
        with self._limit(timeout_s, argv[0]):
            process = await self.start(*argv, env=env)
            try:
                stdout = await process.output()
                status = await process.wait()
            finally:
                process.end()
        stderr = process.stderr.decode(errors="replace")
        if check and status:
            words = " ".join(argv)
            raise GuestCommandError(f"{words!r} ended with {status}: {stderr.strip()}")
        return Done(argv, status, stdout.decode(errors="replace"), stderr)

    async def start(
        self, *argv: str, env: dict[str, str] | None = None
    ) -> GuestProcess:
        """Start a program that goes on in the background. Raises as `run` does."""
        job = self._channel.request("start", argv[0], argv=argv, env=env or {})
        await job.started()
        return job

    async def python(
        self,
        function: Callable[..., Any] | str,
        *args: object,
        timeout_s: float = RUN_TIMEOUT_S,
    ) -> Any:
        """Call a function in the guest; its source, arguments and value travel.

        The function (async or not) imports what it uses and has no outer variables.
        Of a text, the function `main` is called. Arguments and value are JSON's.
        Raises GuestPythonError, GuestTimeoutError, GuestGoneError, InvalidError.
        """
        source, name = _source(function)
        with self._limit(timeout_s, f"Python's {name}"):
            job = self._channel.request(
                "python", name, source=source, name=name, args=args
            )
            try:
                status = await job.wait()
            finally:
                job.end()
        if not job.result:
            raise GuestPythonError(f"{name} left with status {status}", "")
        answer = json.loads(job.result)
        if "error" in answer:
            raise GuestPythonError(answer["error"], answer["traceback"])
        return answer["value"]

    async def put(self, path: str, data: bytes, mode: int = 0o644) -> None:
        """Write a file in the guest. Raises GuestError, GuestGoneError."""
        with self._limit(RUN_TIMEOUT_S, f"writing {path}"):
            for offset in range(0, len(data) or 1, _PUT_CHUNK):
                part = base64.b64encode(data[offset : offset + _PUT_CHUNK]).decode()
                about = {"path": path, "offset": offset, "mode": mode, "data": part}
                await self._channel.request("put", path, **about).wait()

    async def get(self, path: str) -> bytes:
        """Read a file of the guest. Raises as `run` does."""
        with self._limit(RUN_TIMEOUT_S, f"reading {path}"):
            process = await self.start("cat", path)
            try:
                data = await process.output()
                if await process.wait():
                    raise GuestCommandError(process.stderr.decode(errors="replace"))
            finally:
                process.end()
        return data

    # The machine

    async def wait_up(self, timeout_s: float = BOOT_TIMEOUT_S) -> float:
        """Wait for the next boot not waited for yet; give the guest's uptime then.

        `boot` has waited for the first, so after a reset this is the one that follows.
        Raises GuestTimeoutError, GuestGoneError.
        """
        with self._limit(timeout_s, "booting"):
            return await self._channel.wait_up()

    async def reboot(self) -> float:
        """Reset the machine and wait until it is up again. Raises as `wait_up`."""
        await self.qmp.execute("system_reset")
        return await self.wait_up()

    async def wait_gone(self) -> int:
        """Wait until QEMU has ended, and give its exit status."""
        await self._exited.wait()
        assert self._process.returncode is not None
        return self._process.returncode

    async def kill(self) -> None:
        """Kill QEMU, as a crash would."""
        self._process.kill()
        await self._exited.wait()

    def tail(self) -> str:
        """Give the console's last lines, as the end of an error's message."""
        return self._screen.tail()

    def _limit(self, seconds: float, what: str) -> "_Limit":
        return _Limit(
            seconds, f"the guest did not finish {what} in {seconds:g} s", self
        )

    # The tasks

    async def serve(
        self,
        console: trio.socket.SocketType,
        agent: trio.socket.SocketType,
        monitor: trio.socket.SocketType,
        nursery: trio.Nursery,
    ) -> None:
        """Start what carries console, agent and monitor."""
        self._screen = Console(console, self.console, self._panic)
        self._channel = Channel(agent, self.tail)
        self.qmp = Qmp(monitor)
        nursery.start_soon(self._screen.run)
        nursery.start_soon(self._channel.run)
        nursery.start_soon(self._watch)
        nursery.start_soon(self.qmp.run)
        with suppress(GuestGoneError):  # the agent's absence says why
            await self.qmp.negotiate()

    def _panic(self) -> None:
        self._channel.give_up(GuestGoneError(f"the guest panicked{self.tail()}"))

    async def _watch(self) -> None:
        """Wait for QEMU's end, and say how it was."""
        pidfd = os.pidfd_open(self.pid)
        try:
            await trio.lowlevel.wait_readable(pidfd)
        finally:
            os.close(pidfd)
        status = self._process.wait()
        self._exited.set()
        said = (self.log / "qemu").read_text(errors="replace").strip()
        last = [e for e in self.qmp.events if e["event"] == "SHUTDOWN"]
        reason = f" ({last[-1]['data']['reason']})" if last else ""
        message = f"QEMU ended with status {status}{reason} {said}".rstrip()
        self._channel.give_up(GuestGoneError(message + self.tail()))


class _Limit:
    """A deadline whose error tells what was waited for and shows the console."""

    def __init__(self, seconds: float, message: str, vm: VirtualMachine) -> None:
        self._scope = trio.move_on_after(seconds)
        self._message = message
        self._vm = vm

    def __enter__(self) -> None:
        self._scope.__enter__()

    def __exit__(self, *about: Any) -> bool | None:
        swallowed = self._scope.__exit__(*about)
        if self._scope.cancelled_caught:
            raise GuestTimeoutError(self._message + self._vm.tail())
        return swallowed


@asynccontextmanager
async def boot(
    image: GuestImage,
    sockets: Sequence[Path] = (),
    *,
    memory_mib: int = 768,
    cpus: int = 2,
    iommu: Iommu | None = "intel",
    shared: bool = True,
    root_ports: int = 0,
    words: Sequence[str] = (),
    extra: Sequence[str] = (),
    log: Path | None = None,
    timeout_s: float = BOOT_TIMEOUT_S,
    emulator: qemu.Qemu | None = None,
) -> AsyncIterator[VirtualMachine]:
    """Boot an image with a bridge for each socket, and wait for its agent.

    `words` go on the kernel's command line, `extra` on QEMU's. `log` gets "console",
    "qemu" (its stderr) and "command"; without it they go with the machine.
    Raises NotFoundError (no QEMU), GuestTimeoutError, GuestGoneError.
    """
    found = emulator or qemu.find()
    if found is None:
        raise GuestError("no QEMU with vfio-user-pci: run `vbus guest qemu`")
    accel = await trio.to_thread.run_sync(accelerator.choose, found, image)
    command = [
        str(found.path),
        *arguments.platform_arguments(accel, cpus),
        *arguments.memory_arguments(memory_mib, shared=shared),
        *arguments.iommu_arguments(iommu),
        *arguments.root_port_arguments(root_ports),
        *arguments.kernel_arguments(image, iommu, words),
        *extra,
    ]
    for number, path in enumerate(sockets):
        command += arguments.bridge_device(path, f"vbus{number}")
    folder = log or Path(tempfile.mkdtemp(prefix="vbus-vm-"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        async with _running(command, folder, timeout_s) as vm:
            yield vm
    finally:
        if log is None:
            shutil.rmtree(folder, ignore_errors=True)


@asynccontextmanager
async def _running(
    command: list[str], log: Path, timeout_s: float
) -> AsyncIterator[VirtualMachine]:
    """Own the process and the three sockets to it."""
    began = trio.current_time()
    pairs = [socket.socketpair() for _ in range(3)]
    ours = [trio.socket.from_stdlib_socket(mine) for mine, _ in pairs]
    theirs = [other for _, other in pairs]
    try:
        try:
            fds = [other.fileno() for other in theirs]
            process = _spawn([*command, *arguments.channel_arguments(*fds)], fds, log)
        finally:
            for other in theirs:
                other.close()
        vm = VirtualMachine(process, log)
        failure = None
        try:
            async with trio.open_nursery() as nursery:
                try:
                    await vm.serve(ours[0], ours[1], ours[2], nursery)
                    await vm.wait_up(timeout_s)
                    vm.boot_seconds = trio.current_time() - began
                    yield vm
                except Exception as error:  # to leave without a group around it
                    failure = error
                nursery.cancel_scope.cancel()
            if failure is not None:
                raise failure
        finally:
            process.kill()
            process.wait()
    finally:
        for mine in ours:
            mine.close()


def _spawn(
    command: list[str], fds: Sequence[int], log: Path
) -> "subprocess.Popen[bytes]":
    # From this thread: the signal comes when the thread that started it ends.
    setpriv = shutil.which("setpriv")
    guard = [setpriv, "--pdeathsig", "KILL"] if setpriv else []
    (log / "command").write_text("\n".join(command) + "\n")
    with (log / "qemu").open("wb") as stderr:
        return subprocess.Popen(
            [*guard, *command],
            stdin=subprocess.DEVNULL,
            stdout=stderr,
            stderr=stderr,
            pass_fds=fds,
            process_group=0,
        )


def _source(function: Callable[..., Any] | str) -> tuple[str, str]:
    """Give the source and name of a function that stands on its own."""
    if isinstance(function, str):
        return function, "main"
    if not isinstance(function, FunctionType) or function.__name__ == "<lambda>":
        raise InvalidError(f"{function!r}: only a function with a name has a source")
    if function.__closure__:
        names = ", ".join(function.__code__.co_freevars)
        raise InvalidError(f"{function.__name__} uses {names} from outside: pass them")
    return textwrap.dedent(inspect.getsource(function)), function.__name__
