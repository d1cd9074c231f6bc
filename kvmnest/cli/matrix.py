"""``kvmnest matrix``: the suite on many kernels and settings."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

from kvmnest import settings
from kvmnest.cli.lab import add_emulator_options, emulator, parameters
from kvmnest.errors import UsageError
from kvmnest.lab import DEFAULT_KERNEL
from kvmnest.lab.emulators import BOCHS, Choice


def add_parser(subparsers: Any) -> None:
    """Add the verb."""
    parser = subparsers.add_parser(
        "matrix",
        help="run the suite on many kernels and settings, and show what differs",
        epilog="exit codes: 0 no case failed, 1 a case failed somewhere, 2 usage, 3 a kernel"
        " could not be run or another error of the environment, 4 no case is selected,"
        " 130 interrupted (the same command goes on)",
    )
    parser.add_argument("selected", nargs="*", metavar="CASE", help="cases (default: all)")
    parser.add_argument(
        "--kernels",
        nargs="+",
        metavar="SPEC",
        help=f"in order (default, with --cpu-models: {DEFAULT_KERNEL})",
    )
    parser.add_argument(
        "--cpu-models",
        nargs="+",
        metavar="NAME",
        help="run each kernel on each of these CPUs of Bochs; all: on every one with VMX",
    )
    parser.add_argument("-k", dest="keyword", default="", metavar="EXPR", help="as in pytest")
    parser.add_argument(
        "--setting",
        action="append",
        default=[],
        metavar="NAME=VALUE[,NAME=VALUE]",
        help="run each kernel with these parameters too (repeatable)",
    )
    parser.add_argument(
        "--settings",
        nargs="+",
        default=[],
        metavar="NAME",
        help="run each kernel under these settings too, each a set of parameters"
        f" ({', '.join(setting.name for setting in settings.every())}); all: under every one",
    )
    parser.add_argument(
        "--jobs",
        type=int,
        metavar="N",
        help="labs at once on this machine (default: one for each core)",
    )
    parser.add_argument(
        "--scheduler",
        metavar="ADDRESS",
        help="run on the workers of this Dask scheduler instead, such as tcp://HOST:8786",
    )
    parser.add_argument(
        "--parts",
        type=int,
        default=1,
        metavar="N",
        help="tasks that share the cases of a kernel (default: 1)",
    )
    parser.add_argument("--state", type=Path, metavar="DIR", help="where results are kept")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all outcomes")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page")
    add_emulator_options(parser)


def run(options: argparse.Namespace) -> int:
    """Run the verb."""
    before = signal.signal(signal.SIGTERM, _terminated)
    try:
        return _run(options)
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(options: argparse.Namespace) -> int:
    import shutil

    from kvmnest.files import require_writable, write_json, write_text
    from kvmnest.lab import cache
    from kvmnest.matrix.compare import as_json
    from kvmnest.matrix.page import page
    from kvmnest.matrix.run import Engine, Local, Matrix
    from kvmnest.matrix.table import lines

    _check(options)
    models = _models(options)
    chosen = [settings.Setting(text, parameters(text.split(","))) for text in options.setting]
    chosen += settings.choose(options.settings)
    _no_duplicates("--setting", [tuple(setting.params.items()) for setting in chosen])
    # What a long run would end in is found before it.
    require_writable(options.json, options.html)
    out = _Out()
    engine: Engine = Local(options.jobs or len(os.sched_getaffinity(0)))
    if options.scheduler is not None:
        from kvmnest.matrix.cluster import Cluster

        engine = Cluster(options.scheduler, out.line, emulator(options))
    matrix = Matrix(
        options.state or cache.root() / "matrix",
        options.selected,
        options.keyword,
        emulator(options),
        out.line,
        options.parts,
    )
    cells = _cells(options.kernels, [settings.DEFAULT, *chosen], models, emulator(options), out)
    documents = matrix.run(cells, engine)
    if options.json:
        write_json(options.json, as_json(documents))
    if options.html:
        write_text(options.html, f"{page(documents)}\n")
    out.line("")
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    for line in lines(documents, shutil.get_terminal_size((100, 24)).columns, colour=colour):
        out.line(line)
    if any(d["summary"]["failed"] or d["summary"]["error"] for d in documents.values()):
        return 1
    return 3 if any(d["problems"] or not d["cases"] for d in documents.values()) else 0


class _Out:
    """Standard output; one that went away, as with head, ends neither the run nor its files."""

    def __init__(self) -> None:
        self._gone = False

    def line(self, text: str) -> None:
        if self._gone:
            return
        try:
            print(text, flush=True)
        except BrokenPipeError:
            self._gone = True
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _cells(
    kernels: Sequence[str],
    chosen: Sequence[settings.Setting],
    models: Sequence[str],
    choice: Choice,
    out: _Out,
) -> list[Any]:
    from kvmnest.matrix.cell import Cell

    cells = []
    for model in models:
        here = replace(choice, cpu_model=model) if model else choice
        for setting in chosen:
            for kernel in kernels:
                cell = Cell(kernel, tuple(setting.params.items()), model)
                why = _why_left_out(setting, kernel, here)
                if why:
                    out.line(f"{cell.name}: left out, {why}")
                else:
                    cells.append(cell)
    return cells


def _why_left_out(setting: settings.Setting, kernel: str, choice: Choice) -> str:
    from kvmnest.lab import fleet, kernels

    # A setting of any kernel does not need the kernel: one that cannot be had is told later.
    if setting.kernels == "any" and not setting.cpu_lacks:
        return ""
    release = kernels.resolve(kernel).release
    asked = setting.cpu_lacks and setting.exists_on(release) and choice.boot == BOCHS.boot
    return setting.why_left_out(release, fleet.cpu_flags(choice, kernel) if asked else "")


def _models(options: argparse.Namespace) -> list[str]:
    """The CPU models to run on, [""] if none is named. Raises UsageError, LabSetupError."""
    from kvmnest.lab import bochs, cpu_models

    names: list[str] = options.cpu_models or []
    if not names:
        return [""]
    chosen = emulator(options)
    if chosen.boot != "lab" or chosen.cpu_model:
        given = "--cpu-model" if chosen.cpu_model else f"--boot {chosen.boot}"
        raise UsageError(f"--cpu-models and {given} contradict each other")
    found = bochs.locate(chosen.program)
    if names == [cpu_models.ALL]:
        return [model.name for model in cpu_models.usable(found.version, found.models)]
    _no_duplicates("--cpu-models", names)
    return [cpu_models.choose(name, found.version, found.models).name for name in names]


def _check(options: argparse.Namespace) -> None:
    for name in ("jobs", "parts"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name} must be at least 1, not {value}")
    if options.scheduler and options.jobs:
        raise UsageError("--jobs is for this machine: a scheduler's workers run one job each")
    if options.json and options.html and options.json.resolve() == options.html.resolve():
        raise UsageError(f"--json and --html both name {options.json}")
    if not options.kernels:
        if not options.cpu_models:
            raise UsageError("--kernels or --cpu-models says what to run on")
        options.kernels = [DEFAULT_KERNEL]
    _no_duplicates("--kernels", options.kernels)


def _no_duplicates(option: str, values: Sequence[object]) -> None:
    for value in values:
        if values.count(value) > 1:
            shown = value if isinstance(value, str) else ",".join(f"{n}={v}" for n, v in value)  # type: ignore[attr-defined]
            raise UsageError(f"{option} {shown} is given more than once")


def _terminated(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)
