"""Everything that reads a file: a whole one, and what is to be done with a damaged one."""

import dataclasses
import io
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvmnest import found, known
from kvmnest.bisect import journal
from kvmnest.bisect.plan import Plan as BisectPlan
from kvmnest.bisect.probe import BAD, GOOD, SKIP, Answer
from kvmnest.bisect.reboot import state
from kvmnest.cases import events
from kvmnest.cli.main import main
from kvmnest.errors import KvmnestError
from kvmnest.found import record as found_record
from kvmnest.fuzz import judge, machines
from kvmnest.lab import bochs_build, bochs_source, cache, cpu_models, debian, kernels, modules
from kvmnest.lab.decompress import vmlinux_of
from kvmnest.lab.image import flatten
from kvmnest.matrix import cell
from kvmnest.matrix import run as matrix_run
from kvmnest.mutants import catalogue, record
from kvmnest.reports import jsonfile
from kvmnest.reports.model import Case, Run
from kvmnest.reports.progress import Progress
from kvmnest.repro import evidence
from kvmnest.run import last_failed
from kvmnest.run.judge import Judge
from kvmnest.run.report import Report

FACTS = json.loads((Path(__file__).parents[1] / "fuzz/facts.json").read_text())
KERNELS = ["6.1.0-40-amd64", "6.1.0-41-amd64", "6.1.0-42-amd64"]


def json_bytes(document: Any) -> bytes:
    return json.dumps(document).encode()


def json_lines(*documents: Any) -> bytes:
    return b"".join(json_bytes(document) + b"\n" for document in documents)


def results() -> bytes:
    run = Run("lab", "bochs 3.0", {"kernel": "6.1.0", "kvm_params": {"ept": "Y"}, "cpu": "x"})
    run.started = run.finished = "2026-11-26T21:00:00+00:00"
    run.planned = ["test_a.py::test_a", "test_a.py::test_b", "test_a.py::test_c"]
    run.cases = [
        Case(run.planned[0], 3, "VMXON", "passed", 0.1),
        Case(run.planned[1], 3, "VMXON", "failed", 0.1, "E why\nmore", "why", "kvmnest run x"),
        Case(run.planned[2], None, None, "skipped", 0.0, "needs X", kernel_log="[ 1.0] x\n"),
    ]
    run.no_longer = [("test_a.py::test_d", "reason")]
    run.problems = ["a problem"]
    return json_bytes(jsonfile.whole(run))


def commands(*lines: list[str]) -> Callable[[Path], None]:
    """Run each command line, "BAD" in it being the file: never a traceback or another code."""

    def use(path: Path) -> None:
        good = path.with_name("good.json")
        for line in lines:
            words = [{"BAD": str(path), "GOOD": str(good)}.get(word, word) for word in line]
            code = main([word.replace("OUT", str(path.with_name("out"))) for word in words])
            assert code in (0, 1, 2, 3), (words, code)

    return use


def refused(read: Callable[[Path], object]) -> Callable[[Path], None]:
    """Call a reader, which may raise errors of ours only."""

    def use(path: Path) -> None:
        told = ""
        try:
            read(path)
        except KvmnestError as error:
            told = str(error)
        assert "\n" not in told

    use.read = read  # type: ignore[attr-defined]
    return use


@dataclasses.dataclass(frozen=True)
class Reader:
    """``whole`` is the content of a file that ``use`` takes without an error."""

    whole: Callable[[], bytes]
    use: Callable[[Path], None]
    name: str = "file.json"


def bisect_journal() -> bytes:
    question = BisectPlan("test_vmxon.py", {}, kernels=KERNELS).asked
    header = journal.Header(question, KERNELS[0], KERNELS[-1])
    steps = [
        journal.Step(KERNELS[0], "", "2026-11-26T21:00:00Z", Answer(GOOD, "passed")),
        journal.Step(KERNELS[2], "", "2026-11-26T21:00:00Z", Answer(BAD, "failed", "6.1", "hang")),
    ]
    first = {"schema": 2, "at": "2026-11-26T21:00:00Z", **dataclasses.asdict(header)}
    return json_lines(first, *map(dataclasses.asdict, steps))


def bisect_state() -> bytes:
    plan = BisectPlan("test_vmxon.py", {"ept": "0"}, good="a", bad="b", kernels=KERNELS)
    trial = state.Trial("6.1", runs=[Answer(SKIP, "x")])
    found = state.State(Path("x"), plan, "6.1", "0", "boot", trial=trial, result=["one"])
    return json_bytes({**dataclasses.asdict(found), "folder": None, "schema": 1})


def fuzz_journal() -> bytes:
    chosen = {"seed": 5, "target": "lab", "kernel": None, "kvm_modules": None, "kvm_params": []}
    return json_lines(
        {"schema": 1, **chosen},
        {"facts": FACTS},
        {"start": 0},
        {"end": 0, "outcome": ["Exit", 18]},
        {"start": 1},
        {"end": 1, "outcome": ["VMfailValid", 7]},
        {"start": 2},
        {"end": 2, "outcome": ["EntryFailure", 33, 0]},
        {"stopped": []},
    )


