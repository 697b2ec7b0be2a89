"""Network namespaces by util-linux: no `ip`, no root where user namespaces are allowed.

The demo's own namespace is the host of the play; each guest gets one below it. They end
with their last process.
"""

import os
import subprocess
import sys

_NET = ("unshare", "--net")
_CONTAINED = (*_NET, "--pid", "--fork", "--kill-child", "--mount-proc")
_PROBE = "from vbus.net import Tap; Tap('probe%d').close()"


class RefusedError(Exception):
    """This user may not make what the demo needs; the message says what."""


def enter() -> list[str]:
    """Give the words before a command that run it in namespaces of its own.

    With a process namespace where that is allowed, so that nothing can be left behind.
    Raises RefusedError.
    """
    user = () if os.geteuid() == 0 else ("--map-root-user",)
    for words in (_CONTAINED, _NET):
        command = [*words, *user]
        if _works(command, "true"):
            break
    else:
        raise RefusedError("may not make network namespaces, as root or by user")
    if not _works(command, sys.executable, "-c", _PROBE):
        raise RefusedError("no TAP interface can be made: /dev/net/tun")
    return command


def _works(command: list[str], *words: str) -> bool:
    done = subprocess.run([*command, *words], capture_output=True, check=False)
    return done.returncode == 0


def new_network(*command: str) -> list[str]:
    """Give the command that runs this one in a network of its own."""
    return [*_NET, *command]


def in_network_of(pid: int, *command: str) -> list[str]:
    """Give the command that runs this one in the network of a process."""
    return ["nsenter", "--target", str(pid), "--net", *command]
