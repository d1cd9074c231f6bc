"""Machine code as text, by capstone where it is installed."""

from __future__ import annotations


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
