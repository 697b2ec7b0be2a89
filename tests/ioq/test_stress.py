"""Two processes, one ring, random batches, masks and sleeps: nothing lost (R6, R12)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ioq import Ring, ring_size
from shm import AddressSpace, create_memfd
from tests.ioq import stress_end

ROOT = Path(__file__).parents[2]


def run_ends(sender: str, messages: int, seed: int, limit_s: float) -> list[int]:
    """Run both ends to the end; how often each of them slept."""
    memfd = create_memfd("stress", stress_end.MEMORY)
    space = AddressSpace()
    space.map(0, stress_end.MEMORY, memfd)
    Ring.format(space.view(0, ring_size(stress_end.COUNT)), stress_end.COUNT)
    bells = {"north": os.eventfd(0), "south": os.eventfd(0)}
    ends = []
    for side, other in (("north", "south"), ("south", "north")):
        what = "send" if side == sender else "receive"
        numbers = (messages, seed + len(ends), memfd, bells[side], bells[other])
        command = [sys.executable, "-m", "tests.ioq.stress_end", side, what]
        ends.append(
            subprocess.Popen(
                [*command, *map(str, numbers)],
                pass_fds=(memfd, *bells.values()),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd=ROOT,
                text=True,
            )
        )
    try:
        outputs = [end.communicate(timeout=limit_s) for end in ends]
    finally:
        for end in ends:
            end.kill()
            end.wait()
        space.close()
        for fd in (memfd, *bells.values()):
            os.close(fd)
    assert [
        (end.returncode, error) for end, (_, error) in zip(ends, outputs, strict=True)
    ] == [
        (0, ""),
        (0, ""),
    ]
    return [int(out) for out, _ in outputs]


@pytest.mark.parametrize("sender", ["north", "south"])
@pytest.mark.parametrize("seed", range(3))
def test_no_message_and_no_wakeup_is_lost(sender: str, seed: int) -> None:
    """R6, R12: 300,000 messages in order; a watchdog looks for sleepers with work."""
    sleeps = run_ends(sender, 300_000, 100 * seed, 60)
    assert sum(sleeps) > 0


@pytest.mark.slow
@pytest.mark.parametrize("sender", ["north", "south"])
def test_ten_million_messages(sender: str) -> None:
    """R6, R12: the same, ten million each way."""
    run_ends(sender, 10_000_000, os.getpid(), 120)