def report_events() -> bytes:
    return json_lines(
        {"e": "session", "kernel": "6.1", "kvm_params": {"ept": "Y"}},
        {"e": "collected", "count": 1, "first": 0, "cases": [["test_a.py::test_b", 3]]},
        {"e": "start", "id": "test_a.py::test_b", "series": 3, "sdm": "VMXON"},
        {"e": "kernel", "text": "[  1.0] WARNING: CPU: 0\n"},
        {"e": "result", "id": "test_a.py::test_b", "series": 3, "sdm": "VMXON",
         "outcome": "failed", "seconds": 0.1, "detail": "E x", "summary": "x"},
        {"e": "end", "status": 1, "why": ""},
    )  # fmt: skip


def take_events(path: Path) -> None:
    """As a target does: what is wrong ends the run with an error of ours."""
    out = path.with_name("out.json")
    report = Report(Run("lab"), Progress(io.StringIO()), json_path=out, junit_path=out)
    judge = Judge(Run("lab"), report)
    for line in path.read_bytes().splitlines():
        judge.event(events.parse(line))
    report.finish()


def elf() -> bytes:
    """A kernel of one page: an ELF header, one program header, its content."""
    head = b"\x7fELF" + bytes([2, 1, 1]) + bytes(9)
    head += struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, 1 << 24, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    head += struct.pack("<IIQQQQQQ", 1, 5, 120, 1 << 24, 1 << 24, 16, 16, 4096)
    return head + b"Linux version 6.1 ("[:16]


def module() -> bytes:
    """A relocatable file with a .modinfo, which is what is read of a module."""
    names, info = b"\0.shstrtab\0.modinfo\0", b"depends=\0vermagic=6.1 SMP\0parmtype=ept:bool\0"
    head = b"\x7fELF" + bytes([2, 1, 1]) + bytes(9)
    table = 64 + len(names) + len(info)
    head += struct.pack("<HHIQQQIHHHHHH", 1, 62, 1, 0, 0, table, 0, 64, 0, 0, 64, 3, 1)
    rows = ((1, 3, 64, len(names)), (11, 1, 64 + len(names), len(info)))
    sections = bytes(64)
    for name, kind, at, size in rows:
        sections += struct.pack("<IIQQQQIIQQ", name, kind, 0, 0, at, size, 0, 0, 1, 0)
    return head + names + info + sections


def kernel_image(path: Path) -> None:
    flatten(*vmlinux_of(path.read_bytes()))


def offers() -> bytes:
    offer = debian.Offer("6.1-amd64", "6.1-1", ("bookworm",), 5, ("linux-image=6.1",), "key")
    return json_bytes([dataclasses.asdict(offer)])


def read_offers(path: Path) -> None:
    apt = debian.Apt(notes=path)
    apt.__dict__["_ask"] = dict
    assert isinstance(apt.offers, dict)


def manifest(path: Path) -> None:
    folder = path.parent / "entry"
    folder.mkdir(exist_ok=True)
    (folder / "manifest.json").write_bytes(path.read_bytes())
    assert cache.is_whole(folder) in (True, False)


def of_a_cell(path: Path) -> None:
    document = matrix_run._load(path)
    if document is not None:
        assert matrix_run.in_words(cell.merge([document, document]))


def note_of_failures(path: Path) -> None:
    place = cache.root() / "last-failed.json"
    place.write_bytes(path.read_bytes())
    assert all(isinstance(name, str) for name in last_failed.among([]))


def toml(name: str) -> Callable[[], bytes]:
    data = Path(known.KNOWN_FILE).parent
    # Not all of it: many small inputs find more than a few large ones.
    return lambda: b"\n\n".join((data / name).read_bytes().split(b"\n\n")[:4])


def of_module(module: Any, attribute: str, load: Any) -> Callable[[Path], None]:
    """A loader of this package's own data, which is asked anew."""

    def read(path: Path) -> None:
        load.cache_clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, attribute, path)
            try:
                load()
            finally:
                load.cache_clear()

    return refused(read)


