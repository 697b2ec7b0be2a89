"""TCP through a venet whose process is killed: the connection lives, and is whole."""

import random
import subprocess
import time
from functools import partial
from pathlib import Path

import pytest
import trio

from tests.netns import isolated
from tests.system.served import WITHIN_S, Served
from tests.system.test_transparent import KILLS, PAUSE_S, ask, kill, other_process
from tests.transfer import PORT, Call, here, process_guest, receive, send

HOST, GUEST = "10.9.0.1", "10.9.0.2"
CONFIG = f"""
[[backend]]
name = "far"
classes = ["switch", "switch-tap", "venet", "virtio-net"]
restart_limit = 1000000
deadline_s = 30
[[device]]
name = "lan0"
class = "switch"
[[device]]
name = "up0"
class = "switch-tap"
switch = "lan0"
ifname = "lan0"
address = "{HOST}/24"
[[bus]]
name = "bus0"
[[device]]
name = "card"
class = "CLASS"
bus = "bus0"
switch = "lan0"
[[guest]]
name = "g1"
bus = "bus0"
"""
SECONDS = max(3, round(KILLS * (PAUSE_S + 1.5)))


def interface() -> tuple[str, str]:
    """Number and address of the host's interface."""
    words = ["ip", "-o", "link", "show", "lan0"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    fields = done.stdout.split()
    return fields[0], fields[fields.index("link/ether") + 1]


async def kill_at_times(daemon: Served, done: trio.Event, gaps: list[float]) -> None:
    choice = random.Random(3)
    while not done.is_set() and len(gaps) < KILLS:
        await trio.sleep(PAUSE_S + choice.random() / 2)
        pid = await kill(daemon)
        killed = time.monotonic()
        await other_process(daemon, pid)
        gaps.append(time.monotonic() - killed)
        if len(gaps) % 2:  # as for an upgrade
            await ask(daemon, "device.restart", name="card")


async def transfer(source: Call, sink: Call, address: str, done: trio.Event) -> None:
    """One connection, for some seconds; both ends find one checksum."""
    sums: list[str] = []

    async def take() -> None:
        sums.append(await sink(receive, PORT))

    with trio.fail_after(WITHIN_S + 3 * SECONDS):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(take)
            sums.append(await source(send, address, PORT, 20 * SECONDS << 20, 0.05))
    assert sums[0] == sums[1]
    done.set()


@pytest.mark.parametrize("kind", ["venet", "virtio-net"])
@isolated
async def test_a_tcp_connection_lives_through_kills(tmp_path: Path, kind: str) -> None:
    """Issue 6: from the guest and to it, and through restarts; the TAP is never gone.

    It is when its device is removed.
    """
    gaps: list[float] = []
    with Served(tmp_path, CONFIG.replace("CLASS", kind)) as daemon:
        before = interface()
        async with process_guest(daemon, "g1", f"card={GUEST}/24") as prefix:
            guest = partial(here, prefix=prefix)
            for source, sink, address in ((guest, here, HOST), (here, guest, GUEST)):
                done, count = trio.Event(), len(gaps)
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(transfer, source, sink, address, done)
                    mine: list[float] = []
                    await kill_at_times(daemon, done, mine)
                    gaps += mine
                assert len(gaps) > count
            assert interface() == before
        for name in ("card", "up0"):
            await ask(daemon, "device.remove", name=name)
        with pytest.raises(subprocess.CalledProcessError):
            interface()
        assert "Traceback" not in daemon.log.read_text()
    gaps.sort()
    print(f"{len(gaps)} kills; up again after {gaps[len(gaps) // 2]:.2f} s (median)")
