"""Measures a cost model on this machine, with a tiny guest.

Each round times an empty loop, the cheapest call into the kernel, and each access, the
shortest of a few tries; the first two are subtracted, so what remains is the access. (A
bare system call, about 0.2 us, is thereby counted as this program's, not the exit's.)
"""

import platform
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from time import perf_counter

from vbus.compare import kvm
from vbus.compare.cpu import cpu_name, cpu_value
from vbus.compare.kvm import TinyGuest, loop
from vbus.compare.result import Costs, Quantities, Quantity, Sample, missing
from vbus.errors import ProtocolError, VbusError

ROUNDS = 9
_EXITS, _INSIDE, _TRIES = 500, 5000, 5
_STORE, _LOAD = b"\x66\x89\x07", b"\x66\x8b\x07"
_OUT = b"\x66\xef"
_VMCALL = {"vmx": b"\x0f\x01\xc1", "svm": b"\x0f\x01\xd9"}


@dataclass(frozen=True, slots=True)
class _Probe:
    """One access; `reason` is the exit it makes, None if it stays in the kernel."""

    name: str
    body: bytes
    reason: int | None = None
    edx: int = 0
    edi: int = 0
    rings: bool = False


_PROBES = (
    _Probe("pio_exit", _OUT, kvm.EXIT_IO, edx=kvm.PORT),
    _Probe("mmio_exit", _STORE, kvm.EXIT_MMIO, edi=kvm.MMIO),
    _Probe("pio_ioeventfd", _OUT, edx=kvm.PORT_EVENTFD, rings=True),
    _Probe("mmio_ioeventfd", _STORE, edi=kvm.MMIO_EVENTFD, rings=True),
    _Probe("hole_user", _LOAD, kvm.EXIT_MMIO, edi=kvm.MMIO),
    _Probe("hole_mapped", _LOAD, edi=kvm.MAPPED),
)
_EMPTY = _Probe("empty", b"")

_CANNOT = {
    "pv_mmio": "needs an instruction that guest and host agreed on: no KVM has one",
    "hole_kernel": "needs a kernel that answers for holes: the proposal was not merged",
}

STEPS = ROUNDS


def calibrate(
    step: Callable[[str], None] = lambda what: None, path: str = "/dev/kvm"
) -> Costs:
    """Measure what can be measured here. `step` is called before each round.

    Ctrl-C ends it with the rounds that are done, if there are any.
    Raises NoDeviceError where there is no KVM, ProtocolError, CallTimeoutError.
    """
    found: dict[str, list[float]] = {}
    with TinyGuest(path) as guest:
        hypercall, cannot = _hypercall(guest)
        probes = [*_PROBES, *hypercall]
        try:
            for number in range(ROUNDS):
                step(f"round {number + 1}")
                for name, cost in _round(guest, probes).items():
                    found.setdefault(name, []).append(cost)
        except KeyboardInterrupt:
            if not found:
                raise
    entries: Quantities = {name: _quantity(costs) for name, costs in found.items()}
    for name, why in {**_CANNOT, **cannot}.items():
        entries[name] = missing("us", why)
    return Costs(name="measured", source=_source(), entries=entries)


def _round(guest: TinyGuest, probes: list[_Probe]) -> dict[str, float]:
    """Give the cost of every access in us; nothing is less than free."""
    call = _shortest(lambda: _timed(lambda: guest.idle(_EXITS))) / _EXITS
    empty = _shortest(lambda: _time(guest, _EMPTY)) / _INSIDE
    costs = {}
    for probe in probes:
        inside = probe.reason is None
        count = _INSIDE if inside else _EXITS
        took = _shortest(partial(_time, guest, probe))
        cost = took / count - empty - (0 if inside else call)
        costs[probe.name] = max(cost, 0.0)
    return costs


def _time(guest: TinyGuest, probe: _Probe) -> float:
    exits = 0 if probe.reason is None else _EXITS
    count = exits or _INSIDE
    guest.prepare(loop(probe.body), count, edx=probe.edx, edi=probe.edi)
    guest.rung()
    took = _timed(lambda: guest.run(exits, probe.reason or 0))
    if probe.rings and guest.rung() != count:
        raise ProtocolError(f"{probe.name}: the eventfd did not count {count}")
    return took


def _timed(what: Callable[[], None]) -> float:
    """Give the time in us."""
    begin = perf_counter()
    what()
    return (perf_counter() - begin) * 1e6


def _shortest(one: Callable[[], float]) -> float:
    """Try a few times: what is longer was disturbed."""
    return min(one() for _ in range(_TRIES))


def _hypercall(guest: TinyGuest) -> tuple[list[_Probe], dict[str, str]]:
    """Give the probe of a hypercall if one comes back here, else why not."""
    flags = cpu_value("flags").split()
    body = next((code for flag, code in _VMCALL.items() if flag in flags), None)
    if body is None:
        return [], {"hypercall": "this KVM has neither VMX nor SVM to make one with"}
    probe = _Probe("hypercall", body)
    try:
        guest.prepare(loop(probe.body), 1)
        guest.run(0, 0)
    except VbusError as error:
        return [], {"hypercall": str(error)}
    return [probe], {}


def _quantity(costs: list[float]) -> Quantity:
    sample = Sample(median(costs), min(costs), max(costs), len(costs))
    return Quantity("us", measured=sample)


def _source() -> str:
    flavour = (
        "" if {"vmx", "svm"} & set(cpu_value("flags").split()) else ", without VMX/SVM"
    )
    return (
        f"measured here: {cpu_name()},"
        f" Linux {platform.release()}, KVM{flavour}; empty loop and call subtracted"
    )
