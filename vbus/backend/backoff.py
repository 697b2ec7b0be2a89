"""When to start a backend again that has ended: soon at first, then later and later."""

from dataclasses import dataclass


@dataclass(slots=True)
class Backoff:
    """Counts ends in a row; a run of `healthy_s` seconds ends the row."""

    limit: int
    """Ends in a row after which it is given up."""
    at_once: int = 5
    """How many of them cost no pause: who was only unlucky is back within a second."""
    first_s: float = 0.1
    most_s: float = 10.0
    healthy_s: float = 2.0
    ends: int = 0

    def ended(self, lived_s: float) -> float | None:
        """Give the seconds to wait before the next start; None: give up."""
        if lived_s >= self.healthy_s:
            self.ends = 0
        self.ends += 1
        if self.ends > self.limit:
            return None
        if self.ends <= self.at_once:
            return 0.0
        later = self.ends - self.at_once - 1
        return float(min(self.first_s * 2**later, self.most_s))

    def forget(self) -> None:
        """Start counting anew."""
        self.ends = 0
