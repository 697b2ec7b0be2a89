"""Log lines for the journal, which knows time, process and level by itself.

Each line begins with its level as sd-daemon(3) says ("<6>"), and carries neither a
time nor colours: `journalctl -p warning -u vbusd` then shows what it should.
"""

import logging
import os
from collections.abc import Mapping
from typing import IO, Any, Final

import structlog

from vbus.logs import add_about

_PRIORITIES: Final = {
    "critical": 2,
    "exception": 3,
    "error": 3,
    "warning": 4,
    "info": 6,
    "debug": 7,
}
_INFORMATION: Final = 6


def goes_to_journal(stream: IO[Any], environment: Mapping[str, str]) -> bool:
    """Is `stream` what $JOURNAL_STREAM says the journal reads (systemd.exec(5))?"""
    told = environment.get("JOURNAL_STREAM", "")
    try:
        status = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return told == f"{status.st_dev}:{status.st_ino}"


def journal_formatter() -> logging.Formatter:
    """Make a formatter for a handler whose stream goes to the journal."""
    return structlog.stdlib.ProcessorFormatter(
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            structlog.processors.format_exc_info,
            _render,
        ],
        foreign_pre_chain=[
            structlog.stdlib.add_log_level,
            structlog.stdlib.add_logger_name,
            add_about,
        ],
    )


def _render(_logger: object, _method: str, event: structlog.typing.EventDict) -> str:
    """Write "<6>logger: event key=value"; each line of a traceback has its level."""
    level = _PRIORITIES.get(str(event.pop("level", "")), _INFORMATION)
    head = f"{event.pop('logger', 'vbus')}: {event.pop('event', '')}"
    trace = event.pop("exception", None)
    pairs = [f"{key}={value!r}" for key, value in event.items()]
    lines = " ".join([head, *pairs]).splitlines()
    if trace:
        lines += str(trace).splitlines()
    return "\n".join(f"<{level}>{line}" for line in lines)
