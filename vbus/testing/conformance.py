"""What every device must stand, whatever it does: `check_device`.

Each check gets a fresh bus, device and guest. A device fails by an exception that is no
VbusError, by what it leaves behind, or by letting one guest's garbage spoil the next
connection.
"""

import logging
import random
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from errno import EBUSY, EINVAL, ENOENT

import msgspec
import trio
import trio.testing

from ioq import ring_size
from vbus.abi import TYPE_LIMIT, EventId, text_of
from vbus.bus import BusModel
from vbus.connection import Ended
from vbus.device import Device
from vbus.errors import VbusError
from vbus.testing.bridge import RecordedBridge
from vbus.testing.effects import NurseryEffects

DeviceFactory = type[Device] | Callable[[BusModel], Device]

DEADLINE_S = 20.0
_NAME = "device-under-test"
_FUNCS = range(16)
_SHM_IDS = (0, 1, 2, 100, 101, 102, 103, 104, 0xFFFFFFFF)
_ROUNDS = 3


class Stage:
    """A device on a bus, and a guest that is about to use it."""

    def __init__(self, device: Device, recorded: RecordedBridge, devid: int) -> None:
        self.device = device
        self.recorded = recorded
        self.model = recorded.model
        self.bridge = recorded.bridge
        self.peer = recorded.peer
        self.devid = devid

    async def open(self) -> int:
        """Open the device as its driver does."""
        return await self.peer.open(self.devid, type(self.device).version)

    async def settle(self) -> None:
        """Let the device's tasks come to rest."""
        await trio.testing.wait_all_tasks_blocked()
        self.recorded.check()

    def expect_unused(self) -> None:
        """The device holds no connection any more."""
        assert not self.device.connections, "a connection is left behind"
        effects = self.recorded.effects
        assert isinstance(effects, NurseryEffects)
        assert not effects.running, "run() goes on after its connection ended"


async def check_device(make: DeviceFactory, **attributes: object) -> None:
    """Check that a device keeps the rules of the bus, hostile guests included.

    `make` is its class, with `attributes`, or a function which adds it, and what it
    needs, to a BusModel. Raises AssertionError, or the device's own exception, which
    names what went wrong.
    """
    for check in _CHECKS:
        with trio.fail_after(DEADLINE_S), _no_logged_bugs():
            await _run_check(check, make, attributes)


async def _run_check(
    check: Callable[[Stage], Awaitable[None]],
    make: DeviceFactory,
    attributes: dict[str, object],
) -> None:
    try:
        async with trio.open_nursery() as nursery:
            effects = NurseryEffects(nursery)
            with RecordedBridge(model=BusModel(), effects=effects) as recorded:
                effects.failed = recorded.bridge.connection_failed
                stage = await _set(recorded, nursery, make, attributes)
                await check(stage)
                await stage.settle()
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        if len(group.exceptions) == 1:  # only what the device or the check raised
            raise group.exceptions[0] from None
        raise
    for _, error in effects.failures:
        _expect_refusal(error)


async def _set(
    recorded: RecordedBridge,
    nursery: trio.Nursery,
    make: DeviceFactory,
    attributes: dict[str, object],
) -> Stage:
    """Make the device, run it, link it, and bring the guest up."""
    device = _add(make, recorded.model, attributes)
    for each in recorded.model.devices.values():
        if each.overrides("serve"):
            nursery.start_soon(each.serve)
    interface = recorded.model.link(recorded.bus.name, device.name)
    await recorded.peer.start()
    return Stage(device, recorded, interface.id)


def _add(make: DeviceFactory, model: BusModel, attributes: dict[str, object]) -> Device:
    if not isinstance(make, type):
        return make(model)
    model.classes[_NAME] = make
    return model.add_device(_NAME, _NAME, attributes)


def _expect_refusal(error: BaseException) -> None:
    if not isinstance(error, VbusError):
        raise AssertionError("run() ended with a bug") from error


