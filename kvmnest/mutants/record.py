"""What scoring found out, on disk as JSON after every mutant, so that it can go on later."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from kvmnest import reading
from kvmnest.files import write_json
from kvmnest.lab import cache
from kvmnest.mutants.catalogue import Mutant
from kvmnest.schema import COUNT, TEXT, TEXTS, by_name, exactly

SCHEMA = 1

DETECTED, MISSED, MASKED, UNFIT = "detected", "missed", "masked", "does not apply"
#: Verdicts in the order in which tables show them.
VERDICTS = (DETECTED, MISSED, MASKED, UNFIT)

# What the outcome of a case hangs on, besides the kernel.


@dataclass(frozen=True)
class Score:
    """What is known of one mutant.

    ``case``, ``outcome`` and ``text`` say by which case it was detected and how; for the other
    verdicts ``text`` is the reason. ``ran`` counts the cases that ended. ``key`` and ``suite``
    name the edit and the cases that it holds for; ``seconds`` is host time.
    """

    verdict: str
    key: str
    suite: str = ""
    case: str = ""
    outcome: str = ""
    text: str = ""
    ran: int = 0
    seconds: float = 0.0


@dataclass
class Record:
    """Scores by mutant id, and which cases passed on the unmodified modules.

    ``clean`` maps a set of parameters ("ept=0") to the ids of cases without a failure there, for
    the state ``suite`` of the suite.
    """

    path: Path
    kernel: str
    scores: dict[str, Score] = field(default_factory=dict)
    suite: str = ""
    clean: dict[str, list[str]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def holds(self, mutant: Mutant, key: str, *suites: str) -> bool:
        """Whether the score of a mutant needs no new run.

        One that was detected stays so until its edit or the kernel changes; one that was missed
        is tried again unless that was by one of the ``suites`` (names of what cases were run).
        """
        score = self.scores.get(mutant.id)
        if score is None or score.key != key or score.verdict == MASKED:
            return False
        return score.verdict in (DETECTED, UNFIT) or score.suite in suites

    def clean_cases(self, params: Mapping[str, str], suite: str) -> set[str]:
        """Ids that ended without failure on the unmodified modules, for this suite."""
        return set(self.clean.get(params_text(params), ())) if self.suite == suite else set()

    def add_clean(self, params: Mapping[str, str], suite: str, ids: list[str]) -> None:
        """Note cases without a failure on the unmodified modules."""
        with self._lock:
            if self.suite != suite:
                self.suite, self.clean = suite, {}
            name = params_text(params)
            self.clean[name] = sorted({*self.clean.get(name, ()), *ids})
            self._save()

    def add(self, mutant_id: str, score: Score) -> None:
        """Note a score."""
        with self._lock:
            self.scores[mutant_id] = score
            self._save()

    def _save(self) -> None:
        document = {
            "schema": SCHEMA,
            "kernel": self.kernel,
            "suite": self.suite,
            "clean": self.clean,
            "scores": {name: asdict(score) for name, score in sorted(self.scores.items())},
        }
        write_json(self.path, document)


def load(path: Path, kernel: str) -> Record:
    """Read a record, or start an empty one if there is none or it is of another kernel.

    Raises HarnessError if the file is something else.
    """
    try:
        found = reading.document(path, "record of kvmnest mutants (--fresh starts anew)", _SCHEMA)
    except reading.NoSuchFile:
        return Record(path, kernel)
    if found["kernel"] != kernel:
        return Record(path, kernel)
    scores = {name: Score(**score) for name, score in found["scores"].items()}
    return Record(path, kernel, scores, found["suite"], found["clean"])


_SCORE = exactly(
    ["verdict", "key"],
    verdict={"enum": [*VERDICTS]},
    ran=COUNT,
    seconds={"type": "number", "minimum": 0},
    **dict.fromkeys(("key", "suite", "case", "outcome", "text"), TEXT),
)
_SCHEMA = {
    "type": "object",
    "required": ["schema", "kernel", "suite", "clean", "scores"],
    "properties": {
        "schema": {"const": SCHEMA},
        **dict.fromkeys(("kernel", "suite"), TEXT),
        "clean": by_name(TEXTS),
        "scores": by_name(_SCORE),
    },
}


def default_path(kernel: str) -> Path:
    """Where the record of a kernel release is kept."""
    return cache.root() / f"mutants-{kernel}.json"


def mutant_key(mutant: Mutant, release: str) -> str:
    """Name of what makes a mutant what it is on a kernel: its edit and its parameters."""
    edit = mutant.edit_for(release)
    words = (edit.file, edit.function, edit.expression, edit.replacement)
    return cache.digest([*words, params_text(mutant.params)])


def params_text(params: Mapping[str, str]) -> str:
    """Parameters as one text, "ept=0 vpid=0"; "" for none."""
    return " ".join(f"{name}={value}" for name, value in sorted(params.items()))
