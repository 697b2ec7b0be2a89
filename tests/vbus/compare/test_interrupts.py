"""Vectors and routes: given out until there are none, and then lines are shared."""

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.vbus.compare.laid import disjoint
from vbus.compare.interrupts import ROUTES, assign
from vbus.compare.pci import Function

PER_CPU = 0xEC - 0x21 - 17


@settings(deadline=None)
@given(st.lists(st.sampled_from([(), (1,), (3, 2), (8, 1)]), max_size=400))
def test_every_vector_is_given_once(wishes: list[tuple[int, ...]]) -> None:
    """R10, R14."""
    got = assign([Function(f"f{n}", vectors=w) for n, w in enumerate(wishes)], cpus=2)
    assert got.vectors <= 2 * PER_CPU
    assert got.routes == got.vectors <= ROUTES
    for space in got.spaces:
        assert disjoint(space.taken)
    asking = sum(bool(wish) for wish in wishes)
    assert got.sharing <= got.reduced <= asking


def test_a_driver_takes_fewer_before_it_shares() -> None:
    """R14: three vectors, else two, else the line."""
    rest = PER_CPU - 2
    takers = [Function(f"t{n}", vectors=(1,)) for n in range(rest)]
    net = [Function(f"n{n}", vectors=(3, 2)) for n in range(2)]
    got = assign([*takers, *net], cpus=1)
    assert (got.reduced, got.sharing) == (2, 1)
    assert got.vectors == PER_CPU


def test_more_cpus_have_more_vectors() -> None:
    functions = [Function(f"f{n}", vectors=(3, 2)) for n in range(1000)]
    assert assign(functions, cpus=2).vectors == 2 * PER_CPU
    assert assign(functions, cpus=8).vectors == 8 * PER_CPU


def test_routes_run_out_where_vectors_do_not() -> None:
    """KVM's table of 4,096, of which 40 are for lines."""
    functions = [Function(f"f{n}", vectors=(3, 2)) for n in range(3000)]
    got = assign(functions, cpus=64)
    assert got.routes == ROUTES - 40
    assert got.sharing > 0
