"""Isolation of a backend process: what it gives up once it has what it needs.

A backend opens its files, TAPs and sockets, connects to the daemon, and then calls

    isolate(read=[...], write=[...])

after which the process, for the rest of its life,
- gains no privileges by running programs (no_new_privs), and runs none at all;
- opens no files but those below its paths, and the code it imports (Landlock);
- sees no other process: no ptrace, no memory of others, no signals (seccomp, Landlock);
- makes no new sockets, unless `sockets`; none by TCP either way (seccomp, Landlock);
  with `listen` those of unix that others connect to.

Whatever it has open keeps working: descriptors that come over a unix socket later, such
as guests' memory and eventfds, are as good as those opened before. So are threads,
epoll, mmap, and reading and writing a TAP.

What it does not do: limit CPU and memory (the service manager does), hide the network
from sockets that are open, or stop code that was let in from using what it was given.
"""

import errno
import logging
import os
import sys
import sysconfig
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from vbus.errors import InvalidError, VbusError
from vbus.isolation import kernel, landlock, policy, seccomp
from vbus.isolation.reach import Reach

logger = logging.getLogger(__name__)


class IsolationError(VbusError):
    """This machine cannot isolate a process as required (ENOSYS)."""

    errno = errno.ENOSYS


@dataclass(frozen=True)
class Isolation:
    """What holds a process: `landlock` is the version of its ABI, 0 for none."""

    no_new_privs: bool
    landlock: int
    seccomp: bool


def isolate(
    read: Iterable[Path] = (),
    write: Iterable[Path] = (),
    *,
    required: bool = False,
    sockets: bool = False,
    listen: Iterable[Path] | None = None,
) -> Isolation:
    """Give up all but the files in `read` and `write`; it cannot be taken back.

    The paths are files, or folders for all that lies in them; `write` includes
    reading. With `listen`, which may be empty, unix sockets may be made that others
    connect to: in these folders, and in those of `write`. Call it once, before the
    first thread: each part binds the thread that asks for it and those started later.

    What this kernel lacks is left out with one line in the log, or, if `required`,
    refused with IsolationError before anything was given up. Raises InvalidError if
    there are threads, NotFoundError for a path that is not there, and OSError.
    """
    threads = len(os.listdir("/proc/self/task"))
    if threads > 1:
        raise InvalidError(f"isolation must come before threads; there are {threads}")
    version, machine = landlock.abi(), policy.this_machine()
    filtered = machine is not None and seccomp.available()
    if found := missing():
        if required:
            raise IsolationError(f"isolation is required, but {found}")
        logger.warning("isolated only in part: %s", found)
    with ExitStack() as stack:
        if version:
            rules = stack.enter_context(landlock.Ruleset(version, sockets=sockets))
            rules.allow(code_paths(), landlock.READ)
            rules.allow(read, landlock.READ)
            rules.allow(write, landlock.WRITE)
            rules.allow(listen or (), landlock.LISTEN)
        # From here on nothing can be refused any more.
        kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
        if version:
            rules.restrict_self()
    if filtered and machine is not None:
        listens = listen is not None
        filter = policy.program(machine, os.getpid(), sockets=sockets, listen=listens)
        seccomp.install(filter)
    return Isolation(True, version, filtered)


def missing() -> str:
    """Say what this machine lacks, and what can be done about it; "" for nothing."""
    found = []
    if not landlock.abi():
        found.append("Landlock is not there (a kernel of 5.13 or newer, lsm=landlock)")
    if policy.this_machine() is None:
        known = " and ".join(policy.MACHINES)
        found.append(f"seccomp filters are written for {known} only")
    elif not seccomp.available():
        found.append("seccomp filters are not there (CONFIG_SECCOMP_FILTER)")
    return ", and ".join(found)


def code_paths() -> list[Path]:
    """Where code comes from that is imported late: Python's, ours, and libraries."""
    ours = Path(__file__).parents[2]
    schemes = sysconfig.get_paths()
    paths = [Path(schemes[name]) for name in ("stdlib", "platstdlib", "purelib")]
    paths += [Path(schemes["platlib"]), Path(sys.base_prefix) / "lib"]
    paths += [ours / name for name in ("shm", "ioq", "vbus", "backends")]
    paths += [Path("/lib"), Path("/lib64"), Path("/usr/lib"), Path("/etc/ld.so.cache")]
    return sorted({path.resolve() for path in paths if path.exists()})


__all__ = ["Isolation", "IsolationError", "Reach", "code_paths", "isolate", "missing"]
