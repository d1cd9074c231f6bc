"""Show reproducers both ways in the lab: on a kernel as it is, and with the bug put back.

A bug that nobody has fixed is put back nowhere: its fix is put in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvmnest.kernel import source
from kvmnest.kernel.build import BuildError, build_modules
from kvmnest.kernel.edits import EditError
from kvmnest.lab.emulators import Choice
from kvmnest.repro.check import NO_VERDICT, Verdict, check
from kvmnest.repro.corpus import Reproducer
from kvmnest.repro.evidence import Seen, Shown
from kvmnest.run.lab_target import LabTarget


@dataclass(frozen=True)
class Verifier:
    """In which lab reproducers are shown: ``kernel`` is a SPEC, ``release`` what it stands for."""

    kernel: str | None
    release: str
    emulator: Choice
    params: Mapping[str, str] | None = None

    def target(self, params: Mapping[str, str], kvm_modules: Path | None) -> LabTarget:
        """The target with these parameters and modules."""
        return LabTarget(
            kernel=self.kernel,
            kvm_modules=kvm_modules,
            kvm_params={**params, **(self.params or {})},
            emulator=self.emulator,
        )


def verify(
    reproducers: Sequence[Reproducer], verifier: Verifier, on_line: Callable[[str], None]
) -> Iterator[tuple[Reproducer, Shown]]:
    """Yield what each shows on the stock kernel and on one whose kvm has its bug.

    ``on_line`` gets lines for the user. An edit that does not fit this kernel's source is no
    error: what is shown then is NO VERDICT. Raises what ``check`` raises and LabSetupError if
    modules cannot be built at all.
    """
    on_line(f"{len(reproducers)} on {verifier.release} as it is")
    stock = {
        verdict.reproducer.case: _seen(verdict)
        for verdict in check(reproducers, lambda params: verifier.target(params, None))
    }
    for reproducer in reproducers:
        change = "its fix" if reproducer.fix else "the bug put back"
        on_line(f"{reproducer.id} on {verifier.release} with {change}")
        seen = stock[reproducer.case]
        yield (
            reproducer,
            Shown(
                verifier.release,
                reproducer.script(verifier.release),
                seen,
                _edited(reproducer, verifier),
                mended=bool(reproducer.fix),
            ),
        )


def _edited(reproducer: Reproducer, verifier: Verifier) -> Seen:
    edit = reproducer.edit_for(verifier.release)
    edits = reproducer.fix or ((edit,) if edit else ())
    if not edits:
        return Seen(NO_VERDICT, "the script has no edit that brings the bug back, and no fix")
    try:
        modules = build_modules(edits, verifier.release)
    except EditError as error:
        # Whoever writes an edit wants to read what it is to match.
        tree = source.prepare(verifier.release).tree
        said = f"the edit does not fit {verifier.release}: {error} (its source is in {tree})"
        return Seen(NO_VERDICT, said)
    except BuildError as error:
        return Seen(NO_VERDICT, f"the edit does not fit {verifier.release}: {error}")
    (verdict,) = check([reproducer], lambda params: verifier.target(params, modules))
    return _seen(verdict)


def _seen(verdict: Verdict) -> Seen:
    return Seen(verdict.verdict, verdict.evidence)
