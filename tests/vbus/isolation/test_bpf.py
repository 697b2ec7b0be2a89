"""The filter as a program: its decisions, on an interpreter of its own."""

import errno
import os
import platform
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.vbus.isolation.machine import ALLOW, KILL, data, decide
from vbus.isolation import bpf, policy
from vbus.isolation.bpf import Bits, Null, OneOf, Rule

ARCH = 0xC000003E
PID = 4711
ANY_WORD = st.integers(0, (1 << 64) - 1)
MACHINES = sorted(policy.MACHINES)


def denied(code: int) -> int:
    return 0x00050000 | code


@given(st.sets(st.integers(0, 500), max_size=200), st.integers(0, 600))
def test_what_no_rule_names_is_allowed_and_the_rest_denied(
    numbers: set[int], called: int
) -> None:
    rules = [Rule(number, number % 100 + 1) for number in numbers]
    program = bpf.assemble(ARCH, rules)
    expected = denied(called % 100 + 1) if called in numbers else ALLOW
    assert decide(program, data(called, ARCH)) == expected


@given(ANY_WORD, st.integers(0, 5), st.integers(0, (1 << 32) - 1))
def test_bits_are_looked_for_in_the_low_half(
    word: int, argument: int, bits: int
) -> None:
    arguments = [0] * 6
    arguments[argument] = word
    for condition, holds in (
        (Bits(argument, bits), bool(word & bits)),
        (Null(argument), word == 0),
        (OneOf(argument, (bits, 7)), word & 0xFFFFFFFF in (bits, 7)),
        (OneOf(argument, (3, 5), mask=15), word & 15 in (3, 5)),
    ):
        unless = bpf.assemble(ARCH, [Rule(9, 1, unless=(condition,)), Rule(10, 2)])
        only_if = bpf.assemble(ARCH, [Rule(9, 1, only_if=condition), Rule(10, 2)])
        asked = data(9, ARCH, *arguments)
        assert decide(unless, asked) == (ALLOW if holds else denied(1))
        assert decide(only_if, asked) == (denied(1) if holds else ALLOW)
        assert decide(unless, data(10, ARCH)) == denied(2)


@given(st.lists(st.integers(0, 2), min_size=3, max_size=3))
def test_a_call_is_let_through_only_if_all_conditions_hold(words: list[int]) -> None:
    unless = (OneOf(0, (1,)), Bits(1, 2), OneOf(2, (0, 2)))
    holds = words[0] == 1 and words[1] == 2 and words[2] != 1
    program = bpf.assemble(ARCH, [Rule(9, 1, unless=unless), Rule(10, 2)])
    assert decide(program, data(9, ARCH, *words)) == (ALLOW if holds else denied(1))
    assert decide(program, data(10, ARCH, *words)) == denied(2)


@given(st.integers(0, (1 << 32) - 1), st.integers(-(1 << 31), (1 << 31) - 1))
def test_a_foreign_machine_is_killed_whatever_it_calls(arch: int, number: int) -> None:
    """R60: i386 calls in a 64-bit process have other numbers."""
    program = bpf.assemble(ARCH, [Rule(1, 1)])
    expected = KILL if arch != ARCH else denied(1) if number == 1 else ALLOW
    assert decide(program, data(number, arch)) == expected


def test_the_second_abi_of_x86_is_denied_as_a_whole() -> None:
    program = bpf.assemble(ARCH, [], x32_errno=errno.ENOSYS)
    assert decide(program, data(0x40000000, ARCH)) == denied(errno.ENOSYS)
    assert decide(program, data(0x3FFFFFFF, ARCH)) == ALLOW


def test_two_rules_about_one_call_are_a_mistake() -> None:
    with pytest.raises(ValueError, match="two rules"):
        bpf.assemble(ARCH, [Rule(1, 1), Rule(1, 2)])


def test_a_program_too_long_for_the_kernel_is_refused() -> None:
    with pytest.raises(ValueError, match="4096"):
        bpf.assemble(ARCH, [Rule(number, 1) for number in range(3000)])


# The policy


