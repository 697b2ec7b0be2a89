"""Asking a device something: its hooks are plain or async, and may fail in any way.

What comes of it is a result for the guest, or a Waiting that gives it later.
"""

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


def settle(
    finish: Callable[[Outcome[T]], int], answer: Outcome[T], what: Callable[[], str]
) -> int:
    """Finish to a result; see `refusal` for what it raises."""
    try:
        return finish(answer)
    except Exception as error:
        return refusal(error, what)


def refusal(error: Exception, what: Callable[[], str]) -> int:
    """Give what the guest is answered: an errno, or -EIO for a bug, which is logged."""
    if isinstance(error, VbusError):
        return -error.errno
    log.error("%s failed", what(), exc_info=error)
    return -EIO


def ask(
    device: Device,
    hook: Callable[[], T | Awaitable[T]],
    finish: Callable[[Outcome[T]], int],
    what: Callable[[], str],
    *,
    ended: Callable[[Outcome[T]], object],
) -> Result:
    """Ask `device` something by `hook`, now or, if its hook is async, later.

    `ended` runs in the same step in which the hook ends, whatever became of the guest
    meanwhile; `finish` only if the guest still waits for the result. `what` is for the
    log.
    """
    token = DEVICE.set(device.name)
    try:
        answer = outcome.capture(hook)
        if isinstance(answer, outcome.Value) and hasattr(answer.value, "__await__"):
            awaitable = cast(Awaitable[T], answer.value)
            return later(device, awaitable, finish, what, ended)
        now = cast("Outcome[T]", answer)
        ended(now)
        return settle(finish, now, what)
    finally:
        DEVICE.reset(token)


def later(
    device: Device,
    awaitable: Awaitable[T],
    finish: Callable[[Outcome[T]], int],
    what: Callable[[], str],
    ended: Callable[[Outcome[T]], object],
) -> Waiting:
    """Give the result of a hook that is async; the rest as `ask`."""

    async def work() -> T:
        with about(device=device.name):
            found: Outcome[T] = await outcome.acapture(_await, awaitable)
            ended(found)
        return found.unwrap()

    return Waiting(work, lambda found: settle(finish, found, what))


async def _await(awaitable: Awaitable[T]) -> T:
    return await awaitable
