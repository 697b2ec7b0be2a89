"""The adapter's ABI: the examples of docs/abi.md 9.3 as bytes, and every refusal."""

import errno
import os
import re
from pathlib import Path

import pytest
import trio.testing

from backends.virtio.classes import (
    VirtioBlkDevice,
    VirtioConsoleDevice,
    VirtioRngDevice,
)
from tests.backends.virtio.bus import LIVE, SETUP, SIGNAL_AT, BusGuest, on_bus
from vbus.virtio import adapter as abi
from vbus.virtio.adapter import CONFIG_SHM, Func
from vbus.virtio.common import Ring, Status, bits

PAGE = Path(__file__).parents[3] / "docs" / "abi.md"
ACCEPTED = bits(Ring.INDIRECT_DESC, Ring.EVENT_IDX, Ring.VERSION_1)


def examples() -> dict[str, list[dict[int, bytes]]]:
    """The hex of section 9.3 by its comment: address -> bytes of a line."""
    section = PAGE.read_text().split("### 9.3")[1].split("\n## ")[0]
    found: dict[str, list[dict[int, bytes]]] = {}
    for part in section.split("<!-- ")[1:]:
        title, rest = part.split(" -->", 1)
        blocks = re.findall(r"```text\n(.*?)```", rest, re.DOTALL)
        found[title] = [
            {int(line[:4], 16): bytes.fromhex(line[6:]) for line in block.splitlines()}
            for block in blocks
        ]
    return found


def example(start: str, nth: int = 0) -> bytes:
    """One that is a call's data."""
    [blocks] = [each for title, each in examples().items() if title.startswith(start)]
    return b"".join(blocks[nth].values())


def check(start: str, guest: BusGuest) -> None:
    """One that is memory of queue 0: every byte that is shown."""
    [[lines]] = [each for title, each in examples().items() if title.startswith(start)]
    view = guest.shared[0].view
    shown = {at: view.read(at, len(data)).hex(" ") for at, data in lines.items()}
    assert shown == {at: data.hex(" ") for at, data in lines.items()}


async def refused(guest: BusGuest, code: int, func: int, data: bytes = b"") -> None:
    with pytest.raises(OSError, match=os.strerror(code)):
        await guest.call(func, data)


async def test_the_example_of_the_page_byte_for_byte() -> None:
    """R13: GETID to the first bytes, as docs/abi.md 9.3 shows it."""
    async with on_bus(VirtioRngDevice) as guest:
        assert (await guest.call(Func.GETID))[0] == 4
        _, info = await guest.call(Func.GETINFO, bytes(16))
        assert info == example("GETINFO")
        for select in range(2):
            data = abi.FEATURES.pack(select, 0xFFFF_FFFF)
            _, answer = await guest.call(Func.GETFEATURES, data)
            assert answer == example("GETFEATURES", select)
        assert await guest.status(SETUP) == SETUP
        for select in range(2):
            await guest.call(Func.SETFEATURES, example("SETFEATURES", select))
        assert await guest.status(SETUP | 8) == SETUP | Status.FEATURES_OK
        assert guest.device.model.features == ACCEPTED
        shared = await guest.share(0)
        _, queue = await guest.call(Func.GETQUEUE, bytes(16))
        assert queue == example("GETQUEUE")
        await guest.call(Func.ENABLEQUEUE, example("ENABLEQUEUE"))
        assert (await guest.call(Func.GETQUEUE, bytes(16)))[1][12] == 1
        assert await guest.status(LIVE) == LIVE
        await guest.settle()
        buffer = guest.peer.allocate(64)
        shared.view.write(0, buffer.to_bytes(8, "little") + b"\x40\0\0\0\2\0\0\0")
        shared.view.write(0x80, b"\0\0\1\0\0\0")
        lines = examples()[
            "The ring with one buffer of 64 bytes at 0x12380000, "
            "before the kick; at 0x96 is used_event"
        ]
        assert lines[0].pop(0)[8:] == shared.view.read(8, 8)  # the address is ours
        for at, data in lines[0].items():
            assert shared.view.read(at, len(data)) == data
        guest.kick(0)
        await guest.settle()
        check("The used ring after it", guest)
        check("The signal at 0xfc0", guest)
        assert guest.signalled(0)
        assert any(guest.peer.memory.read(buffer, 64))


