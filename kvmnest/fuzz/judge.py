"""Does what the kernel did agree with the SDM's rules? And is a disagreement a known one?"""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kvmnest import reading
from kvmnest.errors import HarnessError
from kvmnest.fuzz.execute import Seen
from kvmnest.fuzz.model import REGION, VITAL, FuzzCase, StaticMemory, base_fields, capabilities
from kvmnest.known import kernel_in_range
from kvmnest.l1 import payload as payload_module
from kvmnest.l1.baseline import L2Mode
from kvmnest.vmx import Capabilities, Field
from kvmnest.vmx.errors import VmxError
from kvmnest.vmx.outcome import EntryFailure, Outcome, VMfailValid
from kvmnest.vmx.reasons import ExitReason
from kvmnest.vmx.rules import EntryContext, Prediction, Stage, Violation, check, predict

FILE = Path(__file__).parent.parent / "data" / "disagreements.toml"

AGREE, KNOWN, DISAGREE = "agree", "known", "disagree"


@dataclass(frozen=True)
class Disagreement:
    """A known one: see ``kvmnest/data/disagreements.toml`` for what each part means."""

    kind: str
    reason: str
    rule: str = "*"
    outcome: str = ""
    fields: tuple[str, ...] = ()
    target: str = "any"
    kernels: str = "any"

    def applies(self, target: str, kernel: str) -> bool:
        """Whether it belongs to this kernel."""
        return self.target in ("any", target) and kernel_in_range(kernel, self.kernels)


@functools.cache
def load(path: Path = FILE) -> tuple[Disagreement, ...]:
    """Read the known disagreements. Raises HarnessError for a file that is not right."""
    try:
        found = reading.toml(path)["disagreement"]
        entries = [{**entry, "fields": tuple(entry.get("fields", ()))} for entry in found]
        known = tuple(Disagreement(**entry) for entry in entries)
    except (ValueError, KeyError, TypeError) as error:
        raise HarnessError(f"{path} is damaged: {error}") from error
    for entry in known:
        if entry.kind not in ("missed", "late", "extra"):
            raise HarnessError(f"{path}: unknown kind {entry.kind!r}")
    return known


@dataclass(frozen=True)
class Verdict:
    """``kind`` is agree, known or disagree; ``text`` says what differs or why it is known.

    Verdicts with the same ``signature`` are about the same thing.
    """

    kind: str
    text: str = ""
    signature: str = ""


class Judge:
    """Rules and known disagreements for one machine, whose ``facts`` the executor told.

    Raises ValueError if the facts are no such facts or say that there is no VMX.
    """

    def __init__(self, facts: Mapping[str, Any], target: str) -> None:
        try:
            self.caps = capabilities(facts)
            self.kernel = str(facts["kernel"])
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not the facts of a machine: {error}") from error
        self.payload = payload_module.default()
        self.target = target
        self.known = [entry for entry in load() if entry.applies(target, self.kernel)]
        self._bases: dict[tuple[L2Mode, bool, bool], dict[Field, int]] = {}

    def base(self, case: FuzzCase) -> Mapping[Field, int]:
        """The VMCS that a case changes."""
        key = case.mode, case.bare, case.v8086
        if key not in self._bases:
            self._bases[key] = base_fields(
                self.caps, self.payload, case.mode, bare=case.bare, v8086=case.v8086
            )
        return self._bases[key]

    def predict(self, case: FuzzCase) -> Prediction:
        """What the SDM says."""
        return predict(case.fields(self.base(case)), self.caps, *self._surroundings(case))

    def violations(self, case: FuzzCase, caps: Capabilities | None = None) -> list[Violation]:
        """Every rule that the case breaks, of all stages, here or on another machine."""
        fields = case.fields(self.base(case))
        return check(fields, caps or self.caps, *self._surroundings(case))

    def _surroundings(self, case: FuzzCase) -> tuple[StaticMemory, EntryContext]:
        memory = StaticMemory(self.payload, self.caps.basic.revision_id, case.memory)
        return memory, EntryContext(current_vmcs=self.payload[REGION])

    def verdict(self, case: FuzzCase, seen: Seen) -> Verdict:
        """Judge one case by what became of it."""
        if seen in _DEATHS and not set(VITAL).isdisjoint(case.changes):
            # L1 died of what the first VM exit loaded, so there was one.
            seen = ["Exit", int(ExitReason.PREEMPTION_TIMER)]
        violations = self.violations(case)
        if _allowed(violations, seen, ordered=True):
            return Verdict(AGREE)
        reasons = self._reasons(case, violations, seen)
        written = _as_written(case)
        if not reasons and written.changes != case.changes:
            left = self.violations(written)
            if _allowed(left, seen, ordered=True):
                reasons = (WRITE_DROPS,)
            elif more := self._reasons(written, left, seen):
                reasons = (WRITE_DROPS, *more)
        if reasons:
            return Verdict(KNOWN, "; ".join(reasons), "; ".join(reasons))
        rules = [str(violation) for violation in violations]
        name = shown(seen)
        said = "; ".join(rules) or "no rule objects"
        return Verdict(DISAGREE, f"{name}, but {said}", f"{name}: {' | '.join(sorted(rules))}")

    def _reasons(
        self, case: FuzzCase, violations: Sequence[Violation], seen: Seen
    ) -> tuple[str, ...]:
        """Why the outcome is understood: the fewest known disagreements that explain it."""
        missed = self._matching("missed", case, violations)
        late = self._matching("late", case, violations)
        left = [violation for violation in violations if violation not in missed]
        # A refused entry may be refused for a rule that others of the same kernel miss.
        for rest, ordered, used in (
            (left, True, missed),
            (violations, False, late),
            (left, False, {**missed, **late}),
        ):
            if used and _allowed(rest, seen, ordered=ordered):
                return tuple(dict.fromkeys(entry.reason for entry in used.values()))
        for entry in self.known:
            if (
                entry.kind == "extra"
                and fnmatch.fnmatchcase(shown(seen), entry.outcome)
                and self._concerns(entry, case)
            ):
                return (entry.reason,)
        return ()

    def _matching(
        self, kind: str, case: FuzzCase, violations: Sequence[Violation]
    ) -> dict[Violation, Disagreement]:
        return {
            violation: entry
            for violation in violations
            for entry in reversed(self.known)
            if entry.kind == kind
            and fnmatch.fnmatchcase(str(violation), _literal(entry.rule))
            and self._concerns(entry, case)
        }

    def _concerns(self, entry: Disagreement, case: FuzzCase) -> bool:
        """Whether all its fields are changed, or the bits that it names so: "NAME:3", "NAME:!3"."""
        for name in entry.fields:
            field, _, bit = name.partition(":")
            if not bit:
                if Field[field] not in case.changes:
                    return False
                continue
            value = case.fields(self.base(case)).get(Field[field], 0)
            if bool(value >> int(bit.removeprefix("!")) & 1) == bit.startswith("!"):
                return False
        return True


