"""Tasks beside a body of code, where an error of either comes out as itself."""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager

import trio

from vbus.errors import VbusError


@asynccontextmanager
async def beside(task: Callable[[], Awaitable[object]]) -> AsyncIterator[None]:
    """Run `task` for the time of the body.

    A cancellation from outside reaches the task only after the body has ended, which
    may need it to clean up. If the task raises, the body is cancelled and the error
    comes out, whatever the body makes of that; if it returns, the body goes on. Unlike
    a nursery this wraps no error in a group.
    """
    failure: Exception | None = None
    scope = trio.CancelScope(shield=True)

    async def run() -> None:
        nonlocal failure
        try:
            with scope:
                await task()
        except Exception as error:
            failure = failure or error
            nursery.cancel_scope.cancel()

    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run)
            try:
                yield
            except Exception as error:
                failure = failure or error
            finally:
                scope.cancel()
    except BaseExceptionGroup:
        if failure is None:
            raise
    if failure is not None:
        raise failure


@contextmanager
def unwrapped() -> Iterator[None]:
    """Around a nursery: if tasks of it raise a VbusError, the first comes out bare."""
    try:
        yield
    except BaseExceptionGroup as group:
        refusals, others = group.split((VbusError, trio.Cancelled))
        first = _first_refusal(group)
        if refusals is None or others is not None or first is None:
            raise
        raise first from None


def _first_refusal(error: BaseException) -> VbusError | None:
    if isinstance(error, BaseExceptionGroup):
        found = map(_first_refusal, error.exceptions)
        return next(filter(None, found), None)
    return error if isinstance(error, VbusError) else None