LENGTHS = {
    Func.GETID: 0, Func.GETINFO: 16, Func.GETFEATURES: 8, Func.SETFEATURES: 8,
    Func.GETSTATUS: 0, Func.SETSTATUS: 4, Func.GETQUEUE: 16, Func.ENABLEQUEUE: 24,
    Func.RESETQUEUE: 4,
}  # fmt: skip


@pytest.mark.parametrize("func", list(LENGTHS), ids=lambda func: func.name)
async def test_another_length_is_refused(func: Func) -> None:
    async with on_bus(VirtioRngDevice) as guest:
        for size in {0, 4, 8, 16, 24, 25} - {LENGTHS[func]}:
            await refused(guest, errno.EINVAL, func, bytes(size))


async def test_unknown_functions_are_refused() -> None:
    async with on_bus(VirtioRngDevice) as guest:
        for func in (11, 255, 0xFFFF_FFFF):
            await refused(guest, errno.EINVAL, func)


async def test_features_by_words(tmp_path: Path) -> None:
    """2.2: what was not offered, or beyond what there is, keeps FEATURES_OK clear."""
    async with on_bus(VirtioRngDevice) as guest:
        for select in (2, 3, 4, 0xFFFF_FFFF):
            data = abi.FEATURES.pack(select, 0)
            assert await guest.call(Func.GETFEATURES, data) == (0, data)
        await guest.call(Func.SETFEATURES, abi.FEATURES.pack(9, 0))
        await refused(guest, errno.EINVAL, Func.SETFEATURES, abi.FEATURES.pack(4, 1))
        for word in (0, 1 << Ring.IN_ORDER, 1 << 127, 1 << Ring.NOTIFICATION_DATA):
            await guest.status(0)
            for select in range(4):
                part = (ACCEPTED | word) >> 32 * select & 0xFFFF_FFFF
                data = abi.FEATURES.pack(select, part)
                await guest.call(Func.SETFEATURES, data)
            settled = await guest.status(SETUP | Status.FEATURES_OK)
            assert bool(settled & Status.FEATURES_OK) == (word == 0)
        # Without VERSION_1; and a reset forgets the words.
        assert not await guest.negotiate(1 << Ring.EVENT_IDX) & Status.FEATURES_OK
        assert await guest.negotiate(ACCEPTED) & Status.FEATURES_OK
        await guest.status(0)
        assert not await guest.status(SETUP | Status.FEATURES_OK) & Status.FEATURES_OK
        await guest.call(Func.SETFEATURES, abi.FEATURES.pack(0, 1 << Ring.EVENT_IDX))
        assert not await guest.status(SETUP | Status.FEATURES_OK) & Status.FEATURES_OK


async def test_status_only_grows_until_reset() -> None:
    async with on_bus(VirtioRngDevice) as guest:
        assert await guest.status(SETUP) == SETUP
        assert await guest.status(Status.ACKNOWLEDGE) == SETUP
        assert await guest.status(LIVE) == SETUP  # no FEATURES_OK, no DRIVER_OK
        await refused(guest, errno.EINVAL, Func.SETSTATUS, abi.STATUS.pack(256))
        assert await guest.status(Status.FAILED) == SETUP | Status.FAILED
        assert await guest.status(0) == 0


def config(offset: int, data: bytes) -> bytes:
    return abi.CONFIG_HEAD.pack(offset, 0) + data


