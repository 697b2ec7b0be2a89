"""Random lives of a bus with two guests, every invariant checked after each step."""

from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from vbus import Connection, Device, SharedMemory, abi
from vbus.abi import EventId
from vbus.errors import InvalidError
from vbus.testing import GuestPeer, RecordedBridge, Shared, now

ODD_ID = 7  # refused, after a signal


class Sample(Device):
    type = "org.vbus.sample"
    max_connections = 3

    def share(self, connection: Connection, shm: SharedMemory) -> None:
        if shm.id == ODD_ID:
            shm.notify()
            raise InvalidError("odd")

    def call(self, connection: Connection, func: int, data: bytes, flags: int) -> bytes:
        return data


class Guest:
    """A guest and what it believes."""

    def __init__(self, recorded: RecordedBridge, size: int) -> None:
        self.recorded = recorded
        self.peer: GuestPeer = recorded.peer
        self.free = self.peer._free
        self.restart(0, 1, size)

    def restart(self, offer: int, queues: int, size: int) -> None:
        self.peer._free = self.free  # all older memory is forgotten by the host
        self.devices: set[int] = set()
        self.handles: dict[int, list[Shared]] = {}
        queues = queues if offer & abi.CAP_MULTIQUEUE else 1
        now(self.peer.start(offer, queues=queues, size=size))

    def take(self) -> None:
        for event in self.peer.take_events():
            if event.eventid == EventId.DEVADD:
                assert event.handle not in self.devices, "DEVADD twice: a guest panic"
                self.devices.add(event.handle)
            elif event.eventid == EventId.DEVDROP:
                self.devices.remove(event.handle)

    def settle(self) -> None:
        """Take events until there are none."""
        while self.recorded.bridge.events.waiting or self._taken():
            self.take()

    def _taken(self) -> bool:
        before = self.recorded.bridge.statistics().events.delivered
        self.take()
        return self.recorded.bridge.statistics().events.delivered != before

    def known(self, number: int) -> int | None:
        handles = list(self.handles)
        return handles[number % len(handles)] if handles else None

    def forget(self, devid: int) -> None:
        live = {each.handle for each in self.recorded.bridge.connections}
        for handle in self.handles.keys() - live:
            del self.handles[handle]


