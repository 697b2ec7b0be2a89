"""A small assembler of classic BPF for seccomp: which system calls are denied, when.

It makes bytes and knows no kernel; `seccomp` installs them, `policy` says what to deny.

A program is a chain of blocks, one a system call, and a call that no block is about is
allowed (all jumps go forward, inside of a block, so their 8 bits always suffice):

    load arch;  not ours? kill          a foreign ABI numbers its calls otherwise
    load nr;    x32?      deny          likewise, inside of x86-64's own arch
    nr == ptrace?  deny
    nr == clone?   load the flags; a thread? allow; deny
    ...
    allow
"""

import struct
from collections.abc import Iterable
from typing import NamedTuple

ALLOW = 0x7FFF0000
KILL_PROCESS = 0x80000000
ERRNO = 0x00050000
MOST_INSTRUCTIONS = 4096

# linux/bpf_common.h: BPF_LD|W|ABS, BPF_JMP|JEQ/JGE/JSET|K, BPF_ALU|AND|K, BPF_RET|K
LOAD, EQUAL, AT_LEAST, ANY_BIT, AND, RETURN = 0x20, 0x15, 0x35, 0x45, 0x54, 0x06
# struct seccomp_data: int nr; __u32 arch; __u64 instruction_pointer; __u64 args[6]
_NR, _ARCH, _ARGS = 0, 4, 16
_X32_BIT = 0x40000000
_INSTRUCTION = struct.Struct("=HBBI")  # struct sock_filter


class Instruction(NamedTuple):
    """`jump` and `otherwise` count the instructions to leap over."""

    code: int
    operand: int
    jump: int = 0
    otherwise: int = 0


class OneOf(NamedTuple):
    """True if argument `argument` (its low 32 bits, masked) is one of `values`."""

    argument: int
    values: tuple[int, ...]
    mask: int = 0xFFFFFFFF


class Bits(NamedTuple):
    """True if argument `argument` has any of `bits` (of its low 32)."""

    argument: int
    bits: int


class Null(NamedTuple):
    """True if argument `argument` is 0, in all of its 64 bits."""

    argument: int


Condition = OneOf | Bits | Null


class Rule(NamedTuple):
    """Deny system call `number` with `errno`, but not `unless` all conditions hold.

    With `only_if` it is denied where that condition holds, and only there.
    """

    number: int
    errno: int
    unless: tuple[Condition, ...] = ()
    only_if: Condition | None = None


def assemble(arch: int, rules: Iterable[Rule], *, x32_errno: int = 0) -> bytes:
    """Make the program of `rules`; `arch` is the only AUDIT_ARCH that lives.

    `x32_errno`, if not 0, denies x86-64's second ABI. Raises ValueError for two rules
    about one system call, and if the program is longer than the kernel takes.
    """
    rules = tuple(rules)
    if len({rule.number for rule in rules}) != len(rules):
        raise ValueError("two rules about one system call")
    program = [
        Instruction(LOAD, _ARCH),
        Instruction(EQUAL, arch, jump=1),
        Instruction(RETURN, KILL_PROCESS),
        Instruction(LOAD, _NR),
    ]
    if x32_errno:
        program.append(Instruction(AT_LEAST, _X32_BIT, otherwise=1))
        program.append(Instruction(RETURN, ERRNO | x32_errno))
    for rule in rules:
        block = _block(rule)
        program.append(Instruction(EQUAL, rule.number, otherwise=len(block)))
        program += block
    program.append(Instruction(RETURN, ALLOW))
    if len(program) > MOST_INSTRUCTIONS:
        raise ValueError(f"{len(program)} instructions, at most {MOST_INSTRUCTIONS}")
    return b"".join(
        _INSTRUCTION.pack(one.code, one.jump, one.otherwise, one.operand)
        for one in program
    )


def _block(rule: Rule) -> list[Instruction]:
    """What is done once it is that system call; ends in a return on every way."""
    deny = Instruction(RETURN, ERRNO | rule.errno)
    allow = Instruction(RETURN, ALLOW)
    if rule.unless:
        tests = [one for each in rule.unless for one in (*_test(each), deny)]
        return [*tests, allow]
    if rule.only_if is not None:
        return [*_test(rule.only_if), allow, deny]
    return [deny]


def _test(condition: Condition) -> list[Instruction]:
    """Fall onto the next instruction if false, leap over that one if true."""
    low = _ARGS + 8 * condition.argument  # both machines we know are little-endian
    if isinstance(condition, Bits):
        return [Instruction(LOAD, low), Instruction(ANY_BIT, condition.bits, jump=1)]
    if isinstance(condition, Null):
        return [
            Instruction(LOAD, low),
            Instruction(EQUAL, 0, otherwise=2),
            Instruction(LOAD, low + 4),
            Instruction(EQUAL, 0, jump=1),
        ]
    last = len(condition.values) - 1
    return [
        Instruction(LOAD, low),
        Instruction(AND, condition.mask),
        *(
            Instruction(EQUAL, value, jump=1 + last - number)
            for number, value in enumerate(condition.values)
        ),
    ]
