"""One report of all models, which the tests of reports and of the page share."""

import pytest

from vbus.compare import run
from vbus.compare.costs import PUBLISHED
from vbus.compare.platforms import Q35
from vbus.compare.result import Report


@pytest.fixture(scope="session")
def report() -> Report:
    return run.model(Q35, PUBLISHED, (1, 40))
