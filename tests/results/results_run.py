"""Run test files through the real child process and reporter: results_run.py OUT FILE..."""

import signal
import sys
from pathlib import Path

from kvmnest.reports.model import Run
from kvmnest.reports.progress import Progress
from kvmnest.run.loop import Plan, pytest_arguments, run_cases
from kvmnest.run.reporter import Reporter
from kvmnest.run.targets import LocalTarget


def run(out: Path, *files: str, patience: float = 30.0, screen=None, **options) -> tuple[int, Run]:
    """Run ``files``, writing OUT.json and OUT.xml; returns exit code and results."""
    reporter = Reporter(
        Run("kvm"),
        Progress(screen or sys.stdout),
        json_path=out.with_suffix(".json"),
        junit_path=out.with_suffix(".xml"),
        rerun=lambda case_id: f"again {case_id}",
        **options,
    )
    arguments = pytest_arguments(Plan(), "kvm", [], list(files))
    try:
        run_cases(LocalTarget(patience), arguments, reporter)
    except KeyboardInterrupt:
        reporter.finish()
        raise
    return reporter.finish(), reporter.run


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(run(Path(sys.argv[1]), *sys.argv[2:])[0])