async def test_configuration_with_its_generation(tmp_path: Path) -> None:
    """R25, R27: one moment, the generation, writes as one, and the bounds."""
    about = {"path": str(tmp_path / "disk"), "size": "1M"}
    async with on_bus(VirtioBlkDevice, **about) as guest:
        _, answer = await guest.call(Func.GETCONFIG, config(0, bytes(8)))
        _, before = abi.CONFIG_HEAD.unpack_from(answer)
        assert int.from_bytes(answer[8:], "little") == 2048
        guest.recorded.model.set_attribute("device0", "size", "2M")
        _, answer = await guest.call(Func.GETCONFIG, config(0, bytes(8)))
        _, after = abi.CONFIG_HEAD.unpack_from(answer)
        assert int.from_bytes(answer[8:], "little") == 4096
        assert after > before
        await guest.call(Func.SETCONFIG, config(0, b"\xff" * 60))  # only 32 is ours
        _, answer = await guest.call(Func.GETCONFIG, config(0, bytes(60)))
        assert int.from_bytes(answer[8:16], "little") == 4096
        assert answer[8 + 32] == 0xFF
        for offset, size in ((0, 61), (60, 1), (0xFFFF_FFFF, 1), (53, 8)):
            for func in (Func.GETCONFIG, Func.SETCONFIG):
                await refused(guest, errno.EINVAL, func, config(offset, bytes(size)))
        for size in (0, 4, 8):
            await refused(guest, errno.EINVAL, Func.GETCONFIG, bytes(size))


async def test_a_change_is_signalled(tmp_path: Path) -> None:
    """R25: once DRIVER_OK is set."""
    about = {"path": str(tmp_path / "disk"), "size": "1M"}
    async with on_bus(VirtioBlkDevice, **about) as guest:
        await guest.live(features=ACCEPTED)
        await guest.settle()
        assert not guest.signalled(CONFIG_SHM)
        guest.recorded.model.set_attribute("device0", "size", "2M")
        await guest.settle()
        assert guest.signalled(CONFIG_SHM)


async def test_memory_that_is_refused() -> None:
    async with on_bus(VirtioRngDevice) as guest:
        peer, handle = guest.peer, guest.handle
        for id in (1, 2, 0xFFFF, 0x10001, 0xFFFF_FFFF):
            with pytest.raises(OSError, match="Invalid"):
                await peer.share(handle, id, 4096, signal_offset=0)
        for id in (0, CONFIG_SHM):
            with pytest.raises(OSError, match="Invalid"):
                await peer.share(handle, id, 4096)
            await peer.share(handle, id, 4096, signal_offset=0)
            with pytest.raises(OSError, match="exists"):
                await peer.share(handle, id, 4096, signal_offset=0)


async def test_queues_that_are_refused_change_nothing() -> None:
    """Every check of ENABLEQUEUE, and the right one still works afterwards."""
    async with on_bus(VirtioRngDevice) as guest:

        def enable(index: int, size: int, *at: int) -> bytes:
            return abi.ENABLE.pack(index, size, *at, 0)

        right = enable(0, 8, 0, 0x80, 0xA0)
        await guest.negotiate(ACCEPTED)
        await refused(guest, errno.EINVAL, Func.ENABLEQUEUE, right)  # no memory
        await guest.share(0)
        await guest.status(0)
        await refused(guest, errno.EINVAL, Func.ENABLEQUEUE, right)  # no FEATURES_OK
        await guest.negotiate(ACCEPTED)
        for size, *at in (
            (0, 0, 0x80, 0xA0),
            (3, 0, 0x80, 0xA0),
            (16, 0, 0x100, 0x200),
            (0xFFFF_FFFF, 0, 0x80, 0xA0),
            (8, 8, 0x90, 0xB0),
            (8, 0, 0x81, 0xA0),
            (8, 0, 0x80, 0xA2),
            (8, 0x1000, 0x80, 0xA0),
            (8, 0xF90, 0x80, 0xA0),
            (8, 0, 0xFEC, 0xA0),
            (8, 0, 0x80, 0xFBC),  # 70 bytes do not fit behind
            (8, 0, 0x80, 0xFFFF_FFFC),
        ):
            await refused(guest, errno.EINVAL, Func.ENABLEQUEUE, enable(0, size, *at))
        for index in (1, 0xFFFF_FFFF):
            data = enable(index, 8, 0, 0x80, 0xA0)
            await refused(guest, errno.ENOENT, Func.ENABLEQUEUE, data)
            data = abi.QUEUE.pack(index, 0, 0, 0)
            await refused(guest, errno.ENOENT, Func.GETQUEUE, data)
        await guest.call(Func.ENABLEQUEUE, right)
        await refused(guest, errno.EBUSY, Func.ENABLEQUEUE, right)


