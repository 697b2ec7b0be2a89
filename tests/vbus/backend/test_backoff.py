"""When a backend that ended is started again."""

from hypothesis import given
from hypothesis import strategies as st

from vbus.backend.backoff import Backoff


def test_the_first_restarts_are_at_once_and_the_next_ones_later_and_later() -> None:
    backoff = Backoff(limit=6, at_once=2, first_s=0.1, most_s=0.3)
    assert [backoff.ended(0) for _ in range(7)] == [0, 0, 0.1, 0.2, 0.3, 0.3, None]


def test_a_healthy_run_ends_the_row() -> None:
    backoff = Backoff(limit=2, at_once=1, healthy_s=2)
    assert [backoff.ended(1.9), backoff.ended(2), backoff.ended(0)] == [0, 0, 0.1]
    assert backoff.ended(0) is None
    backoff.forget()
    assert backoff.ended(0) == 0


@given(st.lists(st.floats(0, 1.9), min_size=1, max_size=40), st.integers(0, 20))
def test_it_gives_up_exactly_after_the_limit(lives: list[float], limit: int) -> None:
    backoff = Backoff(limit)
    given_up = [backoff.ended(life) is None for life in lives]
    assert given_up == [nth >= limit for nth in range(len(lives))]
