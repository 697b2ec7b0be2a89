"""Shared memory with a guest: regions and views, doorbells, shm-signal, fd passing."""

from shm._core import View
from shm.doorbell import Doorbell, DoorbellStatistics
from shm.fdpass import ReceivedFds, receive_with_fds, send_with_fds
from shm.memory import AddressSpace, Region, SpaceStatistics, create_memfd
from shm.signal import Locality, ShmSignal, SignalStatistics
from shm.statistics import Gauge

__all__ = [
    "AddressSpace",
    "Doorbell",
    "DoorbellStatistics",
    "Gauge",
    "Locality",
    "ReceivedFds",
    "Region",
    "ShmSignal",
    "SignalStatistics",
    "SpaceStatistics",
    "View",
    "create_memfd",
    "receive_with_fds",
    "send_with_fds",
]
