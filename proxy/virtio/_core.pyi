"""The compiled core of driven virtqueues: see include/virtio/driver.h."""

from collections.abc import Sequence
from typing import Any, Self, TypeAlias

from shm import AddressSpace

_Buffers: TypeAlias = Sequence[tuple[int, int]]

class Queue:
    def __new__(
        cls,
        space: AddressSpace,
        size: int,
        desc: int,
        driver: int,
        device: int,
        features: int,
        tables: int,
        entries: int,
        /,
    ) -> Self: ...
    @property
    def size(self) -> int: ...
    @property
    def room(self) -> int: ...
    @property
    def in_flight(self) -> int: ...
    @property
    def broken(self) -> str | None: ...
    def add_batch(
        self, chains: Sequence[tuple[_Buffers, _Buffers, object]], /
    ) -> int: ...
    def collect(self, limit: int, /) -> list[tuple[Any, int]]: ...
    def kick_needed(self) -> bool: ...
    def disable_interrupts(self) -> None: ...
    def enable_interrupts(self) -> bool: ...
    def _counters(self) -> tuple[int, int, int]: ...