class _Collector(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@contextmanager
def _no_logged_bugs() -> Iterator[None]:
    """Fail on what the bridge logs about a device: it hides it from the guest."""
    collector = _Collector()
    loggers = [logging.getLogger(name) for name in ("vbus.asking", "vbus.client")]
    for logger in loggers:
        logger.addHandler(collector)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(collector)
    for record in collector.records:
        cause = record.exc_info[1] if record.exc_info else None
        raise AssertionError(record.getMessage()) from cause


@contextmanager
def _refused(errno: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno != errno:
            raise AssertionError(
                f"refused by errno {error.errno}, not {errno}"
            ) from None
    else:
        raise AssertionError(f"not refused (errno {errno})")


async def _announced(stage: Stage) -> None:
    cls = type(stage.device)
    assert 0 < len(cls.type.encode()) <= TYPE_LIMIT, "bad interface type"
    assert cls.max_connections >= 1
    (event,) = stage.peer.take_events()
    assert event.eventid == EventId.DEVADD
    assert text_of(event.text) == cls.type


async def _opens_and_closes(stage: Stage) -> None:
    for _ in range(_ROUNDS):
        handle = await stage.open()
        await stage.settle()
        await stage.peer.close_device(handle)
        await stage.settle()
        stage.expect_unused()
        with _refused(ENOENT):
            await stage.peer.call(handle, 0)


async def _refuses_other_versions(stage: Stage) -> None:
    for version in (0, type(stage.device).version + 1, 0xFFFFFFFF):
        if version != type(stage.device).version:
            with _refused(EINVAL):
                await stage.peer.open(stage.devid, version)
    stage.expect_unused()


async def _refuses_one_connection_too_many(stage: Stage) -> None:
    limit = min(type(stage.device).max_connections, 64)
    handles = [await stage.open() for _ in range(limit)]
    if limit == type(stage.device).max_connections:
        with _refused(EBUSY):
            await stage.open()
    for handle in handles:
        await stage.peer.close_device(handle)
    await stage.settle()
    stage.expect_unused()


async def _stands_any_call(stage: Stage) -> None:
    handle = await stage.open()
    noise = random.Random(1)
    for func in [*_FUNCS, *stage.device.calls, 0xFFFFFFFF]:
        for size in (0, 1, 6, 8, 31, 32, 4096):
            with suppress(OSError):
                data = noise.randbytes(size)
                await stage.peer.call(handle, func, data, noise.getrandbits(32))
            stage.recorded.check()
    await stage.peer.close_device(handle)


async def _stands_any_memory(stage: Stage) -> None:
    """Garbage for every id: without a signal, with one, and in a ring."""
    noise = random.Random(2)
    for id in _SHM_IDS:
        for size, offset in ((1, None), (4096, None), (16, 0), (4096, 8)):
            handle = await stage.open()
            with suppress(OSError):
                shared = await stage.peer.share(handle, id, size, signal_offset=offset)
                stage.peer.memory.write(shared.addr, noise.randbytes(size))
                stage.peer.signal(8, shared.handle)
            await stage.settle()
            await _close_if_open(stage, handle)
    assert await stage.open()


async def _stands_hostile_rings(stage: Stage) -> None:
    noise = random.Random(3)
    for id in _SHM_IDS:
        for count in (1, 7, 256):
            handle = await stage.open()
            with suppress(OSError):
                ring = await stage.peer.share_ring(handle, id, count)
                at = noise.randrange(24, ring_size(count) - 8)
                stage.peer.memory.write(ring.addr + at, noise.randbytes(8))
                stage.peer.signal(8, ring.handle)
            await stage.settle()
            await _close_if_open(stage, handle)
    assert await stage.open()


async def _close_if_open(stage: Stage, handle: int) -> None:
    """Close a connection that may have failed meanwhile, as it should."""
    with suppress(OSError):
        await stage.peer.close_device(handle)
    stage.peer.take_events()
    await stage.settle()
    stage.expect_unused()


async def _stands_a_reset(stage: Stage) -> None:
    await stage.open()
    await stage.settle()
    await stage.peer.start()
    await stage.settle()
    stage.expect_unused()
    await stage.open()
    await stage.settle()
    stage.peer.detach()
    await stage.settle()
    stage.expect_unused()


async def _leaves_the_bus_while_open(stage: Stage) -> None:
    await stage.open()
    await stage.settle()
    stage.peer.take_events()
    stage.model.unlink(stage.recorded.bus.name, stage.device.name)
    await stage.settle()
    stage.expect_unused()
    assert [reason for _, reason in stage.recorded.effects.closed] == [Ended.UNLINKED]
    assert stage.peer.take_events()[-1].eventid == EventId.DEVDROP
    with _refused(ENOENT):
        await stage.open()


async def _shows_itself(stage: Stage) -> None:
    """Statistics and attributes are data that a control message can carry."""
    await stage.open()
    msgspec.to_builtins(stage.device.statistics())
    for name, declared in stage.device.attributes.items():
        value = stage.device.get_attribute(name)
        msgspec.to_builtins(value, enc_hook=lambda other: str(other))
        assert declared.parse(value) == value, f"{name} does not take its own value"


_CHECKS: tuple[Callable[[Stage], Awaitable[None]], ...] = (
    _announced,
    _opens_and_closes,
    _refuses_other_versions,
    _refuses_one_connection_too_many,
    _stands_any_call,
    _stands_any_memory,
    _stands_hostile_rings,
    _stands_a_reset,
    _leaves_the_bus_while_open,
    _shows_itself,
)
