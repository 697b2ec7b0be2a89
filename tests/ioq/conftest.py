"""Fixtures of the ring tests."""

from collections.abc import Callable, Iterator

import pytest

from tests.ioq.memory import Guest


@pytest.fixture
def make_guest() -> Iterator[Callable[[int], Guest]]:
    """Guests with a ring of so many descriptors, closed in the end."""
    guests: list[Guest] = []

    def make(count: int) -> Guest:
        guests.append(Guest(count))
        return guests[-1]

    yield make
    for guest in guests:
        guest.close()
