"""A unit's sandbox without systemd: the same walls, put up by the same system calls.

    python -m tests.system.sandbox SANDBOX.json PROGRAM...

gives up what the JSON says and becomes PROGRAM. Capabilities, no_new_privs,
MemoryDenyWriteExecute=, SystemCallFilter= and RestrictAddressFamilies=; what a unit
says of file systems and devices is not tried here.
"""

import errno
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from vbus.isolation import bpf, kernel, policy, seccomp

_PR_CAPBSET_DROP, _PR_SET_MDWE, _MDWE_REFUSE_EXEC_GAIN = 24, 65, 1
CAPABILITIES = {"CAP_CHOWN": 0, "CAP_NET_ADMIN": 12}
FAMILIES = {"AF_UNIX": 1, "AF_INET": 2, "AF_NETLINK": 16}


class Sandbox(msgspec.Struct):
    """What remains allowed; numbers as the kernel has them."""

    capabilities: list[int]
    families: list[int]
    calls: list[int]


def settings(unit: Path) -> dict[str, list[str]]:
    """The [Service] of a unit: each key with its values, in order."""
    found: dict[str, list[str]] = {}
    for line in unit.read_text().splitlines():
        key, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            found.setdefault(key, []).append(value)
    return found


def groups(text: str) -> dict[str, list[str]]:
    """What `systemd-analyze syscall-filter` prints."""
    found: dict[str, list[str]] = {}
    name = ""
    for line in text.splitlines():
        if line.startswith("@"):
            name = line.strip()
        elif line.startswith("    ") and "#" not in line:
            found.setdefault(name, []).append(line.strip())
    return found


def expand(words: Sequence[str], known: Mapping[str, list[str]]) -> set[str]:
    calls: set[str] = set()
    for word in words:
        calls |= expand(known[word], known) if word in known else {word}
    return calls


def allowed_calls(filters: Sequence[str], known: Mapping[str, list[str]]) -> set[str]:
    """systemd.exec(5): the first line is what is allowed, later ones add or take."""
    calls: set[str] = expand(["@default"], known)
    for line in filters:
        words = line.removeprefix("~").split()
        if line.startswith("~"):
            calls -= expand(words, known)
        else:
            calls |= expand(words, known)
    return calls


def numbers() -> dict[str, int]:
    """This machine's system calls, from the compiler's headers."""
    done = subprocess.run(
        ["gcc", "-E", "-dM", "-"],
        input="#include <asm/unistd.h>\n",
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [line.split() for line in done.stdout.splitlines()]
    named = [line[1:] for line in lines if len(line) == 3]
    return {
        name.removeprefix("__NR_"): int(number)
        for name, number in named
        if name.startswith("__NR_") and number.isdigit()
    }


def sandbox(unit: Path, known: Mapping[str, list[str]]) -> Sandbox:
    """Read a unit."""
    said = settings(unit)
    table = numbers()
    calls = allowed_calls(said["SystemCallFilter"], known)
    [families] = said["RestrictAddressFamilies"]
    [capabilities] = said["CapabilityBoundingSet"]
    return Sandbox(
        [CAPABILITIES[name] for name in capabilities.split()],
        [FAMILIES[name] for name in families.split()],
        sorted(table[name] for name in calls if name in table),
    )


def enter(box: Sandbox) -> None:
    """Put up the walls around this process."""
    last = int(Path("/proc/sys/kernel/cap_last_cap").read_text())
    for capability in range(last + 1):
        if capability not in box.capabilities:
            kernel.prctl(_PR_CAPBSET_DROP, capability)
    kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
    kernel.prctl(_PR_SET_MDWE, _MDWE_REFUSE_EXEC_GAIN)
    machine = policy.this_machine()
    assert machine is not None
    make = policy.NUMBERS["socket"][machine.column]
    assert make is not None
    families = bpf.OneOf(0, tuple(box.families))
    rules = [bpf.Rule(make, errno.EAFNOSUPPORT, unless=(families,))]
    rules += [
        bpf.Rule(number, errno.EPERM)
        for number in range(600)
        if number != make and number not in box.calls
    ]
    seccomp.install(bpf.assemble(machine.arch, rules))


if __name__ == "__main__":
    enter(msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=Sandbox))
    os.execv(sys.argv[2], sys.argv[2:])
