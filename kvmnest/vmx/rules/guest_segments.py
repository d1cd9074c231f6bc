"""Checks on the guest's segment registers (SDM "Checks on Guest Segment Registers")."""

from __future__ import annotations

from collections.abc import Iterator

from kvmnest.vmx.fields import Field as F
from kvmnest.vmx.registers import AccessRights
from kvmnest.vmx.rules.model import Entry, Rule, Section, Stage, Violation

_S = Section(Stage.GUEST, "Checks on Guest Segment Registers")

_RESERVED = 0xFFFE0F00
"""Bits 31:17 and 11:8 of the access rights."""

_UNUSABLE = 1 << 16


class _Segment:
    """The four fields of one segment register."""

    __slots__ = ("base", "limit", "name", "rights", "selector")

    def __init__(self, name: str) -> None:
        self.name = name
        self.selector = F[f"GUEST_{name}_SELECTOR"]
        self.base = F[f"GUEST_{name}_BASE"]
        self.limit = F[f"GUEST_{name}_LIMIT"]
        self.rights = F[f"GUEST_{name}_ACCESS_RIGHTS"]


_CS, _SS = _Segment("CS"), _Segment("SS")
_DATA = tuple(_Segment(name) for name in ("DS", "ES", "FS", "GS"))
_SIX = (_CS, _SS, *_DATA)
_TR, _LDTR = _Segment("TR"), _Segment("LDTR")


def _usable(e: Entry, segment: _Segment) -> bool:
    """CS and TR are always checked; bit 16 has a rule of its own for TR."""
    return segment is _CS or not e[segment.rights] & _UNUSABLE


def selectors(e: Entry) -> Iterator[Violation]:
    """TI of TR and LDTR, RPL of SS."""
    if e[_TR.selector] & 4:
        yield _S.broken("TR: TI of the selector must be 0", _TR.selector)
    if _usable(e, _LDTR) and e[_LDTR.selector] & 4:
        yield _S.broken("LDTR: TI of the selector must be 0", _LDTR.selector)
    if not e.v8086 and not e.unrestricted and (e[_SS.selector] ^ e[_CS.selector]) & 3:
        yield _S.broken("SS: RPL must equal the RPL of CS", _SS.selector, _CS.selector)


def bases(e: Entry) -> Iterator[Violation]:
    """Base addresses."""
    if e.v8086:
        for segment in _SIX:
            if e[segment.base] != (e[segment.selector] & 0xFFFF) << 4:
                yield _S.broken(
                    f"{segment.name}: base must be selector * 16 in virtual-8086 mode",
                    segment.base,
                    segment.selector,
                )
    for segment in (_TR, _DATA[2], _DATA[3]):
        if not e.canonical(e[segment.base]):
            yield _S.broken(f"{segment.name}: base must be canonical", segment.base)
    if _usable(e, _LDTR) and not e.canonical(e[_LDTR.base]):
        yield _S.broken("LDTR: base must be canonical", _LDTR.base)
    for segment in (_CS, _SS, _DATA[0], _DATA[1]):
        if _usable(e, segment) and e[segment.base] >> 32:
            yield _S.broken(f"{segment.name}: bits 63:32 of the base must be 0", segment.base)


def v8086_limits_and_rights(e: Entry) -> Iterator[Violation]:
    """Virtual-8086 mode fixes limits and access rights."""
    if not e.v8086:
        return
    for segment in _SIX:
        if e[segment.limit] != 0xFFFF:
            yield _S.broken(
                f"{segment.name}: limit must be FFFFH in virtual-8086 mode", segment.limit
            )
        if e[segment.rights] != 0xF3:
            yield _S.broken(
                f"{segment.name}: access rights must be F3H in virtual-8086 mode", segment.rights
            )


def _granularity(e: Entry, segment: _Segment, g: int) -> Iterator[Violation]:
    limit = e[segment.limit]
    if g and limit & 0xFFF != 0xFFF:
        yield _S.broken(
            f"{segment.name}: G must be 0 unless bits 11:0 of the limit are 1",
            segment.rights,
            segment.limit,
        )
    if not g and limit >> 20:
        yield _S.broken(
            f"{segment.name}: G must be 1 when the limit has bits 31:20",
            segment.rights,
            segment.limit,
        )


