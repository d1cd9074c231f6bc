"""Machine code as text, by capstone where it is installed."""

from __future__ import annotations

import re

_CODE = re.compile(r"^( *)(.*) at (0x[0-9a-f]+), (16|32|64)-bit: ([0-9a-f ]+)$", re.MULTILINE)
_MOST = 24


def available() -> bool:
    """Whether capstone can be imported."""
    try:
        import capstone
    except ImportError:
        return False
    return bool(capstone)


def lines(code: bytes, address: int, bits: int, count: int = 8) -> list[str]:
    """At most ``count`` instructions of 16-, 32- or 64-bit code, one line each.

    ``0x8eab  cpuid``. Without capstone (``pip install 'kvmnest[disassembly]'``), or where the
    bytes are no instruction, the bytes themselves.
    """
    found: list[str] = []
    end = 0
    if available():
        import capstone

        modes = {16: capstone.CS_MODE_16, 32: capstone.CS_MODE_32, 64: capstone.CS_MODE_64}
        decoder = capstone.Cs(capstone.CS_ARCH_X86, modes[bits])
        for at, size, name, operands in decoder.disasm_lite(code, address, count):
            found.append(f"{at:#x}  {name} {operands}".rstrip())
            end = at - address + size
    if len(found) < count and end < len(code):
        found.append(f"{address + end:#x}  bytes {code[end : end + 16].hex(' ')}")
    return found


def code_line(what: str, address: int, bits: int, code: bytes) -> str:
    """One line that holds code, for ``expand``: ``L2's code at 0x47000, 64-bit: 0f a2``."""
    return f"{what} at {address:#x}, {bits}-bit: {code.hex(' ')}"


def expand(text: str) -> str:
    """A text with each ``code_line`` disassembled; without capstone the text itself.

    Where the line is made (in the lab's guest) there need be no capstone.
    """
    if not available():
        return text

    def listing(found: re.Match[str]) -> str:
        indent, what, address, bits, code = found.groups()
        found_lines = lines(bytes.fromhex(code), int(address, 16), int(bits), _MOST)
        listed = "".join(f"\n{indent}  {line}" for line in found_lines)
        return f"{indent}{what} ({bits}-bit):{listed}"

    return _CODE.sub(listing, text)
