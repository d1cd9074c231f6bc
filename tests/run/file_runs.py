"""Run test files through the real child process and report: file_runs.py OUT FILE..."""

import signal
import sys
from pathlib import Path

from kvmnest.reports.model import Run
from kvmnest.reports.progress import Progress
from kvmnest.run.judge import Judge
from kvmnest.run.loop import run_cases
from kvmnest.run.report import Report
from kvmnest.run.selection import Selection, pytest_arguments
from kvmnest.run.targets import LocalTarget


def run(out: Path, *files: str, patience: float = 30.0, screen=None, **options) -> tuple[int, Run]:
    """Run ``files``, writing OUT.json and OUT.xml; returns exit code and results."""
    report = Report(
        Run("kvm"),
        Progress(screen or sys.stdout),
        json_path=out.with_suffix(".json"),
        junit_path=out.with_suffix(".xml"),
        **options,
    )
    judge = Judge(Run("kvm"), report, rerun=lambda case_id: f"again {case_id}")
    arguments = pytest_arguments(Selection(), "kvm", [], list(files))
    try:
        run_cases(LocalTarget(patience), arguments, judge)
    except KeyboardInterrupt:
        report.finish()
        raise
    return report.finish(), report.run


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(run(Path(sys.argv[1]), *sys.argv[2:])[0])
