"""What a server counts, over all its clients."""

from dataclasses import dataclass, field
from typing import Self

from shm import Gauge
from vbus.pci.constants import REGION_COUNT, Region
from vbus.sockets import Peer


@dataclass(frozen=True)
class ServerStatistics:
    """Counters since the server was made.

    `region_reads` and `region_writes` are by region index, 7 being configuration
    space. `dma_maps` counts all maps, `unbacked_maps` those that came without a
    descriptor. `errors` counts error replies, `protocol_errors` connections that were
    ended, `interrupts` eventfds signalled.
    """

    peer: Peer | None
    clients: int
    refused: int
    messages: int
    region_reads: tuple[int, ...]
    region_writes: tuple[int, ...]
    dma_maps: int
    unbacked_maps: int
    dma_unmaps: int
    dma_messages: int
    irq_settings: int
    interrupts: int
    resets: int
    errors: int
    protocol_errors: int
    pending: Gauge


@dataclass(frozen=True)
class ClientStatistics:
    """What one client has asked for since it attached.

    For a virtual machine: since it was switched on, over all its resets. The region
    accesses leave configuration space out, which has counters of its own.
    """

    config_reads: int
    config_writes: int
    region_reads: int
    region_writes: int
    dma_maps: int
    unbacked_maps: int
    dma_unmaps: int
    resets: int

    @classmethod
    def between(cls, then: ServerStatistics, now: ServerStatistics) -> Self:
        """What was counted from one snapshot to a later one."""
        config_reads = (
            now.region_reads[Region.CONFIG] - then.region_reads[Region.CONFIG]
        )
        config_writes = (
            now.region_writes[Region.CONFIG] - then.region_writes[Region.CONFIG]
        )
        reads = sum(now.region_reads) - sum(then.region_reads)
        writes = sum(now.region_writes) - sum(then.region_writes)
        return cls(
            config_reads=config_reads,
            config_writes=config_writes,
            region_reads=reads - config_reads,
            region_writes=writes - config_writes,
            dma_maps=now.dma_maps - then.dma_maps,
            unbacked_maps=now.unbacked_maps - then.unbacked_maps,
            dma_unmaps=now.dma_unmaps - then.dma_unmaps,
            resets=now.resets - then.resets,
        )


@dataclass
class Counters:
    """The same while they are counted."""

    clients: int = 0
    refused: int = 0
    messages: int = 0
    region_reads: list[int] = field(default_factory=lambda: [0] * REGION_COUNT)
    region_writes: list[int] = field(default_factory=lambda: [0] * REGION_COUNT)
    dma_maps: int = 0
    unbacked_maps: int = 0
    dma_unmaps: int = 0
    dma_messages: int = 0
    irq_settings: int = 0
    interrupts: int = 0
    resets: int = 0
    errors: int = 0
    protocol_errors: int = 0

    def frozen(
        self, peer: Peer | None, interrupts: int, pending: int
    ) -> ServerStatistics:
        """Take a snapshot; `interrupts` are those of the client that is there."""
        return ServerStatistics(
            peer=peer,
            clients=self.clients,
            refused=self.refused,
            messages=self.messages,
            region_reads=tuple(self.region_reads),
            region_writes=tuple(self.region_writes),
            dma_maps=self.dma_maps,
            unbacked_maps=self.unbacked_maps,
            dma_unmaps=self.dma_unmaps,
            dma_messages=self.dma_messages,
            irq_settings=self.irq_settings,
            interrupts=self.interrupts + interrupts,
            resets=self.resets,
            errors=self.errors,
            protocol_errors=self.protocol_errors,
            pending=pending,
        )
