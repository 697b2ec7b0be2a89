"""The interrupts a client listens to: one eventfd for each vector it has asked for.

Masks are kept here too: a masked vector remembers one interrupt until it is unmasked.
INTx is a level: a client that unmasks it while it stands hears of it again.
"""

from collections.abc import Callable, Iterable

from shm import Doorbell
from vbus.errors import InvalidError
from vbus.pci.constants import IRQ_COUNT, Irq
from vbus.saved import Held, Kept, SavedInterrupts
from vbus.vfio_user.wire import (
    IRQ_SET_ACTIONS,
    IRQ_SET_DATA,
    IrqSetFlag,
    SetIrqs,
)

_DATA_NONE = IrqSetFlag.DATA_NONE
_DATA_BOOL = IrqSetFlag.DATA_BOOL
_DATA_EVENTFD = IrqSetFlag.DATA_EVENTFD


class InterruptTable:
    """An InterruptSink: what SET_IRQS has set up, by IRQ index and vector."""

    def __init__(
        self,
        irq_count: Callable[[int], int],
        line_asserted: Callable[[], bool] = lambda: False,
    ) -> None:
        self.raised = 0
        self._irq_count = irq_count
        self._line_asserted = line_asserted
        self._doorbells: dict[tuple[int, int], Doorbell] = {}
        self._masked: set[tuple[int, int]] = set()
        self._pending: set[tuple[int, int]] = set()

    def trigger(self, index: int, vector: int) -> bool:
        """Raise a vector; False if the client set no eventfd for it."""
        key = (index, vector)
        doorbell = self._doorbells.get(key)
        if doorbell is None:
            return False
        if key in self._masked:
            self._pending.add(key)
            return True
        self.raised += 1
        doorbell.ring()
        return True

    def set(self, request: SetIrqs, fds: list[int]) -> None:
        """Do what a SET_IRQS asks for; descriptors it uses are taken out of `fds`.

        Raises InvalidError, and then nothing is changed.
        """
        data, action = request.flags & IRQ_SET_DATA, request.flags & IRQ_SET_ACTIONS
        if data.bit_count() != 1 or action.bit_count() != 1:
            raise InvalidError(f"SET_IRQS with flags {request.flags:#x}")
        if fds and data != _DATA_EVENTFD:
            raise InvalidError("SET_IRQS with descriptors it does not ask for")
        if data == _DATA_NONE and request.start == request.vectors == 0:
            self._disable(request.irq, action)
            return
        vectors = self._vectors(request)
        if data == _DATA_EVENTFD:
            self._assign(request.irq, vectors, action, fds)
            return
        if data == _DATA_BOOL:
            if len(request.data) < len(vectors):
                raise InvalidError(f"SET_IRQS has {len(request.data)} truth values")
            chosen = [v for v, on in zip(vectors, request.data, strict=False) if on]
        else:
            chosen = list(vectors)
        self._act(request.irq, chosen, action)

    def forget_pending(self) -> None:
        """Drop what masked vectors remember: it was for the life before a reset."""
        self._pending.clear()

    def save(self, kept: Kept) -> SavedInterrupts:
        """Give what is set up, for `resume`."""
        return SavedInterrupts(
            tuple(
                (*key, kept.keep(doorbell.fileno()))
                for key, doorbell in self._doorbells.items()
            ),
            tuple(self._masked),
            tuple(self._pending),
        )

    def resume(self, saved: SavedInterrupts, held: Held) -> None:
        """Set up what another one had, raising nothing. Raises InvalidError."""
        for index, vector, fd in saved.eventfds:
            self._check(index, vector)
            self._doorbells[index, vector] = Doorbell.adopt(held.take(fd))
        self._masked.update(saved.masked)
        self._pending.update(saved.pending)

    def close(self) -> None:
        """Forget everything and close all eventfds."""
        for doorbell in self._doorbells.values():
            doorbell.close()
        self._doorbells.clear()
        self._masked.clear()
        self._pending.clear()

    def _vectors(self, request: SetIrqs) -> range:
        limit = self._irq_count(request.irq) if request.irq < IRQ_COUNT else 0
        end = request.start + request.vectors
        if not request.vectors or end > limit:
            raise InvalidError(
                f"SET_IRQS of vectors {request.start} to {end - 1} of IRQ"
                f" {request.irq}, which has {limit}"
            )
        return range(request.start, end)

    def _check(self, index: int, vector: int) -> None:
        known = index < IRQ_COUNT and vector < self._irq_count(index)
        if not known or (index, vector) in self._doorbells:
            raise InvalidError(f"vector {vector} of IRQ {index}, or a second one")

    def _disable(self, index: int, action: int) -> None:
        if action != IrqSetFlag.ACTION_TRIGGER:
            raise InvalidError("SET_IRQS of no vectors")
        for key in [key for key in self._doorbells if key[0] == index]:
            self._drop(key)

    def _drop(self, key: tuple[int, int]) -> None:
        doorbell = self._doorbells.pop(key, None)
        if doorbell is not None:
            doorbell.close()
        self._masked.discard(key)
        self._pending.discard(key)

    def _assign(self, index: int, vectors: range, action: int, fds: list[int]) -> None:
        """Set the eventfds of a range of vectors, or take them away: no descriptors."""
        if action != IrqSetFlag.ACTION_TRIGGER:
            raise InvalidError("eventfds can be set for ACTION_TRIGGER only")
        if fds and len(fds) != len(vectors):
            raise InvalidError(
                f"SET_IRQS of {len(vectors)} vectors with {len(fds)} descriptors"
            )
        doorbells: list[Doorbell] = []
        try:
            while fds:
                doorbells.append(Doorbell.adopt(fds.pop(0)))
        except BaseException:
            for doorbell in doorbells:
                doorbell.close()
            raise
        for vector in vectors:
            self._drop((index, vector))
        for vector, doorbell in zip(vectors, doorbells, strict=False):
            self._doorbells[index, vector] = doorbell

    def _act(self, index: int, vectors: Iterable[int], action: int) -> None:
        for vector in vectors:
            key = (index, vector)
            if action == IrqSetFlag.ACTION_TRIGGER:
                self.trigger(index, vector)
            elif action == IrqSetFlag.ACTION_MASK:
                self._masked.add(key)
            else:
                self._masked.discard(key)
                stands = index == Irq.INTX and self._line_asserted()
                if key in self._pending or stands:
                    self._pending.discard(key)
                    self.trigger(index, vector)
