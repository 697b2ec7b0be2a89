"""What waits for a reader of events."""

from collections.abc import Callable

import trio
import trio.testing

from vbus.control.feed import EventFeed, Happening


class Source:
    """Something that can be watched."""

    def __init__(self) -> None:
        self.watchers: list[Callable[[Happening], object]] = []

    def watch(self, watcher: Callable[[Happening], object]) -> Callable[[], None]:
        self.watchers.append(watcher)
        return lambda: self.watchers.remove(watcher)

    def tell(self, number: int) -> None:
        for watcher in self.watchers:
            watcher({"event": "n", "number": number})


async def test_a_reader_that_waits_is_woken() -> None:
    source, got = Source(), []
    with EventFeed(source.watch) as feed:

        async def read() -> None:
            got.append(await feed.next())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            await trio.testing.wait_all_tasks_blocked()
            source.tell(1)
    assert got == [{"event": "n", "number": 1}]
    assert source.watchers == []


async def test_losses_are_told_at_the_place_where_they_were() -> None:
    source = Source()
    with EventFeed(source.watch, backlog=2) as feed:
        for number in range(5):
            source.tell(number)
        assert await feed.next() == {"event": "n", "number": 0}
        source.tell(5)  # there is room again, but 2 to 4 are missing before it
        assert await feed.next() == {"event": "n", "number": 1}
        assert await feed.next() == {"event": "lost", "count": 4}
        source.tell(6)
        assert await feed.next() == {"event": "n", "number": 6}
