"""Asking a device something: its hooks are plain or async, and may fail in any way.

What comes of it is a result for the guest, or a Waiting that gives it later.
"""

import inspect
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from errno import EIO
from typing import Any, TypeVar, cast

import outcome
from outcome import Outcome

from vbus.device import Device
from vbus.errors import VbusError
from vbus.logs import DEVICE, about

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Waiting:
    """A result which is there once `work()` was awaited: `finish` gives it."""

    work: Callable[[], Awaitable[object]]
    finish: Callable[[Outcome[Any]], int]


Result = int | Waiting


def settle(step: Callable[[], int], what: object) -> int:
    """Run `step` to its result; a refusal is its errno, a bug is logged and -EIO."""
    try:
        return step()
    except VbusError as error:
        return -error.errno
    except Exception:
        log.exception("%s failed", what)
        return -EIO


def ask(
    device: Device,
    hook: Callable[[], T | Awaitable[T]],
    finish: Callable[[Outcome[T]], int],
    what: object,
    *,
    ended: Callable[[Outcome[T]], object] = lambda _: None,
) -> Result:
    """Ask `device` something by `hook`, now or, if its hook is async, later.

    `ended` runs in the same step in which the hook ends, whatever became of the guest
    meanwhile; `finish` only if the guest still waits for the result.
    """
    token = DEVICE.set(device.name)
    try:
        answer = outcome.capture(hook)
        if isinstance(answer, outcome.Value) and inspect.isawaitable(answer.value):
            awaitable = cast(Awaitable[T], answer.value)
            return _later(device, awaitable, finish, what, ended)
        now = cast("Outcome[T]", answer)
        ended(now)
        return settle(lambda: finish(now), what)
    finally:
        DEVICE.reset(token)


def _later(
    device: Device,
    awaitable: Awaitable[T],
    finish: Callable[[Outcome[T]], int],
    what: object,
    ended: Callable[[Outcome[T]], object],
) -> Waiting:
    async def work() -> T:
        with about(device=device.name):
            later: Outcome[T] = await outcome.acapture(_await, awaitable)
            ended(later)
        return later.unwrap()

    return Waiting(work, lambda later: settle(lambda: finish(later), what))


async def _await(awaitable: Awaitable[T]) -> T:
    return await awaitable
