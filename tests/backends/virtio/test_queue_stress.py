"""Two processes, one virtqueue, random batches, wishes and sleeps: nothing is lost."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from shm import create_memfd
from tests.backends.virtio import queue_end
from tests.backends.virtio.driver_ring import EVENT_IDX, INDIRECT, PACKED

ROOT = Path(__file__).parents[3]
RINGS = {
    "split": 0,
    "split-event": EVENT_IDX | INDIRECT,
    "packed": PACKED,
    "packed-event": PACKED | EVENT_IDX | INDIRECT,
}


def start(side: str, numbers: tuple[int, ...], fds: tuple[int, ...]) -> "Process":
    command = [sys.executable, "-m", "tests.backends.virtio.queue_end", side]
    return subprocess.Popen(
        [*command, *map(str, (*numbers, *fds))],
        pass_fds=fds,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        text=True,
    )


Process = subprocess.Popen[str]


def run_ends(features: int, size: int, chains: int, seed: int, limit_s: float) -> int:
    """Run both ends to the end; how often they slept."""
    memfd = create_memfd("stress", queue_end.MEMORY)
    bells = os.eventfd(0), os.eventfd(0)
    numbers = features, size, chains
    ends = [start("driver", (*numbers, seed), (memfd, *bells))]
    try:
        assert ends[0].stdout is not None
        assert ends[0].stdout.readline() == "ready\n"
        ends.append(start("device", (*numbers, seed + 1), (memfd, *bells[::-1])))
        done = [end.communicate(timeout=limit_s) for end in ends]
    finally:
        for end in ends:
            end.kill()
            end.communicate()
        for fd in (memfd, *bells):
            os.close(fd)
    assert [end.returncode for end in ends] == [0, 0], done
    return sum(int(out) for out, _ in done)


@pytest.mark.parametrize("size", [4, 256])
@pytest.mark.parametrize("ring", RINGS)
def test_no_chain_and_no_notification_is_lost(ring: str, size: int) -> None:
    """R12, R27: a watchdog looks for sleepers with work, while indices wrap.

    VBUS_CHAINS of them go through each ring.
    """
    chains = int(os.environ.get("VBUS_CHAINS", "70000"))
    assert run_ends(RINGS[ring], size, chains, size, 60 + chains / 5000) > 0
