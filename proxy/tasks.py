"""A task beside a body of code, where an error of either comes out as itself."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import trio


@asynccontextmanager
async def beside(task: Callable[[], Awaitable[object]]) -> AsyncIterator[None]:
    """Run `task` for the time of the body.

    If it raises, the body is cancelled and the error comes out, whatever the body makes
    of that; if it returns, the body goes on. Unlike a nursery this wraps no error in a
    group.
    """
    failure: Exception | None = None

    async def run() -> None:
        nonlocal failure
        try:
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
            nursery.cancel_scope.cancel()
    except BaseExceptionGroup:
        if failure is None:
            raise
    if failure is not None:
        raise failure
