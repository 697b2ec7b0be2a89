"""A truth value that tasks can wait for."""

import trio


class Flag:
    """False at first. Tasks wait for either value."""

    def __init__(self) -> None:
        self._value = False
        self._changed = trio.Event()

    @property
    def value(self) -> bool:
        return self._value

    def set(self, value: bool) -> None:
        """Set it and wake who waits for this value."""
        if value != self._value:
            self._value = value
            self._changed.set()
            self._changed = trio.Event()

    async def wait(self, value: bool) -> None:
        """Wait until the flag has this value; it may have changed again since."""
        while self._value != value:
            await self._changed.wait()
