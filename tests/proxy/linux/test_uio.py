"""The function by uio on a folder like sysfs, and polling by a clock of its own.

With a real function: tests/vm/test_guest_run.py.
"""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import trio
import trio.testing

from proxy.linux import uio
from proxy.linux.uio import POLL_MAX_S, POLL_MIN_S, PolledInterrupts, UioFunction
from tests.proxy.host import open_fds
from tests.proxy.linux.sysfs import add_function, bridge
from vbus.errors import InvalidError, NoDeviceError
from vbus.pci.constants import Command, Irq, Offset


@pytest.fixture
def function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[UioFunction]:
    monkeypatch.setattr(uio, "DEV", tmp_path / "dev")
    add_function(tmp_path)
    before = open_fds()
    function = UioFunction(bridge(tmp_path))
    yield function
    function.close()
    function.close()
    assert open_fds() == before


def command(function: UioFunction) -> int:
    config = (function.device.path / "config").read_bytes()
    return int.from_bytes(config[Offset.COMMAND : Offset.COMMAND + 2], "little")


async def test_each_bar_is_accessed_at_its_offset(function: UioFunction) -> None:
    assert await function.bar_read(0, 8, 4) == bytes([8, 9, 10, 11])
    assert await function.bar_read(0, 63, 1) == b"\x3f"
    await function.bar_write(0, 4, b"abcd")
    function.post_write(1, 8, b"wxyz")
    function.ring_doorbell(1, 0, 0x04030201)
    await function.config_write(0x3C, b"\x0b")
    path = function.device.path
    assert (path / "resource0").read_bytes()[3:9] == b"\x03abcd\x08"
    assert (path / "resource1").read_bytes()[:12] == b"\x01\x02\x03\x04\0\0\0\0wxyz"
    assert (await function.config_read(0x3C, 1)) == b"\x0b"
    statistics = function.statistics()
    assert (statistics.config_reads, statistics.config_writes) == (1, 1)
    assert (statistics.bar_reads, statistics.bar_writes) == (2, 3)


@pytest.mark.parametrize(
    ("bar", "offset", "size"),
    [(0, 64, 4), (0, 2, 4), (0, -4, 4), (0, 0, 3), (0, 0, 64), (1, 32, 4), (2, 0, 4)],
)
async def test_what_is_no_access_of_a_bar_is_refused(
    function: UioFunction, bar: int, offset: int, size: int
) -> None:
    with pytest.raises(InvalidError):
        await function.bar_read(bar, offset, size)
    if bar != 1:
        with pytest.raises(InvalidError):
            function.post_write(bar, offset, bytes(size))


async def test_intx_is_disabled_while_open_and_bus_mastering_ends(
    function: UioFunction,
) -> None:
    """An INTx of the bridge is spurious to the kernel."""
    assert command(function) == Command.INTX_DISABLE
    await function.set_command(Command.MEMORY | Command.BUS_MASTER, on=True)
    assert command(function) & Command.BUS_MASTER
    function.close()
    assert command(function) == Command.INTX_DISABLE
    with pytest.raises(NoDeviceError, match=r"0000:00:04.0 is closed"):
        await function.config_read(0, 2)
    with pytest.raises(NoDeviceError):
        function.post_write(0, 0, bytes(4))


async def test_a_function_that_reads_as_all_ones_is_gone(
    function: UioFunction, autojump_clock: trio.testing.MockClock
) -> None:
    """R61: the host died, and the machine lives on."""
    interrupts = await function.enable_interrupts(Irq.INTX, 1)
    interrupts.watch(lambda: False)
    config = function.device.path / "config"
    data = config.read_bytes()
    (function.device.path / "resource0").write_bytes(b"\xff" * 64)
    # A register may hold that: the function is still there.
    assert await function.bar_read(0, 0, 4) == b"\xff" * 4
    async with trio.open_nursery() as nursery:
        nursery.start_soon(function.run)
        await trio.sleep(5)
        assert function.error is None
        config.write_bytes(b"\xff" * len(data))
        with (
            trio.fail_after(5),
            pytest.raises(NoDeviceError, match="does not answer any more"),
        ):
            await interrupts.wait()
    with pytest.raises(NoDeviceError):
        await function.bar_read(0, 0, 4)


async def test_other_interrupts_are_refused(function: UioFunction) -> None:
    assert function.interrupt_vectors(Irq.INTX) == 1
    assert function.interrupt_vectors(Irq.MSIX) == 0
    for kind, vectors in ((Irq.MSI, 1), (Irq.MSIX, 8), (Irq.INTX, 2)):
        with pytest.raises(InvalidError):
            await function.enable_interrupts(kind, vectors)


async def test_polling_slows_down_and_is_quick_again_after_work(
    autojump_clock: trio.testing.MockClock,
) -> None:
    looks: list[float] = []
    ready = False

    def look() -> bool:
        looks.append(trio.current_time())
        return ready or len(looks) == 10

    interrupts = PolledInterrupts()
    interrupts.watch(look)
    assert await interrupts.wait() == [0]
    pauses = [after - before for before, after in pairwise(looks)]
    assert pauses == pytest.approx([0.002, 0.004, 0.008] + [POLL_MAX_S] * 6)
    ready = True
    began = trio.current_time()
    for _ in range(3):
        assert await interrupts.wait() == [0]
    assert trio.current_time() - began == pytest.approx(3 * POLL_MIN_S)
    assert interrupts.statistics().by_vector == (4,)
    interrupts.close()


async def test_whoever_waits_for_polling_hears_of_the_end(
    autojump_clock: trio.testing.MockClock,
) -> None:
    interrupts = PolledInterrupts()
    interrupts.watch(lambda: False)
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def wait() -> None:
            with pytest.raises(NoDeviceError, match="over"):
                await interrupts.wait()

        await trio.sleep(1)
        interrupts.fail(NoDeviceError("over"))
    with pytest.raises(NoDeviceError):
        await interrupts.wait()