#: Ends of an L1 whose host state is of no use.
_DEATHS = (["lost", "triple fault"], ["lost", "hang"])
WRITE_DROPS = (
    "VMWRITE drops the reserved bits of access rights, as some processors do (KVM and Bochs both)"
)
_KEPT_RIGHTS = 0x1F0FF


def _as_written(case: FuzzCase) -> FuzzCase:
    """The case with access rights as such a processor keeps them."""
    return replace(
        case,
        changes={
            field: value & _KEPT_RIGHTS if field.name.endswith("_ACCESS_RIGHTS") else value
            for field, value in case.changes.items()
        },
    )


def _literal(pattern: str) -> str:
    """A pattern in which only ``*`` is special: the texts of rules end in brackets."""
    return pattern.replace("[", "[[]")


def _allowed(violations: Sequence[Violation], seen: Seen, *, ordered: bool) -> bool:
    """Whether an outcome is possible with these broken rules.

    ``ordered``: stages come in the SDM's order; otherwise any broken rule may be the first.
    """
    binding = [violation for violation in violations if not violation.optional]
    if seen[0] == "Exit" or seen == ["lost", "hang"]:
        return not binding
    outcome = _outcome(seen)
    if outcome is None:
        return False
    if not ordered:
        return any(Prediction((violation,)).allows(outcome) for violation in violations)
    groups = ((Stage.CONTROL, Stage.HOST), (Stage.GUEST,), (Stage.MSR_LOAD,))
    before: list[Violation] = []
    for group in groups:
        before += [violation for violation in violations if violation.stage in group]
        if any(not violation.optional for violation in before):
            break
    return Prediction(tuple(before)).allows(outcome)


def _outcome(seen: Seen) -> Outcome | None:
    # A number that the SDM does not define is none that a rule allows.
    if seen[0] == "VMfailValid" and seen[1] in [*VmxError]:
        return VMfailValid(VmxError(seen[1]))
    if seen[0] == "EntryFailure" and seen[1] in [*ExitReason]:
        return EntryFailure(ExitReason(seen[1]), seen[2])
    return None


def shown(seen: Seen) -> str:
    """An outcome in words: "VMfailValid(7)", "Exit(PREEMPTION_TIMER)", "lost: triple fault"."""
    name, *rest = seen
    if name == "Exit":
        return "VM entry succeeded"
    if name == "EntryFailure":
        reason = ExitReason(rest[0]).name if rest[0] in [*ExitReason] else rest[0]
        return f"EntryFailure({reason}, qualification {rest[1]})"
    return f"{name}({rest[0]})" if rest else str(name)
