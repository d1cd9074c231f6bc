"""The basic blocks of an instrumented module: where each begins, in code and in source.

gcc's ``-fsanitize-coverage=trace-pc`` puts a call of ``__sanitizer_cov_trace_pc`` at the start of
each basic block. The relocations of those calls say where they are; the line table says of which
line.
"""

from __future__ import annotations

import bisect
import io
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elftools.elf.elffile import ELFFile
from elftools.elf.relocation import RelocationSection
from elftools.elf.sections import Symbol

CALLBACK = "__sanitizer_cov_trace_pc"

_SHF_EXECINSTR = 4
_R_X86_64_64, _R_X86_64_32 = 1, 10
#: Every section of a module begins at 0; here section N begins at N * _APART.
_APART = 1 << 32
_FOLDER = "/arch/x86/kvm/"


@dataclass(frozen=True)
class Block:
    """A basic block: ``offset`` in a section is where its call returns to."""

    section: str
    offset: int
    file: str
    line: int


@dataclass(frozen=True)
class Blocks:
    """The blocks of a module, and the functions of each source file: (first line, name)."""

    blocks: list[Block]
    functions: dict[str, list[tuple[int, str]]]


def read(module: Path) -> Blocks:
    """Read a module that was built with ``-gdwarf-5 -g1 -fsanitize-coverage=trace-pc``.

    Files are named from the kernel's top folder; blocks of others than arch/x86/kvm, and blocks
    that belong to no line, are left out.
    """
    content = bytearray(module.read_bytes())
    elf = ELFFile(io.BytesIO(bytes(content)))
    sites = _sites(elf)
    _relocate_debug(elf, content)
    elf = ELFFile(io.BytesIO(bytes(content)))
    lines = _LineTable()
    functions: dict[str, set[tuple[int, str]]] = {}
    dwarf = elf.get_dwarf_info(relocate_dwarf_sections=False)
    for unit in dwarf.iter_CUs():
        program = dwarf.line_program_for_CU(unit)
        files = _file_names(program)
        lines.add(program, files)
        for entry in unit.get_top_DIE().iter_children():
            if entry.tag != "DW_TAG_subprogram" or "DW_AT_declaration" in entry.attributes:
                continue
            if "DW_AT_name" not in entry.attributes:  # code of one that is named elsewhere
                continue
            file = files.get(entry.attributes["DW_AT_decl_file"].value, "")
            if file:
                name = entry.attributes["DW_AT_name"].value.decode()
                line = entry.attributes["DW_AT_decl_line"].value
                functions.setdefault(file, set()).add((line, name))
    blocks = []
    for number, section, offset in sites:
        # The address before belongs to the call itself.
        file, line = lines.at(number * _APART + offset - 1)
        if file and line:
            blocks.append(Block(section, offset, file, line))
    used = {block.file for block in blocks}
    return Blocks(blocks, {f: sorted(found) for f, found in functions.items() if f in used})


def _sites(elf: ELFFile) -> list[tuple[int, str, int]]:
    """(number of the section, its name, offset) of where each call returns to."""
    found = []
    for relocations, target in _relocated(elf):
        if target["sh_flags"] & _SHF_EXECINSTR:
            for relocation, symbol in relocations:
                if symbol.name == CALLBACK:
                    number = elf.get_section_index(target.name) or 0
                    found.append((number, target.name, relocation["r_offset"] + 4))
    return sorted(found)


def _relocated(elf: ELFFile) -> Iterator[tuple[Iterator[tuple[Any, Symbol]], Any]]:
    """For each section with relocations: these with their symbols, and the section."""
    for section in elf.iter_sections():
        if isinstance(section, RelocationSection):
            yield _with_symbols(elf, section), elf.get_section(section["sh_info"])


def _with_symbols(elf: ELFFile, section: RelocationSection) -> Iterator[tuple[Any, Symbol]]:
    table: Any = elf.get_section(section["sh_link"])
    symbols: dict[int, Symbol] = {}
    for relocation in section.iter_relocations():
        number = relocation["r_info_sym"]
        if number not in symbols:
            symbols[number] = table.get_symbol(number)
        yield relocation, symbols[number]


def _relocate_debug(elf: ELFFile, content: bytearray) -> None:
    """Give the debug sections in ``content`` addresses that tell the module's sections apart."""
    for relocations, target in _relocated(elf):
        if target.name not in (".debug_line", ".debug_info"):
            continue
        for relocation, symbol in relocations:
            value = symbol["st_value"] + relocation["r_addend"]
            at = target["sh_offset"] + relocation["r_offset"]
            number = symbol["st_shndx"]
            if relocation["r_info_type"] == _R_X86_64_64 and isinstance(number, int):
                struct.pack_into("<Q", content, at, number * _APART + value)
            elif relocation["r_info_type"] == _R_X86_64_32:  # a place in a debug section
                struct.pack_into("<I", content, at, value)


def _file_names(program: Any) -> dict[int, str]:
    """Numbers of files of a line program -> their names from the kernel's top folder."""
    header = program.header
    folders = [folder.decode() for folder in header["include_directory"]]
    found = {}
    for number, entry in enumerate(header["file_entry"]):
        path = os.path.join(folders[0], folders[entry["dir_index"]], entry["name"].decode())
        _, folder, name = os.path.normpath(path).rpartition(_FOLDER)
        if folder:
            found[number] = f"{_FOLDER[1:]}{name}"
    return found


class _LineTable:
    """Line tables of all units, looked up by address."""

    def __init__(self) -> None:
        self._rows: list[tuple[int, str, int]] = []
        self._sorted = True

    def add(self, program: Any, files: dict[int, str]) -> None:
        """Take the rows of a line program; one that ends a sequence has no file."""
        for entry in program.get_entries():
            state = entry.state
            if state is not None:
                file = "" if state.end_sequence else files.get(state.file, "")
                self._rows.append((state.address, file, state.line))
        self._sorted = False

    def at(self, address: int) -> tuple[str, int]:
        """File and line of an address; ("", 0) if it has none."""
        if not self._sorted:
            # A stable sort: of rows for one address the last counts, the end of a sequence first.
            self._rows.sort(key=lambda row: (row[0], bool(row[1])))
            self._sorted = True
        index = bisect.bisect_right(self._rows, address, key=lambda row: row[0]) - 1
        return self._rows[index][1:] if index >= 0 else ("", 0)
