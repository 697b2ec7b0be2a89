"""Machines of the comparison, as far as that needs none: places, options, reasons."""

from pathlib import Path

import pytest

from vbus.compare import machine, machines
from vbus.compare.machine import bridges_for, place
from vbus.compare.subjects import SubjectError

COUNTS = (1, 30, 128, 184, 185, 512, 2000)


@pytest.mark.parametrize("count", COUNTS)
def test_every_function_has_a_place_of_its_own(count: int) -> None:
    """R14: eight to a slot, bus 0 first; a slot that is used has its function 0."""
    bridges = bridges_for(count)
    taken = [place(number, bridges) for number in range(count)]
    places = {(str(at["bus"]), str(at["addr"])) for at in taken}
    assert len(places) == count
    slots = {(bus, at.partition(".")[0]) for bus, at in places}
    assert all((bus, f"{slot}.0") in places for bus, slot in slots)
    for bus, at in places:
        slot, function = (int(word, 16) for word in at.split("."))
        assert function < 8
        assert slot in (machine._SLOTS[bridges:] if bus == "pcie.0" else range(1, 32))
    assert {bus for bus, _ in places} <= {"pcie.0"} | {f"b{n}" for n in range(bridges)}


def test_what_has_no_place_is_said() -> None:
    with pytest.raises(SubjectError, match=r"slots: 5,704 functions"):
        bridges_for(6000)


def test_addresses_are_as_many_as_there_are_cards() -> None:
    numbers = range(2100)
    assert len({machine.mac(number) for number in numbers}) == len(numbers)
    found = {machine.address(number) for number in numbers}
    assert len(found) == len(numbers)
    assert f"{machine.HOST}/{machine.NET}" not in found


def test_without_a_qemu_it_says_how_to_get_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(machines.qemu, "find", lambda: None)
    assert "vbus guest qemu" in machines.unavailable()


def test_a_qemu_that_is_not_fit_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VBUS_QEMU", "/bin/true")
    assert "/bin/true" in machines.unavailable()


async def test_a_round_that_cannot_be_says_why(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its process and its network are gone when the reason is told."""
    monkeypatch.setenv("VBUS_QEMU", "/bin/true")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if "network" in machines.unavailable():
        pytest.skip("no network namespaces here")
    with pytest.raises(SubjectError):
        await machines.one_round("function-each", 6000, False)
