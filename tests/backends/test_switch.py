"""The rules of the switch, with ports that record what they get."""

import pytest

from backends.venet.switch import Port, Switch
from tests.frames import BROADCAST, ether
from vbus.errors import ExistsError, NotFoundError
from vbus.net import FrameBatch, MacAddress

A, B, C, D = (MacAddress(bytes([2, 0, 0, 0, 0, n])) for n in range(10, 14))


class NoHost:
    def device(self, name: str) -> Switch:
        raise NotFoundError(name)


class FakeTime(Switch):
    """A switch whose time the test sets."""

    time = 0.0

    def clock(self) -> float:
        return self.time


class Recorder(Port):
    """Remembers frames, and how often it was flushed."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.frames: list[bytes] = []
        self.flushes = 0

    def deliver(self, batch: FrameBatch, first: int, count: int) -> None:
        self.frames += [batch.frame(n)[0] for n in range(first, first + count)]

    def flush(self) -> None:
        self.flushes += 1

    def take(self) -> list[bytes]:
        taken, self.frames = self.frames, []
        return taken


class Lan:
    """A switch with three ports; a and b have an address of their own."""

    def __init__(self, **attributes: object) -> None:
        self.switch = FakeTime("lan0", NoHost(), **attributes)
        self.a, self.b, self.c = (Recorder(name) for name in "abc")
        self.switch.attach(self.a, A)
        self.switch.attach(self.b, B)
        self.switch.attach(self.c)

    def send(self, source: Port, *frames: bytes) -> None:
        batch = FrameBatch()
        batch.load([(frame, 0, 0, 0, 0, 0) for frame in frames])
        self.switch.forward(source, batch)


def test_a_frame_for_a_known_address_goes_there_alone() -> None:
    """R15."""
    lan = Lan()
    frame = ether(b"x", to=B, by=A)
    lan.send(lan.a, frame)
    assert (lan.b.take(), lan.c.take(), lan.a.take()) == ([frame], [], [])
    assert lan.switch.statistics().forwarded == 1


@pytest.mark.parametrize("to", [BROADCAST, b"\x01\x00\x5e\x00\x00\x01", D])
def test_group_and_unknown_addresses_are_flooded_to_all_others(to: bytes) -> None:
    """R15."""
    lan = Lan()
    frame = ether(b"x", to=to, by=A)
    lan.send(lan.a, frame)
    assert (lan.a.take(), lan.b.take(), lan.c.take()) == ([], [frame], [frame])
    assert lan.switch.statistics().flooded == 1


def test_an_address_is_learned_from_its_first_frame() -> None:
    """R15: what was flooded before goes to one port after."""
    lan = Lan()
    to_c = ether(b"x", to=C, by=A)
    lan.send(lan.a, to_c)
    lan.send(lan.c, ether(b"y", to=A, by=C))
    lan.b.take(), lan.c.take()
    lan.send(lan.a, to_c)
    assert (lan.b.take(), lan.c.take()) == ([], [to_c])


def test_a_station_that_moves_is_found_at_its_new_port() -> None:
    """R15: also when the old decision was used a moment ago."""
    lan = Lan()
    to_d = ether(b"x", to=D, by=A)
    lan.send(lan.b, ether(b"", to=A, by=D))
    lan.send(lan.a, to_d)
    lan.send(lan.c, ether(b"", to=A, by=D))
    lan.send(lan.a, to_d)
    assert lan.b.take() == [to_d]
    assert lan.c.take() == [to_d]


def test_an_address_is_forgotten_after_its_age() -> None:
    """R15: kept alive by traffic, gone without."""
    lan = Lan(mac_age_s=10)
    to_d = ether(b"x", to=D, by=A)
    for now in (0, 6, 12):
        lan.switch.time = now
        lan.send(lan.c, ether(b"", to=A, by=D))
    lan.switch.time = 21.0
    lan.send(lan.a, to_d)
    assert (lan.b.take(), lan.c.take()) == ([], [to_d])
    lan.switch.time = 23.5
    lan.send(lan.a, to_d)
    assert (lan.b.take(), lan.c.take()) == ([to_d], [to_d])


def test_no_port_speaks_with_the_fixed_address_of_another() -> None:
    """R51: such a frame goes nowhere and moves nothing."""
    lan = Lan()
    lan.send(lan.c, ether(b"spoof", to=BROADCAST, by=A), ether(b"good", to=A, by=C))
    assert lan.a.take() == [ether(b"good", to=A, by=C)]
    assert lan.b.take() == []
    answer = ether(b"x", to=A, by=B)
    lan.send(lan.b, answer)
    assert lan.a.take() == [answer]
    assert lan.switch.statistics().spoofed == 1


def test_a_group_address_is_no_sender() -> None:
    """R51."""
    lan = Lan()
    lan.send(lan.c, ether(b"x", to=A, by=b"\x03\0\0\0\0\1"))
    assert lan.a.take() == []
    assert lan.switch.statistics().spoofed == 1


def test_frames_for_the_port_they_came_from_and_link_local_ones_stay() -> None:
    """R15."""
    lan = Lan()
    lan.send(lan.c, ether(b"", to=A, by=C))
    lan.send(
        lan.c, ether(b"", to=C, by=D), ether(b"", to=b"\x01\x80\xc2\0\0\x0e", by=D)
    )
    assert (len(lan.a.take()), lan.b.take(), lan.c.take()) == (1, [], [])
    assert lan.switch.statistics().filtered == 2


def test_a_batch_is_one_flush_per_port_whatever_its_mix() -> None:
    """R6: frames for a port keep their order, and it is told once."""
    lan = Lan()
    mixed = [ether(bytes([n]), to=(B, BROADCAST, A)[n % 3], by=C) for n in range(60)]
    lan.send(lan.c, *mixed)
    assert lan.a.take() == [f for n, f in enumerate(mixed) if n % 3 != 0]
    assert lan.b.take() == [f for n, f in enumerate(mixed) if n % 3 != 2]
    assert (lan.a.flushes, lan.b.flushes, lan.c.flushes) == (1, 1, 0)


def test_a_port_that_leaves_takes_its_addresses_along() -> None:
    """R15: its fixed address is free for another, traffic to it is flooded."""
    lan = Lan()
    to_b = ether(b"x", to=B, by=A)
    lan.send(lan.a, to_b)
    lan.switch.detach(lan.b)
    lan.send(lan.a, to_b)
    assert (len(lan.b.take()), lan.c.take()) == (1, [to_b])
    lan.switch.attach(lan.b, B)


def test_two_ports_cannot_have_the_same_address() -> None:
    """R51."""
    lan = Lan()
    with pytest.raises(ExistsError):
        lan.switch.attach(Recorder("d"), A)
    with pytest.raises(ExistsError):
        lan.switch.set_mac(lan.b, B, A)
    lan.switch.set_mac(lan.b, B, D)
    lan.switch.set_mac(lan.c, C, B)


def test_a_guest_that_invents_addresses_does_not_fill_the_memory() -> None:
    """R51: neither the table nor the remembered decisions grow without bound."""
    lan = Lan(mac_limit=16)
    for n in range(20000):
        by = b"\x02\1" + n.to_bytes(4, "big")
        lan.send(lan.c, ether(b"", to=A, by=by))
    statistics = lan.switch.statistics()
    assert statistics.macs == 2 + 16
    assert statistics.refused > 0
    assert len(lan.c.decisions) <= 4096
