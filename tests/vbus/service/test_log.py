"""Lines as the journal wants them."""

import io
import logging
import os
from pathlib import Path

import pytest
import structlog

from vbus.service.log import goes_to_journal, journal_formatter


@pytest.fixture
def stream() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def log(stream: io.StringIO) -> logging.Logger:
    logger = logging.Logger("vbus.daemon", logging.DEBUG)
    handler = logging.StreamHandler(stream)
    handler.setFormatter(journal_formatter())
    logger.addHandler(handler)
    return logger


@pytest.mark.parametrize(
    ("level", "prefix"),
    [
        (logging.DEBUG, "<7>"),
        (logging.INFO, "<6>"),
        (logging.WARNING, "<4>"),
        (logging.ERROR, "<3>"),
        (logging.CRITICAL, "<2>"),
    ],
)
def test_the_level_is_syslogs(
    log: logging.Logger, stream: io.StringIO, level: int, prefix: str
) -> None:
    """sd-daemon(3): no time and no colours, which the journal has by itself."""
    log.log(level, "ready in %s", "/run/vbus")
    assert stream.getvalue() == f"{prefix}vbus.daemon: ready in /run/vbus\n"


def test_each_line_of_a_traceback_has_the_level(
    log: logging.Logger, stream: io.StringIO
) -> None:
    try:
        raise ZeroDivisionError("a bug\nof two lines")
    except ZeroDivisionError:
        log.exception("device d0 failed")
    lines = stream.getvalue().splitlines()
    assert lines[0] == "<3>vbus.daemon: device d0 failed"
    assert lines[-2:] == ["<3>ZeroDivisionError: a bug", "<3>of two lines"]
    assert all(line.startswith("<3>") for line in lines)


def test_what_is_bound_to_a_line_is_shown(
    log: logging.Logger, stream: io.StringIO
) -> None:
    structured = structlog.wrap_logger(
        log,
        processors=[
            structlog.stdlib.add_log_level,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
    )
    structured.warning("slow", guest="g1", microseconds=12)
    assert stream.getvalue() == "<4>vbus: slow guest='g1' microseconds=12\n"


def test_only_the_stream_the_journal_reads_is_its_own(tmp_path: Path) -> None:
    with open(tmp_path / "log", "w") as file:
        status = os.fstat(file.fileno())
        told = {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"}
        assert goes_to_journal(file, told)
        assert not goes_to_journal(file, {"JOURNAL_STREAM": "1:2"})
        assert not goes_to_journal(file, {})
    assert not goes_to_journal(io.StringIO(), told)
