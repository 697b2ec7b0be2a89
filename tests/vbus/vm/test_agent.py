"""The guest's agent and the host's channel, with a socket in place of the port."""

import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from vbus.vm import machine
from vbus.vm.channel import Channel
from vbus.vm.errors import GuestError, GuestGoneError

AGENT = Path(machine.__file__).parent / "guest/agent.py"
pytestmark = pytest.mark.usefixtures("no_fd_leak")
# The agent opens its port by name; a socket has none, so it is handed over here.
START = """
import os, sys
sys.path.insert(0, os.path.dirname(sys.argv[1]))
fd = int(sys.argv[2])
real = os.open
os.open = lambda path, *about: fd if path == "port" else real(path, *about)
os.set_blocking(fd, False)
import agent
agent.Agent("port").run()
"""


@asynccontextmanager
async def connected() -> AsyncIterator[Channel]:
    ours, theirs = trio.socket.socketpair()
    with ours, theirs:
        process = spawn(theirs.fileno())
        try:
            async with trio.open_nursery() as nursery:
                channel = Channel(ours, lambda: "")
                nursery.start_soon(channel.run)
                with trio.fail_after(20):
                    await channel.wait_up()
                    yield channel
                nursery.cancel_scope.cancel()
        finally:
            process.kill()
            process.wait()


def spawn(fd: int) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, "-c", START, str(AGENT), str(fd)], pass_fds=[fd]
    )


async def test_output_comes_as_lines_and_the_status_after_it() -> None:
    async with connected() as channel:
        script = "echo one; printf 'two\\nthree'; echo no >&2; exit 5"
        job = channel.request("start", "sh", argv=["sh", "-c", script], env={})
        await job.started()
        assert [line async for line in job] == ["one", "two", "three"]
        assert await job.wait() == 5
        assert job.stderr == b"no\n"


async def test_output_of_a_megabyte_is_whole() -> None:
    async with connected() as channel:
        script = "head -c 1000003 /dev/zero"
        job = channel.request("start", "sh", argv=["sh", "-c", script], env={})
        assert await job.output() == bytes(1000003)
        assert await job.wait() == 0


async def test_jobs_run_beside_each_other_and_take_signals() -> None:
    async with connected() as channel:
        sleeping = channel.request("start", "sleep", argv=["sleep", "99"], env={})
        quick = channel.request("start", "true", argv=["true"], env={})
        assert await quick.wait() == 0
        sleeping.signal(signal.SIGTERM)
        assert await sleeping.wait() == -signal.SIGTERM


async def test_a_program_that_is_not_there_fails_by_name() -> None:
    async with connected() as channel:
        job = channel.request("start", "nothing", argv=["no-such-thing"], env={})
        with pytest.raises(GuestError, match=r"nothing: FileNotFoundError"):
            await job.wait()


async def test_an_unknown_request_is_refused_and_the_agent_goes_on() -> None:
    async with connected() as channel:
        with pytest.raises(GuestError, match=r"do_nonsense"):
            await channel.request("nonsense", "x").wait()
        assert await channel.request("start", "t", argv=["true"], env={}).wait() == 0


async def test_ending_a_job_ends_what_it_started() -> None:
    async with connected() as channel:
        script = "sleep 99 & echo $!; wait"
        job = channel.request("start", "sh", argv=["sh", "-c", script], env={})
        pid = int(await anext(aiter(job)))
        os.kill(pid, 0)
        job.end()
        assert await job.output() == b""  # its end: both have closed their stdout
        assert await job.wait() == -signal.SIGKILL


async def test_what_waits_is_told_why_the_guest_is_gone() -> None:
    async with connected() as channel:
        job = channel.request("start", "sleep", argv=["sleep", "99"], env={})
        await job.started()
        channel.give_up(GuestGoneError("it panicked"))
        with pytest.raises(GuestGoneError, match="it panicked"):
            await job.wait()
        with pytest.raises(GuestGoneError, match="it panicked"):
            channel.request("start", "true", argv=["true"], env={})
        with pytest.raises(GuestGoneError, match="it panicked"):
            await channel.wait_up()
        job.end()
