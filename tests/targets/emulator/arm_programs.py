"""Programs for 64-bit Arm, made of words: no compiler, no library, so that every instruction is known."""

import struct
from pathlib import Path

BASE, HEADERS = 0x400000, 64 + 56
GETPPID, EXIT = 173, 93
SVC, NOP = 0xD4000001, 0xD503201F


def mov(register: int, value: int) -> int:
    """`movz xN, #value`."""
    return 0xD2800000 | value << 5 | register


def marked(*words: int, times: int = 1) -> list[int]:
    """A mark, then `words` in a loop, then a mark: the loop adds 2 instructions a turn, and 3 around it."""
    mark = [mov(8, GETPPID), SVC]
    # mov x9, times; loop: words; subs x9, x9, #1; b.ne loop
    loop = [mov(9, times), *words, 0xF1000529, 0x54000001 | (-(len(words) + 1) & 0x7FFFF) << 5]
    # Loads through x10 go to the stack.
    return [0x910003EA, *mark, *loop, *mark, mov(0, 0), mov(8, EXIT), SVC]


def program(path: Path, words: list[int]) -> Path:
    """A static executable whose first instruction is `words[0]`."""
    code = struct.pack(f"<{len(words)}I", *words)
    ident = b"\x7fELF\x02\x01\x01" + bytes(9)
    head = ident + struct.pack("<HHIQQQIHHHHHH", 2, 183, 1, BASE + HEADERS, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    size = HEADERS + len(code)
    path.write_bytes(head + struct.pack("<IIQQQQQQ", 1, 5, 0, BASE, BASE, size, size, 0x1000) + code)
    path.chmod(0o755)
    return path
