"""What waits for one reader of `vbus events`: bounded, and honest about losses."""

from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Self

import trio

BACKLOG = 4096
Happening = dict[str, object]
Watch = Callable[[Callable[[Happening], object]], Callable[[], None]]


class EventFeed:
    """The changes nobody took yet, at most BACKLOG; after that they are only counted.

    A context manager: changes are noted inside of it. For one reader.
    """

    def __init__(self, watch: Watch, backlog: int = BACKLOG) -> None:
        """Take the function that registers a watcher and gives how to end that."""
        self._watch = watch
        self._backlog = backlog
        self._waiting: deque[Happening] = deque()
        self._lost = 0
        self._more = trio.lowlevel.ParkingLot()

    def __enter__(self) -> Self:
        self._unwatch = self._watch(self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._unwatch()

    def _note(self, happening: Happening) -> None:
        # Once one is lost all are, until the reader is told at that very place.
        if self._lost or len(self._waiting) == self._backlog:
            self._lost += 1
        else:
            self._waiting.append(happening)
        self._more.unpark()

    async def next(self) -> Happening:
        """Wait for the next change, or for {"event": "lost", "count": n}."""
        while not (self._waiting or self._lost):
            await self._more.park()
        if self._waiting:
            return self._waiting.popleft()
        lost, self._lost = self._lost, 0
        return {"event": "lost", "count": lost}
