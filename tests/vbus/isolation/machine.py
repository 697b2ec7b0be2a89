"""What a seccomp program decides: the kernel's machine for classic BPF, in slow."""

import struct
from typing import Final

ALLOW: Final = 0x7FFF0000
KILL: Final = 0x80000000


def data(number: int, arch: int, *arguments: int) -> bytes:
    """struct seccomp_data (linux/seccomp.h)."""
    words = (*arguments, *(0,) * (6 - len(arguments)))
    return struct.pack("<iIQ6Q", number, arch, 0, *words)


def decide(program: bytes, data: bytes) -> int:
    """Run `program` to its return value; anything the kernel refuses is an error."""
    code = list(struct.iter_unpack("=HBBI", program))
    accumulator = at = 0
    while True:
        operation, true, false, operand = code[at]
        at += 1
        if operation == 0x20:  # BPF_LD | BPF_W | BPF_ABS
            assert operand % 4 == 0
            (accumulator,) = struct.unpack_from("<I", data, operand)
        elif operation == 0x54:  # BPF_ALU | BPF_AND | BPF_K
            accumulator &= operand
        elif operation == 0x15:  # BPF_JMP | BPF_JEQ | BPF_K
            at += true if accumulator == operand else false
        elif operation == 0x35:  # BPF_JMP | BPF_JGE | BPF_K
            at += true if accumulator >= operand else false
        elif operation == 0x45:  # BPF_JMP | BPF_JSET | BPF_K
            at += true if accumulator & operand else false
        else:
            assert operation == 0x06, operation  # BPF_RET | BPF_K
            assert isinstance(operand, int)
            return operand
