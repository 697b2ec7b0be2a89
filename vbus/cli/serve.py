"""`vbus serve`: the daemon as a process, with its log and its signals."""

import logging
import os
import sys
from pathlib import Path

import click
import structlog
import trio

from vbus.config import Config, load, runtime_dir
from vbus.daemon import Daemon
from vbus.errors import ConfigError, PermissionDeniedError, VbusError, innermost
from vbus.logs import add_about
from vbus.service.inherited import take
from vbus.service.log import goes_to_journal, journal_formatter
from vbus.service.managed import run
from vbus.service.notify import Notifier
from vbus.service.restart import receive
from vbus.sockets import Listeners

EXIT_NO_PERMISSION = 77
EXIT_BAD_CONFIG = 78
_JSON = (structlog.processors.format_exc_info, structlog.processors.JSONRenderer())


@click.command()
@click.option(
    "--config",
    "-c",
    "path",
    type=click.Path(dir_okay=False, path_type=Path),
    help="The configuration; without one the daemon starts empty.",
)
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="info",
    show_default=True,
)
@click.option(
    "--log-format",
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
    help="For people, or an object on each line for programs.",
)
@click.pass_context
def serve(
    context: click.Context, path: Path | None, log_level: str, log_format: str
) -> None:
    """Run the bus daemon until SIGTERM or SIGINT."""
    _log_to_stderr(log_level, as_json=log_format == "json")
    try:
        trio.run(run, *_at_home(path))
    except (VbusError, OSError, ExceptionGroup) as error:
        cause = innermost(error)
        known = isinstance(cause, VbusError | OSError)
        if not known or context.find_root().params.get("debug"):
            raise
        context.exit(_explain(cause))


def _at_home(path: Path | None) -> tuple[Daemon, Notifier, tuple[str, ...]]:
    """Make the daemon with what the service manager gave, or one before us."""
    legacy = receive(take(os.environ))
    config = legacy.config
    if config is None:
        config = Config() if path is None else load(path)
    where = runtime_dir(config.daemon.runtime_dir)
    notifier = Notifier.from_environment(os.environ)
    keeper = notifier if notifier.connected else None
    listeners = Listeners(where, legacy.rest, keeper)
    daemon = Daemon(config, where, listeners=listeners, predecessor=legacy.predecessor)
    return daemon, notifier, legacy.stored


def _explain(error: BaseException) -> int:
    click.echo(f"vbus: {error}", err=True)
    if isinstance(error, ConfigError):
        return EXIT_BAD_CONFIG
    denied = isinstance(error, PermissionError | PermissionDeniedError)
    return EXIT_NO_PERMISSION if denied else 1


def _log_to_stderr(level: str, *, as_json: bool) -> None:
    colors = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    handler = logging.StreamHandler()
    if goes_to_journal(sys.stderr, os.environ) and not as_json:
        handler.setFormatter(journal_formatter())
    else:
        last = _JSON if as_json else (structlog.dev.ConsoleRenderer(colors=colors),)
        handler.setFormatter(_formatter(*last))
    logging.basicConfig(level=level.upper(), handlers=[handler])


def _formatter(*last: structlog.typing.Processor) -> logging.Formatter:
    return structlog.stdlib.ProcessorFormatter(
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            *last,
        ],
        foreign_pre_chain=[
            structlog.stdlib.add_log_level,
            structlog.stdlib.add_logger_name,
            structlog.processors.TimeStamper(fmt="iso"),
            add_about,
        ],
    )
