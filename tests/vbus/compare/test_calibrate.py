"""The tiny guest through KVM: what it counts is checked, how long it takes is not."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from vbus.compare import calibrate as calibration
from vbus.compare import kvm
from vbus.compare.calibrate import calibrate
from vbus.compare.costs import TITLES, check
from vbus.compare.kvm import TinyGuest, loop
from vbus.errors import NoDeviceError, ProtocolError

OUT, STORE, LOAD = b"\x66\xef", b"\x66\x89\x07", b"\x66\x8b\x07"


@pytest.fixture
def guest(no_fd_leak: None) -> Iterator[TinyGuest]:
    try:
        made = TinyGuest()
    except NoDeviceError as error:
        pytest.skip(str(error))
    with made:
        yield made


def test_a_port_write_leaves_the_guest_each_time(guest: TinyGuest) -> None:
    """R30: 100 times outw are 100 exits, and then it halts."""
    guest.prepare(loop(OUT), 100, edx=kvm.PORT)
    guest.run(100, kvm.EXIT_IO)


def test_an_mmio_write_leaves_the_guest_each_time(guest: TinyGuest) -> None:
    """R30."""
    guest.prepare(loop(STORE), 100, edi=kvm.MMIO)
    guest.run(100, kvm.EXIT_MMIO)


@pytest.mark.parametrize(
    ("body", "registers"),
    [(OUT, {"edx": kvm.PORT_EVENTFD}), (STORE, {"edi": kvm.MMIO_EVENTFD})],
    ids=["port", "mmio"],
)
def test_an_ioeventfd_is_rung_without_an_exit(
    guest: TinyGuest, body: bytes, registers: dict[str, int]
) -> None:
    """R30: the kernel counts all 100, nobody in user space saw one."""
    guest.prepare(loop(body), 100, **registers)
    guest.run(0, 0)
    assert guest.rung() == 100
    assert guest.rung() == 0


def test_a_mapped_page_is_read_without_an_exit(guest: TinyGuest) -> None:
    """R40: "nothing when a single page of 0xff is mapped"."""
    guest.prepare(loop(LOAD), 100, edi=kvm.MAPPED)
    guest.run(0, 0)


def test_another_exit_than_expected_is_an_error(guest: TinyGuest) -> None:
    guest.prepare(loop(OUT), 10, edx=kvm.PORT)
    with pytest.raises(ProtocolError, match="exit 2"):
        guest.run(10, kvm.EXIT_MMIO)


def test_calibration_gives_a_whole_cost_model(
    guest: TinyGuest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R30: every entry is measured, or says why not; all are in the same unit."""
    monkeypatch.setattr(calibration, "ROUNDS", 3)
    steps: list[str] = []
    costs = check(calibrate(steps.append))
    assert set(costs.entries) == set(TITLES)
    assert len(steps) == 3
    for name, one in costs.entries.items():
        assert one.modelled is None
        assert one.unit == "us"
        if one.measured is not None:
            assert one.measured.low <= one.measured.median <= one.measured.high
            assert one.measured.count == len(steps)
        else:
            assert one.missing, name
    assert {name for name, one in costs.entries.items() if one.measured} >= {
        "pio_exit",
        "mmio_exit",
        "pio_ioeventfd",
        "mmio_ioeventfd",
    }
    assert "measured here" in costs.source


def test_interrupted_calibration_keeps_whole_rounds(guest: TinyGuest) -> None:
    steps: list[str] = []

    def step(what: str) -> None:
        if len(steps) == 2:
            raise KeyboardInterrupt
        steps.append(what)

    measured = calibrate(step).entries["pio_exit"].measured
    assert measured is not None
    assert measured.count == 2


def test_without_kvm_it_says_why(tmp_path: Path, no_fd_leak: None) -> None:
    with pytest.raises(NoDeviceError, match="no KVM"):
        calibrate(path=str(tmp_path / "kvm"))
    path = tmp_path / "plain"
    path.write_text("")
    with pytest.raises((NoDeviceError, OSError)):
        TinyGuest(str(path))
