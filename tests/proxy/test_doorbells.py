"""The table of doorbells: what is kept, what is closed."""

import os

import pytest

from proxy.doorbells import DoorbellTable
from tests.proxy.host import open_fds
from vbus.errors import InvalidError, ProtocolError
from vbus.vfio_user.wire import IoEventFdFlag, IoFdType, RegionIoFds, SubRegion

MATCH = IoEventFdFlag.DATAMATCH


def answer(*subs: SubRegion) -> RegionIoFds:
    return RegionIoFds(1, subs, len(subs))


def sub(value: int, index: int = 0, **changes: int) -> SubRegion:
    found = SubRegion(8, 4, index, IoFdType.IOEVENTFD, MATCH, value)
    return found._replace(**changes)


def test_only_what_is_wanted_is_kept() -> None:
    before = open_fds()
    table = DoorbellTable()
    table.want((1, 8, 5))
    kept = os.eventfd(0)
    table.take(answer(sub(4, 0), sub(5, 1)), (os.eventfd(0), kept))
    assert open_fds() == before + 1
    assert table.ring((1, 8, 5))
    assert os.eventfd_read(kept) == 1
    assert not table.ring((1, 8, 4))
    table.take(answer(sub(5)), (os.eventfd(0),))  # known already
    table.forget((1, 8, 5))
    assert not table.ring((1, 8, 5))
    table.take(answer(sub(5)), (os.eventfd(0),))  # comes too late
    assert open_fds() == before


@pytest.mark.parametrize(
    "changes",
    [{"size": 2}, {"type": IoFdType.IOREGIONFD}, {"flags": 0}, {"offset": 4}],
)
def test_another_kind_of_doorbell_is_not_ours(changes: dict[str, int]) -> None:
    before = open_fds()
    table = DoorbellTable()
    table.want((1, 8, 5))
    table.take(answer(sub(5, **changes)), (os.eventfd(0),))
    assert not table.ring((1, 8, 5))
    assert open_fds() == before


def test_a_lying_answer_is_an_error_and_leaks_nothing() -> None:
    before = open_fds()
    table = DoorbellTable()
    table.want((1, 8, 5))
    with pytest.raises(ProtocolError, match="number 1 of 1"):
        table.take(answer(sub(5, 1)), (os.eventfd(0),))
    with pytest.raises(InvalidError):
        table.take(answer(sub(5)), (os.memfd_create("no-eventfd"),))
    table.want((1, 8, 6))
    table.take(answer(sub(5), sub(6)), (os.eventfd(0),))  # one fd for two
    table.close()
    assert not table.ring((1, 8, 5))
    assert open_fds() == before
