"""What is to be shown of one object, before it becomes metrics."""

from typing import NamedTuple

Labels = dict[str, str]


class Sample(NamedTuple):
    """The statistics of one object: `kind` begins its metrics' names."""

    kind: str
    labels: Labels
    statistics: object