READERS = {
    "results": Reader(
        results,
        commands(
            ["diff", "GOOD", "BAD"],
            ["diff", "BAD", "BAD", "--json"],
            ["report", "BAD", "--html", "OUT", "--ktap", "-", "--github"],
            ["report", "GOOD", "--compare", "BAD", "--html", "-"],
        ),
    ),
    "matrix": Reader(results, refused(of_a_cell)),
    "caps": Reader(
        lambda: json_bytes(
            {
                "schema": 1,
                "kernel": "6.1",
                "cpu": "x",
                "kvm_params": {"ept": "Y"},
                "msrs": {hex(int(n)): hex(v) for n, v in FACTS["msrs"].items()},
            }
        ),
        commands(["caps", "diff", "GOOD", "BAD"], ["caps", "diff", "BAD", "BAD", "--json"]),
    ),
    "bench": Reader(
        lambda: json_bytes({"schema": 1, "kernel": "6", "cpu": "x", "seconds": {"a": 1.0}}),
        commands(["bench", "--compare", "BAD"]),
    ),
    "bisect journal": Reader(
        bisect_journal,
        commands(
            ["bisect", "log", "--state", "BAD"],
            [
                "bisect",
                "--case",
                "test_vmxon.py",
                "--kernels",
                ",".join(KERNELS),
                "--good",
                KERNELS[0],
                "--bad",
                KERNELS[-1],
                "--continue",
                "--state",
                "BAD",
            ],
        ),
    ),
    "bisect state": Reader(bisect_state, refused(lambda p: state.load(p.parent)), "state.json"),
    "fuzz journal": Reader(
        fuzz_journal,
        commands(
            [
                "fuzz",
                "--target",
                "lab",
                "--continue",
                "--seed",
                "5",
                "--cases",
                "3",
                "--no-shrink",
                "--journal",
                "BAD",
                "--jobs",
                "1",
            ]
        ),
    ),
    "fuzz events": Reader(
        fuzz_journal,
        refused(
            lambda p: [
                machines._event(machines.EVENT_SCHEMA, line)
                for line in p.read_bytes().splitlines()[1:]
            ]
        ),
    ),
    "events of cases": Reader(report_events, refused(take_events)),
    "mutants": Reader(
        lambda: json_bytes(
            {
                "schema": 1,
                "kernel": "6.1",
                "suite": "s",
                "clean": {"ept=0": ["a"]},
                "scores": {"m": dataclasses.asdict(record.Score(record.MISSED, "key"))},
            }
        ),
        refused(lambda p: record.load(p, "6.1").add_clean({}, "s", ["b"])),
    ),
    "coverage": Reader(
        lambda: json_bytes(
            {
                "schema": 1,
                "kernel": "6.1.0-56-amd64",
                "version": "6.1.192-2",
                "reached_by": ["a"],
                "sources": {
                    "arch/x86/kvm/vmx/nested.c": {
                        "functions": [[3, "f"]],
                        "lines": [4, 5],
                        "first": [0, -1],
                    }
                },
            }
        ),
        commands(
            ["coverage", "show", "BAD", "--missing"],
            ["coverage", "show", "GOOD", "BAD", "--data", "OUT"],
            ["coverage", "show", "GOOD", "--against", "BAD"],
        ),
    ),
    "evidence": Reader(
        lambda: json_bytes(
            {
                "schema": 2,
                "shown": {
                    "a": {
                        "6.1": {
                            "script": "s",
                            "stock": {"verdict": "FIXED", "evidence": "x"},
                            "put_back": {"verdict": "VULNERABLE", "evidence": "y"},
                        }
                    }
                },
            }
        ),
        refused(lambda p: evidence.save(p, evidence.start(p))),
    ),
    "found": Reader(
        lambda: json_bytes(
            {
                "schema": 1,
                "shown": {
                    "a": {
                        "7.3": {
                            "script": "s",
                            "stock": {"verdict": "VULNERABLE", "evidence": "x"},
                            "edits": "e",
                            "line": "a.c:1",
                            "together": {"verdict": "FIXED", "evidence": "y"},
                            "alone": {"verdict": "FIXED", "evidence": "y"},
                        }
                    }
                },
            }
        ),
        refused(lambda p: found_record.save(p, found_record.load(p))),
    ),
    "last failed": Reader(lambda: json_bytes(["test_a.py::test_b"]), refused(note_of_failures)),
    "offers": Reader(offers, refused(read_offers)),
    "manifest": Reader(lambda: json_bytes({"a": [1, 2]}), refused(manifest)),
    "notes of a build": Reader(
        lambda: json_bytes({"version": "3.0", "seconds": "5"}),
        refused(lambda p: bochs_build.notes(p)),
        "notes.json",
    ),
    "note": Reader(lambda: b"6.1.0-40-amd64", refused(kernels._noted)),
    "known": Reader(toml("known.toml"), refused(known.read)),
    "mutants.toml": Reader(toml("mutants.toml"), refused(catalogue.load)),
    "disagreements": Reader(
        toml("disagreements.toml"), refused(lambda p: judge.load.__wrapped__(p))
    ),
    "found.toml": Reader(toml("found.toml"), of_module(found, "FILE", found.load)),
    "models": Reader(
        toml("cpu-models.toml"), of_module(cpu_models, "MODELS_FILE", cpu_models._models)
    ),
    "repairs": Reader(
        toml("bochs-repairs.toml"), of_module(bochs_source, "REPAIRS_FILE", bochs_source.source)
    ),
    "kernel": Reader(elf, refused(kernel_image)),
    "module": Reader(module, refused(lambda p: modules.read(p)), "kvm.ko"),
}
