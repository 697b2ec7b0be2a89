"""The learning table against a model that keeps all it was told."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from backends.venet.mactable import MacTable
from vbus.errors import ExistsError

MACS = [bytes([2, 0, 0, 0, 0, n]) for n in range(8)]
PORTS = ["a", "b", "c"]
AGE, LIMIT = 10.0, 3

macs = st.sampled_from(MACS)
ports = st.sampled_from(PORTS)


class TableModel(RuleBasedStateMachine):
    """`learned`: address -> (port, when last seen); `fixed`: address -> port."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.table: MacTable[str] = MacTable(
            age_s=AGE, limit=LIMIT, clock=lambda: self.now
        )
        self.learned: dict[bytes, tuple[str, float]] = {}
        self.fixed: dict[bytes, str] = {}

    def held(self, port: str) -> int:
        return sum(by == port for by, _ in self.learned.values())

    @rule(seconds=st.sampled_from([0.5, 4.0, 9.5, 30.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule(mac=macs, port=ports)
    def learn(self, mac: bytes, port: str) -> None:
        allowed = self.table.learn(mac, port)
        assert allowed == (self.fixed.get(mac, port) == port)
        if mac in self.fixed:
            return
        if self.learned.get(mac, (port, 0))[0] != port:
            del self.learned[mac]
        if mac in self.learned or self.held(port) < LIMIT:
            self.learned[mac] = (port, self.now)

    @rule(mac=macs, port=ports)
    def fix(self, mac: bytes, port: str) -> None:
        if self.fixed.get(mac, port) != port:
            with pytest.raises(ExistsError):
                self.table.set_static(mac, port)
            return
        self.table.set_static(mac, port)
        self.learned.pop(mac, None)
        self.fixed[mac] = port

    @rule(mac=macs)
    def unfix(self, mac: bytes) -> None:
        self.table.remove_static(mac)
        self.fixed.pop(mac, None)

    @rule(mac=macs)
    def find(self, mac: bytes) -> None:
        port, seen = self.learned.get(mac, (None, 0.0))
        if port is not None and self.now - seen >= AGE:
            del self.learned[mac]
            port = None
        assert self.table.find(mac) == self.fixed.get(mac, port)

    @rule()
    def expire(self) -> None:
        old = [m for m, (_, seen) in self.learned.items() if self.now - seen >= AGE]
        for mac in old:
            del self.learned[mac]
        assert self.table.expire() == len(old)

    @rule(port=ports)
    def forget(self, port: str) -> None:
        self.table.forget(port)
        self.learned = {m: e for m, e in self.learned.items() if e[0] != port}
        self.fixed = {m: p for m, p in self.fixed.items() if p != port}

    @invariant()
    def tables_agree(self) -> None:
        wanted = {(m, p, False) for m, (p, _) in self.learned.items()}
        wanted |= {(m, p, True) for m, p in self.fixed.items()}
        assert set(self.table) == wanted
        assert len(self.table) == len(wanted)


TestMacTable = TableModel.TestCase
TestMacTable.settings = settings(max_examples=150, stateful_step_count=40)


def test_every_change_of_an_answer_changes_the_version() -> None:
    """The switch keeps its decisions only while the version stays."""
    table: MacTable[str] = MacTable(age_s=AGE, limit=LIMIT, clock=lambda: 0.0)
    versions = [table.version]
    for change in (
        lambda: table.learn(MACS[0], "a"),
        lambda: table.learn(MACS[0], "b"),
        lambda: table.set_static(MACS[0], "c"),
        lambda: table.remove_static(MACS[0]),
        lambda: table.learn(MACS[1], "a"),
        lambda: table.forget("a"),
    ):
        change()
        versions.append(table.version)
    assert len(set(versions)) == len(versions)


def test_one_port_cannot_use_up_the_room_of_another() -> None:
    """R51: a guest that invents addresses only loses its own."""
    table: MacTable[str] = MacTable(age_s=AGE, limit=LIMIT, clock=lambda: 0.0)
    for n in range(1000):
        table.learn(n.to_bytes(6, "big"), "hostile")
    assert len(table) == LIMIT
    assert table.refused == 1000 - LIMIT
    assert table.learn(MACS[0], "a")
    assert table.find(MACS[0]) == "a"
