"""The payload's ELF file: segments to load, labels, and the constants of ``payloads/abi.inc``."""

from __future__ import annotations

import functools
import io
from dataclasses import dataclass
from pathlib import Path

from elftools.common.exceptions import ELFError
from elftools.elf.elffile import ELFFile
from elftools.elf.sections import NoteSection, SymbolTableSection

from kvmnest.errors import PayloadError
from kvmnest.l1 import build

#: The meaning of the mailbox that this package speaks; abi.inc holds the payload's side.
ABI_VERSION = 2


@dataclass(frozen=True)
class Payload:
    """A payload ready to be loaded.

    ``segments`` are (guest-physical address, bytes); ``symbols`` holds every label (an address)
    and every constant of abi.inc; ``entry`` is where a vCPU starts.
    """

    path: Path
    entry: int
    segments: tuple[tuple[int, bytes], ...]
    symbols: dict[str, int]
    build_id: str

    def __repr__(self) -> str:
        return f"<Payload {self.path}>"

    @functools.cached_property
    def image(self) -> bytes:
        """Memory from address 0 to ``work_end`` as it is before the first command."""
        memory = bytearray(self["work_end"])
        for address, content in self.segments:
            memory[address : address + len(content)] = content
        return bytes(memory)

    def code(self, name: str) -> bytes:
        """Bytes from the label ``name`` to the label ``name_end``; PayloadError without one."""
        start, end = self[name], self[f"{name}_end"]
        for address, content in self.segments:
            if address <= start <= end <= address + len(content):
                return content[start - address : end - address]
        raise PayloadError(f"the payload {self.path} does not hold what '{name}' names")

    def __getitem__(self, name: str) -> int:
        """Value of a constant or address of a label; PayloadError when there is none."""
        try:
            return self.symbols[name]
        except KeyError:
            raise PayloadError(f"the payload {self.path} has no symbol '{name}'") from None


def _build_id(elf: ELFFile) -> str:
    for section in elf.iter_sections():
        if isinstance(section, NoteSection):
            for note in section.iter_notes():
                if note["n_type"] == "NT_GNU_BUILD_ID":
                    return str(note["n_desc"])
    return ""


def _symbols(elf: ELFFile) -> dict[str, int]:
    table = elf.get_section_by_name(".symtab")
    if not isinstance(table, SymbolTableSection):
        return {}
    return {symbol.name: symbol["st_value"] for symbol in table.iter_symbols() if symbol.name}


def load(path: Path = build.ELF) -> Payload:
    """Read and check the payload.

    Raises:
        PayloadError: missing, not an ELF file, truncated, or of another ABI version.
    """
    remedy = "run 'python -m kvmnest.l1.build'"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise PayloadError(f"no payload at {path} ({error.strerror}); {remedy}") from None
    try:
        elf = ELFFile(io.BytesIO(data))
        segments = []
        for segment in elf.iter_segments("PT_LOAD"):
            content = segment.data()
            if len(content) != segment["p_filesz"]:
                raise PayloadError(f"the payload {path} is truncated; {remedy}")
            segments.append((segment["p_paddr"], content))
        payload = Payload(path, elf["e_entry"], tuple(segments), _symbols(elf), _build_id(elf))
    except PayloadError:
        raise
    except (ELFError, OSError, ValueError, KeyError, IndexError, AssertionError) as error:
        raise PayloadError(f"the payload {path} is not usable ({error}); {remedy}") from None
    version = payload["ABI_VERSION"]
    if version != ABI_VERSION:
        raise PayloadError(f"payload ABI {version}, kvmnest needs {ABI_VERSION}; {remedy}")
    return payload


@functools.cache
def default() -> Payload:
    """Return the package's own payload, read once a process.

    In a checkout it is built when it is missing, unusable (of an earlier ABI, say) or older than
    its sources.
    """
    wanted = build.source_hash()
    if wanted is None:
        return load()
    try:
        payload = load()
    except PayloadError:
        return load(build.build())
    return payload if payload.build_id == wanted else load(build.build())