class BusMachine(RuleBasedStateMachine):
    @initialize(size=st.integers(1, 6))
    def start(self, size: int) -> None:
        first = RecordedBridge({"sample": Sample})
        second = RecordedBridge(model=first.model, bus=first.bus)
        self.model, self.bus = first.model, first.bus
        self.guests = [Guest(first, size), Guest(second, 7 - size)]
        self.added = 0
        self.add()

    def guest(self, number: int) -> Guest:
        return self.guests[number % 2]

    @precondition(lambda self: len(self.bus.interfaces) < 6)
    @rule()
    def add(self) -> None:
        self.guests[0].recorded.add(f"sample{self.added}", "sample")
        self.added += 1

    @precondition(lambda self: self.bus.interfaces)
    @rule(number=st.integers(0, 100))
    def drop(self, number: int) -> None:
        ids = list(self.bus.interfaces)
        interface = self.bus.interfaces[ids[number % len(ids)]]
        self.model.remove_device(interface.name)
        for guest in self.guests:
            guest.forget(interface.id)

    @rule(number=st.integers(0, 100), which=st.integers(0, 7))
    def open(self, number: int, which: int) -> None:
        guest = self.guest(number)
        ids = [*self.bus.interfaces, self.added]
        interface = self.bus.interfaces.get(devid := ids[which % len(ids)])
        full = interface is not None and len(interface.device.connections) == 3
        try:
            handle = now(guest.peer.open(devid))
        except OSError:
            assert interface is None or full
        else:
            assert not full
            assert handle not in guest.handles
            guest.handles[handle] = []

    def some_handle(self, guest: Guest, number: int) -> int | None:
        """Give an open handle, opened now if there is none."""
        if not guest.handles:
            for which in range(len(self.bus.interfaces)):
                index = self.guests.index(guest)
                self.open(index, which)
        return guest.known(number)

    @rule(number=st.integers(0, 100))
    def close(self, number: int) -> None:
        guest = self.guest(number)
        handle = self.some_handle(guest, number)
        if handle is not None:
            shared = guest.handles.pop(handle)
            now(guest.peer.close_device(handle))
            guest.settle()
            assert all(memory.closed for memory in shared)

    @rule(number=st.integers(0, 100))
    def call(self, number: int) -> None:
        guest, other = self.guest(number), self.guest(number + 1)
        handle = self.some_handle(guest, number)
        if handle is not None:
            assert now(guest.peer.call(handle, 0, b"x")) == (0, b"x")
            try:
                now(other.peer.call(handle, 0, b"x"))
            except OSError:
                return
            raise AssertionError("a handle of another guest works")

    @rule(
        number=st.integers(0, 100),
        id=st.integers(0, ODD_ID),
        prio=st.sampled_from([0, 0, 3, 7, 0xFFFFFFFF]),
    )
    def share(self, number: int, id: int, prio: int) -> None:
        guest = self.guest(number)
        handle = self.some_handle(guest, number)
        if handle is None:
            return
        try:
            shared = now(guest.peer.share(handle, id, 64, signal_offset=0, prio=prio))
        except OSError:
            taken = {memory.id for memory in guest.handles[handle]}
            assert id == ODD_ID or id in taken
        else:
            guest.peer.memory.write(shared.addr + 8, b"\1")
            guest.handles[handle].append(shared)

    @rule(number=st.integers(0, 100), times=st.integers(1, 2))
    def signal(self, number: int, times: int) -> None:
        for connection in self.guest(number).recorded.bridge.connections:
            for memory in connection.shm.values():
                for _ in range(times):
                    memory.notify()

    @rule(number=st.integers(0, 100), handle=st.integers(0, 20))
    def doorbell(self, number: int, handle: int) -> None:
        self.guest(number).peer.signal(abi.SIGNAL_SHM, handle)

    @rule(number=st.integers(0, 100))
    def take_events(self, number: int) -> None:
        self.guest(number).take()

    @rule(
        number=st.integers(0, 100),
        offer=st.integers(0, 7),
        queues=st.integers(1, 8),
        size=st.integers(1, 6),
        how=st.sampled_from(["negotiate", "reset", "leave"]),
    )
    def restart(
        self, number: int, offer: int, queues: int, size: int, how: str
    ) -> None:
        guest = self.guest(number)
        if number > 30:
            return  # rarely, so that much has come together by then
        if how == "reset":
            guest.recorded.bridge.reset()
            guest.peer.set_bus_master(True)
        elif how == "leave":
            guest.peer.detach()
            guest.peer.attach()
        guest.restart(offer, queues, size)

    @rule(number=st.integers(0, 100), data=st.data())
    def garbage(self, number: int, data: Any) -> None:
        """Registers and signal window; never NEGOTIATE, which would be a restart."""
        guest = self.guest(number)
        vector = data.draw(st.integers(1, 6))
        now(guest.peer.bridge_call_at(vector, data.draw(st.integers(0, 64)), 1 << 62))
        offset = data.draw(st.sampled_from([0, 12, 16, 28]))
        guest.peer.signal(offset, data.draw(st.integers(0, 0xFFFFFFFF)))

    @rule(number=st.integers(0, 100), vector=st.integers(0, 6), data=st.data())
    def garbage_hypercall(self, number: int, vector: int, data: Any) -> None:
        """Every field random: nothing it can do is seen by the others' tables."""
        guest = self.guest(number)
        sizes = {0: 16, 1: 8, 2: 32, 3: 48, 4: 88}
        argument = data.draw(
            st.binary(min_size=sizes.get(vector, 8), max_size=sizes.get(vector, 8))
        )
        if vector in (0, 4):
            argument = b"\xff" * 4 + argument[4:]  # never a device that exists
        now(guest.peer.hypercall(vector, argument))

    @invariant()
    def holds(self) -> None:
        for guest in getattr(self, "guests", ()):
            guest.recorded.check()
            handles = {each.handle for each in guest.recorded.bridge.connections}
            assert handles == set(guest.handles)

    def teardown(self) -> None:
        for guest in getattr(self, "guests", ()):
            guest.settle()
            assert guest.devices == set(self.bus.interfaces)
            assert guest.recorded.bridge.statistics().events.lost == 0
        for guest in getattr(self, "guests", ()):
            guest.recorded.close()
        for device in self.model.devices.values() if hasattr(self, "model") else ():
            assert not device.connections


TestBusMachine = BusMachine.TestCase
TestBusMachine.settings = settings(
    max_examples=120, stateful_step_count=60, deadline=None
)