async def test_one_queue_is_reset_and_used_again() -> None:
    """2.6.1: RING_RESET, in the same memory."""
    async with on_bus(VirtioRngDevice) as guest:
        reset = abi.INDEX.pack(0)
        await guest.live(features=ACCEPTED)
        await refused(guest, errno.EINVAL, Func.RESETQUEUE, reset)
        await guest.negotiate(ACCEPTED | bits(Ring.RESET))
        await guest.make_ring(0, 8)
        await guest.status(LIVE)
        for _ in range(3):
            await guest.call(Func.RESETQUEUE, reset)
            ring = await guest.make_ring(0, 8)
            await serves(guest, ring)
        await refused(guest, errno.ENOENT, Func.RESETQUEUE, abi.INDEX.pack(1))


async def serves(guest: BusGuest, ring) -> None:  # type: ignore[no-untyped-def]
    """A request goes through and its answer is signalled."""
    buffer = guest.peer.allocate(64)
    guest.signalled(0)
    guest.shared[0].view.write(SIGNAL_AT + 9, b"\0\0")
    ring.add_batch([((), ((buffer, 64),), "token")])
    ring.enable_interrupts()
    if ring.kick_needed():
        guest.kick(0)
    await guest.settle()
    assert guest.signalled(0)
    assert ring.collect(8) == [("token", 64)]


@pytest.mark.parametrize("extra", [0, bits(Ring.PACKED)], ids=["split", "packed"])
async def test_a_reset_and_another_driver(extra: int) -> None:
    """R26: status 0, the same memory again; then by DEVCLOSE and a new connection."""
    async with on_bus(VirtioRngDevice) as guest:
        ring = await guest.live(features=ACCEPTED | extra)
        await serves(guest, ring)
        await guest.negotiate(ACCEPTED)
        ring = await guest.make_ring(0, 4)
        await guest.status(LIVE)
        await serves(guest, ring)
        await guest.peer.close_device(guest.handle)
        assert guest.device.model.status == 0
        guest.handle = await guest.peer.open(0)
        ring = await guest.live(features=ACCEPTED | extra)
        await serves(guest, ring)


@pytest.mark.parametrize(("extra", "signals"), [(0, 0), (1 << Ring.EVENT_IDX, 1)])
async def test_suppression_comes_before_the_signal(extra: int, signals: int) -> None:
    """2.7.7, 2.7.10: by flags no signal at all; by index one, for what was asked."""
    async with on_bus(VirtioRngDevice) as guest:
        ring = await guest.live(features=bits(Ring.VERSION_1) | extra)
        await guest.settle()  # the device sleeps
        ring.disable_interrupts()
        buffers = [guest.peer.allocate(64) for _ in range(8)]
        ring.add_batch([((), ((each, 64),), n) for n, each in enumerate(buffers)])
        assert ring.kick_needed()
        guest.kick(0)
        await guest.settle()
        assert len(ring.collect(16)) == 8
        assert guest.device.adapter_statistics().signals == signals
        assert bool(guest.signalled(0)) == bool(signals)


async def test_pending_stops_the_second_signal() -> None:
    """ABI 7: while the guest has not cleared `pending`, nothing crosses."""
    async with on_bus(VirtioRngDevice) as guest:
        ring = await guest.live(features=bits(Ring.VERSION_1))
        for token in range(4):
            ring.add_batch([((), ((guest.peer.allocate(64), 64),), token)])
            guest.kick(0)
            await guest.settle()
        counted = guest.device.adapter_statistics()
        assert counted.signals == 4
        assert counted.crossed == 1


