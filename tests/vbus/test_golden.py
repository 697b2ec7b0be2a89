"""The worked example of the ABI (section 11), byte for byte through the real bridge.

Every address is that of the example: bridge call arguments at 0x12340000, the fast-call
descriptor at 0x12341000, hypercall arguments at 0x12342000, data at 0x12343000, the
event ring at 0x12350000 and its buffers at 0x12360000, the TX ring at 0x12370000.
"""

from collections.abc import Iterator

import pytest

from ioq import Index, Ring, ring_size
from shm import Locality
from vbus import Connection, Device, SharedMemory, call
from vbus.testing import RecordedBridge

ARGUMENT = 0x12340000
FASTCALL = 0x12341000
HYPER = 0x12342000
DATA = 0x12343000
EVENT_RING = 0x12350000
EVENT_DATA = 0x12360000
TX_RING = 0x12370000

NEGOTIATE = "f5ee53bf 01000000 00000000 00000000"
NEGOTIATE_BAR = "00000000 10000000 00003412 00000000"
FASTCALL_ADD = "00000000 18000000 00103412 00000000"
FASTCALL_ADD_BAR = "03000000 10000000 00003412 00000000"
QREG = "01000000 00000000 00040000 00000000 00003512 00000000 00003612 00000000"
QREG_BAR = "01000000 20000000 00003412 00000000"
DEVADD = "00000000 00000000 00000000 00000000 7669727475616c2d 65746865726e6574"
DEVOPEN = "00000000 01000000 00000000 00000000"
DEVOPEN_AFTER = "00000000 01000000 01000000 00000000"
DEVOPEN_CALL = "00000000 10000000 00203412 00000000 efbeadde 00000000"
DEVOPEN_CALL_AFTER = "00000000 10000000 00203412 00000000 00000000 00000000"
FAILED_CALL_AFTER = "02000000 20000000 00203412 00000000 feffffff 00000000"
NEGCAP = "0100000000000000 03000000 08000000 00000000 00000000 00303412 00000000"
NEGCAP_DATA = "00000000 2f000000"
MACQUERY = "0100000000000000 02000000 06000000 00000000 00000000 40303412 00000000"
TX_HEAD = "e42ffa47 04000000 df39fa58 01000000" + "00" * 32 + "00010000 00000000"
DEVSHM = (
    "0100000000000000 01000000 38200000 00000000 00000000 08000000 00000000"
    "785634128088ffff 0000371200000000"
)
DEVSHM_CALL_AFTER = "03000000 30000000 00203412 00000000 00000000 00000000"
POOL_SHM = (
    "0100000000000000 64000000 00400100 00000000 00000000 ffffffff 00000000"
    "0000000000000000 0000381200000000"
)
SHMSIGNAL = "02000000 00000000 785634128088ffff"
SHMCLOSE = "03000000 00000000 785634128088ffff"
DEVDROP = "01000000 00000000 0000000000000000"
MAC = bytes.fromhex("0200c0ffee01")


def event(text: str) -> bytes:
    return bytes.fromhex(text).ljust(144, b"\0")


class Port(Device):
    """Answers the two calls of the example as venet does."""

    type = "virtual-ethernet"

    @call(2)
    def mac(self, connection: Connection, data: bytes) -> bytes:
        return MAC

    @call(3)
    def negotiate(self, connection: Connection, data: bytes) -> bytes:
        return data


@pytest.fixture
def recorded() -> Iterator[RecordedBridge]:
    with RecordedBridge({"port": Port}, new_handle=lambda: 1) as recorded:
        recorded.add("port0", "port")
        yield recorded


class Guest:
    """Writes exactly the bytes of the example."""

    def __init__(self, recorded: RecordedBridge) -> None:
        self.recorded = recorded
        self.bridge = recorded.bridge
        self.memory = recorded.peer.memory

    def bridge_call(self, registers: str, argument: str) -> int:
        self.memory.write(ARGUMENT, bytes.fromhex(argument))
        raw = bytes.fromhex(registers)
        for at in range(0, 16, 4):
            self.bridge.write(0, at, raw[at : at + 4])
        result = self.bridge.read(0, 0, 4)
        assert isinstance(result, bytes)
        return int.from_bytes(result, "little", signed=True)

    def hypercall(self, descriptor: str, argument: str) -> bytes:
        self.memory.write(HYPER, bytes.fromhex(argument))
        self.memory.write(FASTCALL, bytes.fromhex(descriptor))
        assert self.bridge.write(1, 4, bytes(4)) is None
        return self.memory.read(FASTCALL, 24)

    def make_event_ring(self) -> Ring:
        view = self.memory.view(EVENT_RING, ring_size(1024))
        Ring.format(view, 1024)
        ring = Ring(view, self.memory, Locality.NORTH, lambda: None)
        posted = [(at, EVENT_DATA + 144 * at, 144) for at in range(1024)]
        assert ring.push(posted, index=Index.VALID) == 1024
        ring.signal.enable()
        return ring

    def start(self) -> None:
        assert self.bridge_call(NEGOTIATE_BAR, NEGOTIATE) == 1
        assert self.bridge_call(FASTCALL_ADD_BAR, FASTCALL_ADD) == 0
        self.ring = self.make_event_ring()
        assert self.bridge_call(QREG_BAR, QREG) == 0

    def event(self, number: int) -> bytes:
        return self.memory.read(EVENT_DATA + 144 * number, 144)

    def open(self) -> None:
        after = self.hypercall(DEVOPEN_CALL, DEVOPEN)
        assert after == bytes.fromhex(DEVOPEN_CALL_AFTER)

    def share_tx(self) -> SharedMemory:
        view = self.memory.view(TX_RING, 8248)
        Ring.format(view, 256)
        self.hypercall("03000000 30000000 00203412" + "00" * 12, DEVSHM)
        return self.recorded.bridge.connections[0].shm[1]


