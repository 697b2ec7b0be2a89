"""Being a guest of a host that may be replaced under way."""

from collections.abc import Awaitable, Callable

import trio

from vbus.errors import NoDeviceError, UnreachableError

PAUSE_S = 0.05


async def returning(once: Callable[[], Awaitable[None]], patience_s: float) -> None:
    """Await `once()`, and again whenever its host went, until it returns by itself.

    After a host went, its successor has `patience_s` to come; a patience of 0 is to
    await it once. Raises what `once` does: NoDeviceError or UnreachableError when the
    patience ends, and UnreachableError at once if there never was a host.
    """
    deadline: float | None = None
    while True:
        try:
            await once()
            return
        except NoDeviceError:
            if not patience_s:
                raise
            deadline = trio.current_time() + patience_s
        except UnreachableError:
            if deadline is None or trio.current_time() >= deadline:
                raise
        await trio.sleep(PAUSE_S)