def _common(e: Entry, segment: _Segment, rights: AccessRights, s: int) -> Iterator[Violation]:
    """S, P, reserved bits and G of a register that is usable."""
    name, field = segment.name, segment.rights
    if rights.s != s:
        yield _S.broken(f"{name}: S must be {s}", field)
    if not rights.p:
        yield _S.broken(f"{name}: P must be 1", field)
    if e[field] & _RESERVED:
        yield _S.broken(f"{name}: bits 31:17 and 11:8 of the access rights must be 0", field)
    yield from _granularity(e, segment, rights.g)


def cs_rights(e: Entry) -> Iterator[Violation]:
    """CS outside virtual-8086 mode; type 3 is for unrestricted guests."""
    if e.v8086:
        return
    cs = AccessRights.decode(e[_CS.rights])
    ss = AccessRights.decode(e[_SS.rights])
    allowed = (3, 9, 11, 13, 15) if e.unrestricted else (9, 11, 13, 15)
    if cs.type not in allowed:
        yield _S.broken(f"CS: type must be one of {', '.join(map(str, allowed))}", _CS.rights)
    if cs.type == 3 and cs.dpl:
        yield _S.broken("CS: DPL must be 0 for type 3", _CS.rights)
    elif cs.type in (9, 11) and cs.dpl != ss.dpl:
        yield _S.broken(
            "CS: DPL of non-conforming code must equal the DPL of SS", _CS.rights, _SS.rights
        )
    elif cs.type in (13, 15) and cs.dpl > ss.dpl:
        yield _S.broken(
            "CS: DPL of conforming code must not exceed the DPL of SS", _CS.rights, _SS.rights
        )
    yield from _common(e, _CS, cs, 1)
    if e.ia32e and cs.l and cs.db:
        yield _S.broken("CS: D/B must be 0 when L is 1 in IA-32e mode", _CS.rights)


def ss_rights(e: Entry) -> Iterator[Violation]:
    """SS outside virtual-8086 mode; its DPL is the CPL, so it is checked even if unusable."""
    if e.v8086:
        return
    ss = AccessRights.decode(e[_SS.rights])
    if not e.unrestricted and ss.dpl != e[_SS.selector] & 3:
        yield _S.broken("SS: DPL must equal the RPL of its selector", _SS.rights, _SS.selector)
    if ss.dpl and e[_CS.rights] & 0xF == 3:
        yield _S.broken("SS: DPL must be 0 when the type of CS is 3", _SS.rights, _CS.rights)
    if ss.dpl and not e.protected:
        yield _S.broken("SS: DPL must be 0 when CR0.PE is 0", _SS.rights, F.GUEST_CR0)
    if _usable(e, _SS):
        if ss.type not in (3, 7):
            yield _S.broken("SS: type must be 3 or 7", _SS.rights)
        yield from _common(e, _SS, ss, 1)


def data_rights(e: Entry) -> Iterator[Violation]:
    """DS, ES, FS and GS outside virtual-8086 mode."""
    if e.v8086:
        return
    for segment in _DATA:
        if not _usable(e, segment):
            continue
        rights = AccessRights.decode(e[segment.rights])
        if not rights.type & 1:
            yield _S.broken(f"{segment.name}: the accessed bit must be 1", segment.rights)
        if rights.type & 8 and not rights.type & 2:
            yield _S.broken(f"{segment.name}: a code segment must be readable", segment.rights)
        if not e.unrestricted and rights.type <= 11 and rights.dpl < e[segment.selector] & 3:
            yield _S.broken(
                f"{segment.name}: DPL must not be below the RPL of the selector",
                segment.rights,
                segment.selector,
            )
        yield from _common(e, segment, rights, 1)


def tr_rights(e: Entry) -> Iterator[Violation]:
    """TR holds a busy TSS."""
    tr = AccessRights.decode(e[_TR.rights])
    allowed = (11,) if e.ia32e else (3, 11)
    if tr.type not in allowed:
        yield _S.broken(f"TR: type must be {' or '.join(map(str, allowed))}", _TR.rights)
    if tr.unusable:
        yield _S.broken("TR: must be usable", _TR.rights)
    yield from _common(e, _TR, tr, 0)


def ldtr_rights(e: Entry) -> Iterator[Violation]:
    """LDTR, when usable."""
    if _usable(e, _LDTR):
        ldtr = AccessRights.decode(e[_LDTR.rights])
        if ldtr.type != 2:
            yield _S.broken("LDTR: type must be 2", _LDTR.rights)
        yield from _common(e, _LDTR, ldtr, 0)


RULES: tuple[Rule, ...] = (
    selectors,
    bases,
    v8086_limits_and_rights,
    cs_rights,
    ss_rights,
    data_rights,
    tr_rights,
    ldtr_rights,
)
