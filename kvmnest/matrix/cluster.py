"""A matrix on the machines of a Dask cluster: one task for each part of a cell."""

from __future__ import annotations

import importlib
import logging
import re
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import kvmnest
from kvmnest import scratch
from kvmnest.errors import HarnessError, KvmnestError, UsageError, first_line
from kvmnest.lab.emulators import BOCHS, Choice
from kvmnest.lab.locate import locate
from kvmnest.matrix.cell import Document, Job, Stopped, run_job, trouble
from kvmnest.run.suite_state import suite_state

#: How often a task is tried again after an error of a worker (not of a kernel).
RETRIES = 3
_CONNECT_SECONDS = 5
_WORKERS_SECONDS = 30


class Cluster:
    """Runs jobs on the workers of the Dask scheduler at ``address`` ("tcp://HOST:PORT").

    Raises HarnessError if Dask is not installed here, nobody answers there, or no worker can run
    jobs of this kvmnest with ``emulator``; ``on_line`` gets a line about each worker that
    cannot.
    """

    def __init__(
        self, address: str, on_line: Callable[[str], None], emulator: Choice = BOCHS
    ) -> None:
        self.address = address
        self._emulator = emulator
        self._on_line = on_line
        try:
            self._dask: Any = importlib.import_module("distributed")
        except ImportError as error:
            raise HarnessError("--scheduler needs Dask: pip install 'kvmnest[matrix]'") from error
        # What it has to say about lost connections is told in our words.
        logging.getLogger("distributed").setLevel(logging.CRITICAL)
        # Without an address Dask would start a cluster of its own, and without a port never end.
        if not re.fullmatch(r"(\w+://)?[^\s/]+:\d{1,5}", address):
            raise UsageError(f"--scheduler {address!r}: an address looks like tcp://HOST:8786")
        try:
            self._client = self._dask.Client(
                address, timeout=_CONNECT_SECONDS, set_as_default=False
            )
        except (OSError, ValueError, TypeError, ImportError, AssertionError) as error:
            # An AssertionError: Dask's own event loop did not start in time.
            why = first_line(error) or type(error).__name__
            raise HarnessError(f"no Dask scheduler answers at {address}: {why}") from error
        try:
            self._workers = self._fit_workers()
        except BaseException:
            self._client.close()
            raise

    def _fit_workers(self) -> list[str] | None:
        """Workers that can run jobs; None if all can, so that later ones may join."""
        try:
            self._client.wait_for_workers(1, timeout=_WORKERS_SECONDS)
        except (TimeoutError, self._dask.TimeoutError) as error:
            raise HarnessError(
                f"the scheduler at {self.address} has no workers: start some with"
                f" dask worker {self.address} --nthreads 1"
            ) from error
        answers = self._client.run(look, self._emulator, on_error="return")
        suite, fit, reasons = suite_state(), [], []
        for worker, answer in sorted(answers.items()):
            reason = unfit(answer, suite)
            if reason:
                reasons.append(reason)
                self._on_line(f"worker {worker} is not used: {reason}")
            else:
                fit.append(worker)
        if not fit:
            raise HarnessError(f"no worker of {self.address} can run cases: {reasons[0]}")
        return fit if reasons else None

    def run(self, jobs: Sequence[Job], folder: Path, done: Callable[[Job, Document], None]) -> None:
        """See ``kvmnest.matrix.run.Engine``. Raises HarnessError if the scheduler is lost."""
        run_id = uuid.uuid4().hex
        client = self._client
        try:
            running = {
                client.submit(
                    work,
                    job,
                    key=f"kvmnest-{run_id}-{number}",
                    workers=self._workers,
                    retries=RETRIES,
                    pure=False,
                ): job
                for number, job in enumerate(jobs)
            }
            try:
                for future in self._dask.as_completed(list(running), loop=client.loop):
                    done(running[future], self._result(future, running[future]))
            except BaseException:
                client.cancel(list(running), force=True)
                raise
        except (OSError, CancelledError, self._dask.CancelledError) as error:
            raise HarnessError(
                f"the scheduler at {self.address} is lost; the same command goes on later"
            ) from error
        finally:
            client.close()

    def _result(self, future: Any, job: Job) -> Document:
        try:
            document: Document = future.result()
        except (CancelledError, self._dask.CancelledError):
            raise
        except self._dask.scheduler.KilledWorker:
            return trouble(job, "every worker that tried this died in it")
        except Exception as error:
            text = first_line(error)
            return trouble(job, f"a worker failed: {type(error).__name__}: {text}")
        return document


def unfit(answer: object, suite: str) -> str:
    """Why a worker that gives this answer cannot take part with this suite; "" if it can."""
    if isinstance(answer, ModuleNotFoundError):
        return f"kvmnest is not installed there ({answer})"
    if not isinstance(answer, dict):
        return f"it cannot say what it has: {answer}"
    if answer["version"] != kvmnest.__version__ or answer["suite"] != suite:
        return (
            f"its kvmnest {answer['version']} (suite {answer['suite'][:8]}) is not the same"
            f" as this one, {kvmnest.__version__} (suite {suite[:8]})"
        )
    return str(answer["trouble"])


def look(emulator: Choice) -> dict[str, str]:
    """On a worker: which kvmnest it has, and why it could not run a lab ("" if it could)."""
    reason = ""
    try:
        locate(emulator)
    except KvmnestError as error:
        reason = first_line(error)
    return {"version": kvmnest.__version__, "suite": suite_state(), "trouble": reason}


def work(job: Job) -> Document:
    """On a worker: run a job, and give back its document.

    A worker that came later was not asked what it has, so the job is not run with another suite.
    """
    if suite_state() != job.suite:
        return trouble(job, "a worker has another kvmnest than this one: install the same there")
    with scratch.folder() as folder:
        try:
            return run_job(job, Path(folder) / job.file, _cancelled_here())
        except Stopped:
            return trouble(job, "cancelled")


def _cancelled_here() -> Callable[[], bool]:
    """Whether the task that runs in this thread is still wanted.

    Dask cannot end a thread: a lab would go on, on a worker that others need.
    """
    distributed: Any = importlib.import_module("distributed")
    worker = distributed.get_worker()
    key = worker.get_current_task()

    def cancelled() -> bool:
        task = worker.state.tasks.get(key)
        return task is None or task.state == "cancelled"

    return cancelled