@pytest.fixture
def guest(recorded: RecordedBridge) -> Guest:
    return Guest(recorded)


def test_negotiate(guest: Guest) -> None:
    """11.1: the result is 1 and the structure comes back unchanged."""
    assert guest.bridge_call(NEGOTIATE_BAR, NEGOTIATE) == 1
    assert guest.memory.read(ARGUMENT, 16) == bytes.fromhex(NEGOTIATE)


def test_fastcall_add(guest: Guest) -> None:
    """11.2, R9."""
    guest.bridge_call(NEGOTIATE_BAR, NEGOTIATE)
    assert guest.bridge_call(FASTCALL_ADD_BAR, FASTCALL_ADD) == 0


def test_qreg_and_devadd(guest: Guest) -> None:
    """11.3 and 11.4: the device present is announced in the first buffer (R1, R2)."""
    guest.start()
    assert guest.event(0) == event(DEVADD)
    assert guest.event(1) == bytes(144)
    assert guest.recorded.peer.interrupts == [(1, 0)]


def test_devopen(guest: Guest) -> None:
    """11.5, R3."""
    guest.start()
    after = guest.hypercall(DEVOPEN_CALL, DEVOPEN)
    assert after == bytes.fromhex(DEVOPEN_CALL_AFTER)
    assert guest.memory.read(HYPER, 16) == bytes.fromhex(DEVOPEN_AFTER)


def test_devcall_with_an_unknown_handle(guest: Guest) -> None:
    """11.5, the last vector: result -2, R3."""
    guest.start()
    after = guest.hypercall("02000000 20000000 00203412" + "00" * 12, NEGCAP)
    assert after == bytes.fromhex(FAILED_CALL_AFTER)


def test_devcalls(guest: Guest) -> None:
    """11.6: in and out in place, R4."""
    guest.start()
    guest.open()
    call_after = bytes.fromhex("02000000 20000000 00203412" + "00" * 12)
    guest.memory.write(DATA, bytes.fromhex(NEGCAP_DATA))
    assert guest.hypercall("02000000 20000000 00203412" + "00" * 12, NEGCAP) == (
        call_after
    )
    assert guest.memory.read(DATA, 8) == bytes.fromhex(NEGCAP_DATA)
    assert guest.hypercall("02000000 20000000 00203412" + "00" * 12, MACQUERY) == (
        call_after
    )
    assert guest.memory.read(DATA + 0x40, 7) == MAC + b"\0"


def test_devshm(guest: Guest) -> None:
    """11.7: the first signal handle is 0, the structure stays as it was (R5)."""
    guest.start()
    guest.open()
    shm = guest.share_tx()
    assert guest.memory.read(TX_RING, 56) == bytes.fromhex(TX_HEAD)
    assert guest.memory.read(FASTCALL, 24) == bytes.fromhex(DEVSHM_CALL_AFTER)
    assert guest.memory.read(HYPER, 48) == bytes.fromhex(DEVSHM)
    assert (shm.handle, shm.cookie) == (0, 0xFFFF888012345678)
    after = guest.hypercall("03000000 30000000 00203412" + "00" * 12, POOL_SHM)
    assert after == bytes.fromhex(DEVSHM_CALL_AFTER)
    assert guest.recorded.bridge.connections[0].shm[100].signal is None


def test_signal_close_and_drop_events(guest: Guest) -> None:
    """11.8: SHMSIGNAL, SHMCLOSE with the cookie, DEVDROP with the device id (R8)."""
    guest.start()
    guest.open()
    guest.share_tx().notify()
    assert guest.event(1) == event(SHMSIGNAL)
    guest.recorded.model.unlink("test", "port0")
    assert guest.event(2) == event(SHMCLOSE)
    assert guest.event(3) == event(DEVDROP)


# Our extensions, in the same form

DEVNAME = "04000000 00000000 00000000 00000000 706f727430"


def test_extension_name_event_and_open_by_name(guest: Guest) -> None:
    """R2: DEVNAME in the buffer before DEVADD; hypercall 4 fills in id and handle."""
    offer = NEGOTIATE[:-18] + " 03000000 00000000"
    assert guest.bridge_call(NEGOTIATE_BAR, offer) == 1
    assert guest.memory.read(ARGUMENT, 16) == bytes.fromhex(offer)
    assert guest.bridge_call(FASTCALL_ADD_BAR, FASTCALL_ADD) == 0
    guest.ring = guest.make_event_ring()
    assert guest.bridge_call(QREG_BAR, QREG) == 0
    assert guest.event(0) == event(DEVNAME)
    assert guest.event(1) == event(DEVADD)
    argument = bytes.fromhex("01000000 00000000 706f727430").ljust(88, b"\0")
    after = guest.hypercall("04000000 58000000 00203412" + "00" * 12, argument.hex())
    assert after == bytes.fromhex("04000000 58000000 00203412" + "00" * 12)
    opened = argument[:72] + bytes(8) + (1).to_bytes(8, "little")
    assert guest.memory.read(HYPER, 88) == opened