async def test_kicks_before_the_driver_is_ready_are_ignored() -> None:
    async with on_bus(VirtioRngDevice) as guest:
        await guest.share(0)
        for _ in range(3):
            guest.kick(0)
            await guest.settle()
        await guest.negotiate(ACCEPTED)
        made = await guest.make_ring(0, 8)
        await guest.status(LIVE)
        await serves(guest, made)


async def test_a_bad_chain_breaks_this_device_only(tmp_path: Path) -> None:
    """DEVICE_NEEDS_RESET and its signal; a reset brings it back; the bus goes on."""
    async with on_bus(VirtioRngDevice) as guest:
        ring = await guest.live(features=ACCEPTED)
        ring.add_batch([((), ((0xDEAD_0000_0000, 64),), "bad")])
        guest.kick(0)
        await guest.settle()
        assert await guest.status() == LIVE | Status.NEEDS_RESET
        assert guest.signalled(CONFIG_SHM)
        assert "queue 0" in str(guest.device.model.broken)
        await guest.negotiate(ACCEPTED)
        ring = await guest.make_ring(0, 8)
        assert await guest.status(LIVE) == LIVE
        await serves(guest, ring)


async def test_memory_taken_away_breaks_this_device_only() -> None:
    """R50: unmapped under it; the connection stays and answers."""
    async with on_bus(VirtioRngDevice) as guest:
        await guest.live(features=ACCEPTED)
        memory = guest.recorded.bridge.memory
        guest.kick(0)
        memory.unmap(guest.peer.base, guest.peer.size)
        guest.peer.signal(8, guest.shared[0].handle)
        await trio.testing.wait_all_tasks_blocked()
        assert guest.device.model.broken is not None
        memory.map(guest.peer.base, guest.peer.size, guest.peer.fd)
        assert guest.recorded.effects.failures == []  # type: ignore[attr-defined]


async def test_memory_that_comes_back_has_lost_its_signal() -> None:
    """R50: a driver that maps anew must share anew; it is told, not left waiting."""
    async with on_bus(VirtioRngDevice) as guest:
        await guest.live(features=ACCEPTED)
        await guest.settle()
        memory = guest.recorded.bridge.memory
        memory.unmap(guest.peer.base, guest.peer.size)
        memory.map(guest.peer.base, guest.peer.size, guest.peer.fd)
        guest.peer.signal(8, guest.shared[0].handle)
        await trio.testing.wait_all_tasks_blocked()
        assert guest.device.model.broken == "queue 0: its memory is gone"


async def test_a_kick_during_a_kick_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    """ABI 7: `pending` stops the second doorbell, `dirty` has the device look again."""
    async with on_bus(VirtioRngDevice) as guest:
        await guest.live(features=ACCEPTED)
        await guest.settle()
        model, kicks = guest.device.model, []

        def kick(index: int) -> None:
            kicks.append(index)
            if len(kicks) < 3:
                guest.kick(0)

        monkeypatch.setattr(model, "kick", kick)
        guest.kick(0)
        await guest.settle()
        assert kicks == [0, 0, 0]


async def test_a_second_guest_is_told_that_it_is_busy() -> None:
    async with on_bus(VirtioRngDevice) as guest:
        with pytest.raises(OSError, match="busy"):
            await guest.peer.open(0)


async def test_what_is_a_pci_function_is_busy() -> None:
    """One way at a time."""

    class Nobody:
        space = None

        def queue_interrupt(self, index: int) -> None: ...
        def config_interrupt(self) -> None: ...

    async with on_bus(VirtioRngDevice, open=False) as guest:
        guest.device.model.attach(Nobody())  # type: ignore[arg-type]
        with pytest.raises(OSError, match="busy"):
            await guest.peer.open(0)
        guest.device.model.detach()
        guest.handle = await guest.peer.open(0)
        assert (await guest.call(Func.GETID))[0] == 4


async def test_a_console_has_its_control_queues() -> None:
    async with on_bus(VirtioConsoleDevice, to="pty,pty") as guest:
        _, info = await guest.call(Func.GETINFO, bytes(16))
        assert abi.INFO.unpack(info) == (3, 0x11DA, 6, 12)
