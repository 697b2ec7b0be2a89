"""Rounds on virtual machines: each in a process and a network of its own.

What is to be had here is asked once (`unavailable`). A round (`machine.py`) is told to
end by the end of its stdin, so that no QEMU outlives an interrupted run.
"""

import os
import shutil
import subprocess
import sys

import msgspec
import trio

from vbus.compare.machine import WAYS
from vbus.compare.round import Outcome, Round
from vbus.compare.subjects import SubjectError
from vbus.errors import VbusError
from vbus.vm import image, qemu
from vbus.vm.cache import Say, silent

_END_S = 30.0

__all__ = ["WAYS", "one_round", "prepare", "unavailable"]


def unavailable() -> str:
    """Say why there can be no machines here, or nothing; fetches nothing."""
    try:
        if qemu.find() is None:
            return "no QEMU with vfio-user-pci: run `vbus guest qemu`"
    except VbusError as error:
        return str(error)
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        return "/dev/net/tun cannot be opened"
    if (
        shutil.which("unshare") is None
        or subprocess.run(
            [*_namespace(), "true"], check=False, capture_output=True
        ).returncode
    ):
        return "no network namespace may be made: run as root"
    return ""


def prepare(say: Say = silent) -> None:
    """Fetch and make what a machine needs. Raises VbusError, OSError."""
    qemu.fetch(say)
    image.cached(say)


def _namespace() -> list[str]:
    root = os.geteuid() == 0
    return ["unshare", "--net", *([] if root else ["--map-root-user"])]


async def one_round(way: str, count: int, loaded: bool) -> Round:
    """Measure one machine once. Raises SubjectError with the reason why not."""
    words = [way, str(count), *(["--loaded"] if loaded else [])]
    process = await trio.lowlevel.open_process(
        [*_namespace(), sys.executable, "-m", "vbus.compare.machine", *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    said: dict[str, bytes] = {}
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_all, said, "out", process.stdout)
            nursery.start_soon(_all, said, "err", process.stderr)
        await process.wait()
    finally:
        await _end(process)
    if not said["out"]:
        lines = said["err"].decode(errors="replace").split("\n")
        last = next((one for one in reversed(lines) if one.strip()), "nothing")
        raise SubjectError(f"the round ended, saying {last}")
    outcome = msgspec.json.decode(said["out"], type=Outcome)
    if outcome.found is None:
        raise SubjectError(outcome.stopped)
    return outcome.found


async def _all(said: dict[str, bytes], name: str, stream: object) -> None:
    assert isinstance(stream, trio.abc.ReceiveStream)
    said[name] = b"".join([part async for part in stream])


async def _end(process: trio.Process) -> None:
    """Close what holds it; kill it if it goes on."""
    assert process.stdin is not None
    with trio.CancelScope(shield=True):
        await process.stdin.aclose()
        with trio.move_on_after(_END_S):
            await process.wait()
        if process.returncode is None:
            process.kill()
            await process.wait()
        for stream in (process.stdout, process.stderr):
            assert stream is not None
            await trio.aclose_forcefully(stream)
