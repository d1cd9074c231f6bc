"""Show the defects in the lab: on a kernel as it is, and with their fixes built in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from kvmnest.found import Defect
from kvmnest.found.record import Shown, edits_hash, script_hash
from kvmnest.kernel import source
from kvmnest.kernel.build import BuildError, build_modules
from kvmnest.kernel.edits import EditError
from kvmnest.repro.check import NO_VERDICT, check
from kvmnest.repro.evidence import Seen
from kvmnest.repro.verify import Verifier


def as_it_is(defects: Sequence[Defect], verifier: Verifier) -> dict[str, Shown]:
    """What the kernel shows without any fix. Raises what ``check`` raises."""
    stock = _run(defects, verifier, None)
    return {
        defect.id: Shown(script_hash(defect.reproducer), stock[defect.id]) for defect in defects
    }


def verify(
    defects: Sequence[Defect], verifier: Verifier, on_line: Callable[[str], None]
) -> Iterator[tuple[Defect, Shown]]:
    """Yield what the kernel shows as it is, with all fixes, and with each fix alone.

    ``on_line`` gets lines for the user. A fix or a line at fault that is not in this kernel's
    source is no error: the verdict is NO VERDICT then. Raises what ``check`` raises and
    LabSetupError if modules cannot be built at all.
    """
    release = verifier.release
    on_line(f"{len(defects)} on {release} as it is")
    stock = as_it_is(defects, verifier)
    tree = source.prepare(release).tree
    on_line(f"{len(defects)} on {release} with all fixes")
    together = _fixed(defects, verifier)
    for defect in defects:
        on_line(f"{defect.id} on {release} with its fix alone")
        shown = stock[defect.id]
        yield (
            defect,
            Shown(
                shown.script,
                shown.stock,
                edits_hash(defect.reproducer),
                _line(defect, tree),
                together[defect.id],
                _fixed([defect], verifier)[defect.id],
            ),
        )


def _line(defect: Defect, tree: Path) -> str:
    """Where the fault is, as "vmx.c:8142", "" if the line is not in this source."""
    try:
        line = defect.fault.line((tree / defect.file).read_text(encoding="utf-8"))
    except (EditError, OSError):
        return ""
    return f"{defect.file}:{line}"


def fixed_modules(defects: Sequence[Defect], release: str) -> Path:
    """Folder with modules that have the fixes of these defects. Raises as ``build_modules``."""
    return build_modules(
        [edit for defect in defects for edit in defect.reproducer.fix],
        release,
    )


def _fixed(defects: Sequence[Defect], verifier: Verifier) -> dict[str, Seen]:
    try:
        modules = fixed_modules(defects, verifier.release)
    except (EditError, BuildError) as error:
        nothing = Seen(NO_VERDICT, f"the fix does not fit {verifier.release}: {error}")
        return {defect.id: nothing for defect in defects}
    return _run(defects, verifier, modules)


def _run(defects: Sequence[Defect], verifier: Verifier, modules: Path | None) -> dict[str, Seen]:
    seen: dict[str, Seen] = {}
    for model in dict.fromkeys(defect.cpu_model for defect in defects):
        reproducers = [each.reproducer for each in defects if each.cpu_model == model]
        target = partial(_on(model, verifier).target, kvm_modules=modules)
        for verdict in check(reproducers, target):
            seen[verdict.reproducer.id] = Seen(verdict.verdict, verdict.evidence)
    return seen


def _on(cpu_model: str, verifier: Verifier) -> Verifier:
    """The same with the CPU model that a defect needs, unless the user chose one."""
    if not cpu_model or verifier.emulator.cpu_model:
        return verifier
    return replace(verifier, emulator=replace(verifier.emulator, cpu_model=cpu_model))