@pytest.mark.parametrize("name", MACHINES)
def test_policy_on_every_machine(name: str) -> None:
    """R60: the same calls are denied, by other numbers."""
    machine = policy.MACHINES[name]
    program = policy.program(machine, PID, sockets=False)

    def decided(call: str, *arguments: int) -> int:
        number = policy.NUMBERS[call][machine.column]
        assert number is not None
        return decide(program, data(number, machine.arch, *arguments))

    for call in ("ptrace", "process_vm_readv", "execve", "mount", "io_uring_setup"):
        assert decided(call) == denied(errno.EPERM), call
    assert decided("clone", 0x00010000 | 0x100) == ALLOW
    assert decided("clone", 17) == denied(errno.EPERM)
    assert decided("clone3") == denied(errno.ENOSYS)
    assert decided("kill", PID) == decided("tgkill", PID) == ALLOW
    assert decided("kill", 1) == decided("kill", 0) == denied(errno.EPERM)
    assert decided("kill", (1 << 32) - 1) == denied(errno.EPERM)
    assert decided("prlimit64", 0) == decided("prlimit64", PID) == ALLOW
    assert decided("prlimit64", 1) == denied(errno.EPERM)
    assert decided("ioctl", 3, policy.TIOCSTI) == denied(errno.EPERM)
    assert decided("ioctl", 3, 0x400454CA) == ALLOW
    assert decided("socketpair", 1, 1 | 0x80000) == ALLOW
    assert decided("socketpair", 1, 2) == denied(errno.EPERM)
    assert decided("sendto", 3, 4, 5, 0, 0) == ALLOW
    assert decided("sendto", 3, 4, 5, 0, 1 << 40) == denied(errno.EPERM)
    assert decided("socket") == decided("connect") == denied(errno.EPERM)


def test_sockets_can_be_left_open() -> None:
    machine = policy.MACHINES["x86_64"]
    program = policy.program(machine, PID, sockets=True)
    for call in ("socket", "connect", "sendto", "socketpair"):
        number = policy.NUMBERS[call][0]
        assert number is not None
        assert decide(program, data(number, machine.arch, 1, 2, 3, 4, 5)) == ALLOW


@pytest.mark.parametrize("name", MACHINES)
def test_who_listens_makes_unix_streams_and_nothing_else(name: str) -> None:
    """R51: a datagram socket would send anywhere, a stream only where it connects."""
    machine = policy.MACHINES[name]
    program = policy.program(machine, PID, listen=True)

    def decided(call: str, *arguments: int) -> int:
        number = policy.NUMBERS[call][machine.column]
        assert number is not None
        return decide(program, data(number, machine.arch, *arguments))

    assert decided("socket", 1, 1 | 0x80000) == decided("socket", 1, 5) == ALLOW
    for family, kind in ((1, 2), (2, 1), (16, 3), (17, 3)):
        assert decided("socket", family, kind) == denied(errno.EPERM)
    assert decided("connect") == denied(errno.EPERM)


@pytest.mark.parametrize("name", MACHINES)
def test_numbers_are_those_of_the_kernel_headers(name: str) -> None:
    """Golden: the compiler's headers; aarch64 has the generic table."""
    native = name == platform.machine()
    header = "asm/unistd.h" if native else "asm-generic/unistd.h"
    if not native and name != "aarch64":
        pytest.skip(f"the headers of {name} are not on this machine")
    words = ["RENAMEAT", "NEW_STAT", "SET_GET_RLIMIT", "SYS_CLONE3", "MEMFD_SECRET"]
    defines = [f"-D__ARCH_WANT_{word}" for word in words]
    done = subprocess.run(
        ["gcc", "-E", "-dM", "-D__BITS_PER_LONG=64", *defines, "-"],
        input=f"#include <{header}>\n",
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [line.split() for line in done.stdout.splitlines()]
    table = {line[1]: line[2] for line in lines if len(line) == 3}
    column = policy.MACHINES[name].column
    for call, numbers in policy.NUMBERS.items():
        found = table.get(f"__NR_{call}", table.get(f"__NR3264_{call}"))
        number = numbers[column]
        assert found == (None if number is None else str(number)), call


def test_this_machine_is_known_or_not() -> None:
    expected = policy.MACHINES.get(os.uname().machine)
    assert policy.this_machine() == expected
