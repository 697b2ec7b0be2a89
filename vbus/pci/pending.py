"""Waiting for what a Pending access waits for: the one place of `pci` that awaits."""

import outcome
import trio

from vbus.errors import CallTimeoutError
from vbus.pci.function import Pending


async def settle(pending: Pending) -> bytes | None:
    """Await the work of `pending`, until its deadline at most, and complete it.

    Returns the answer to the access. Cancelled, it does not complete the access.
    """
    result: outcome.Outcome[object]
    with trio.move_on_after(pending.timeout_s) as deadline:
        try:
            result = outcome.Value(await pending.work())
        except Exception as error:
            result = outcome.Error(error)
    if deadline.cancelled_caught:
        result = outcome.Error(
            CallTimeoutError(f"no answer within {pending.timeout_s} s")
        )
    return pending.complete(result)
