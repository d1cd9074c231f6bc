"""``python -m kvmnest.light.runner PLAN EVENTS FIRST``: run cases without importing pytest.

It resolves the fixtures and parameters of the plan, runs the cases and writes the same events as
the plugin does. With EVENTS "check" it runs nothing and exits with 0 if it could run every case.
"""

from __future__ import annotations

import gc
import marshal
import os
import sys
import time
from collections.abc import Callable, Generator, Iterator
from importlib import import_module
from types import FunctionType
from typing import Any

import kvmnest
from kvmnest import host, kmsg
from kvmnest.cases import explain, verdict
from kvmnest.cases.events import EventWriter
from kvmnest.cases.needs import why_skipped
from kvmnest.cases.offer import HostOffer
from kvmnest.kmsg import LEVELS, KernelLog
from kvmnest.light import rewrite, standin

_LONGEST_DETAIL = 20_000
_INTERRUPTED = 2  # pytest.ExitCode.INTERRUPTED


class Case:
    """One case of the plan, with its function looked up."""

    def __init__(self, entry: dict[str, Any]) -> None:
        self.id: str = entry["id"]
        self.series: int | None = entry["series"]
        self.sdm: str | None = entry["sdm"]
        self.module: str = entry["module"]
        home: Any = import_module(self.module)
        for part in entry["class"].split(".") if entry["class"] else ():
            home = getattr(home, part)
        self.cls: type | None = home if entry["class"] else None
        function = getattr(home, entry["function"])
        self.function: FunctionType = function
        self.arguments: dict[str, Any] = standin.values_of(function, entry["indices"])
        self.fixtures: list[tuple[str, str]] = entry["fixtures"]
        self.needs = [_flag(*flag) for flag in entry["needs"]]
        self.params: dict[str, object] = entry["params"]
        self.vmx: bool = entry["vmx"]
        self.asserts: bool = entry["asserts"]

    def call(self, fixtures: dict[str, Any]) -> None:
        """Call the case's function; a method gets a new instance."""
        code = self.function.__code__
        wanted = list(code.co_varnames[: code.co_argcount])
        this = [self.cls()] if self.cls else []
        known = fixtures | self.arguments
        self.function(*this, **{name: known[name] for name in wanted[len(this) :]})


def _flag(module: str, kind: str, value: int) -> Any:
    return getattr(import_module(module), kind)(value)


class Fixtures:
    """Values of fixtures, each kept for its scope."""

    def __init__(self, offer: HostOffer, config: standin.Config, writer: EventWriter) -> None:
        self.offer, self.config, self.writer = offer, config, writer
        #: Whether the present case has passed so far.
        self.passed = True
        self._values: dict[tuple[str, str], Any] = {}
        #: (scope, key, rest of the generator) in the order of set-up.
        self._ends: list[tuple[str, tuple[str, str], Iterator[Any]]] = []

    def value(self, name: str, module: str) -> Any:
        """Value of a fixture; ``module`` is where it is defined, "" for the plugin's own."""
        key = (name, module)
        if key not in self._values:
            scope, made = self._make(name, module)
            end: Iterator[Any] = iter(())
            if isinstance(made, Generator):  # what follows its yield is the teardown
                end, made = made, next(made)
            self._values[key] = made
            self._ends.append((scope, key, end))
        return self._values[key]

    def _make(self, name: str, module: str) -> tuple[str, Any]:
        if not module:
            scope, function = _PLUGIN_FIXTURES[name]
            return scope, function(self)
        defined = getattr(import_module(module), name)
        code = defined.__code__
        wanted = code.co_varnames[: code.co_argcount]
        arguments = {other: self.value(other, _home(other, module)) for other in wanted}
        return getattr(defined, standin.FIXTURE), defined(**arguments)

    def end(self, *scopes: str) -> list[Exception]:
        """Tear down the fixtures of these scopes, the latest first; returns what they raised."""
        errors = []
        for scope, key, end in reversed(self._ends):
            if scope in scopes:
                del self._values[key]
                try:
                    next(end, None)
                except Exception as error:
                    errors.append(error)
        self._ends = [item for item in self._ends if item[0] not in scopes]
        return errors


def _home(name: str, module: str) -> str:
    """Module of a fixture that a fixture of ``module`` asks for."""
    local = getattr(import_module(module), name, None)
    return module if hasattr(local, standin.FIXTURE) else ""


def _vm(fixtures: Fixtures) -> Iterator[Any]:
    with fixtures.offer.kvm.create_vm() as new:
        yield new


def _l1_pool(fixtures: Fixtures) -> Iterator[Any]:
    from kvmnest.l1.pool import L1Pool

    option = fixtures.config.getoption
    pool = L1Pool(
        fixtures.offer.kvm,
        budget=option("--kvmnest-budget"),
        nested_roundtrip=option("--nested-roundtrip"),
    )
    yield pool
    pool.close()


def _l1(fixtures: Fixtures) -> Iterator[Any]:
    pool = fixtures.value("l1_pool", "")
    new = pool.take()
    if fixtures.config.getoption("--kvmnest-trace"):
        from kvmnest.cases.trace import Recorder

        new.on_results = Recorder(new, lambda command: fixtures.writer.send("trace", **command))
    yield new
    new.on_results = None
    fresh = fixtures.config.getoption("--fresh-vm")
    pool.give_back(new, reuse=fixtures.passed and not fresh)


#: The plugin's fixtures: scope, and what makes the value.
_PLUGIN_FIXTURES: dict[str, tuple[str, Callable[[Fixtures], Any]]] = {
    "kvm": ("session", lambda fixtures: fixtures.offer.kvm),
    "pytestconfig": ("session", lambda fixtures: fixtures.config),
    "vm": ("function", _vm),
    "l1_pool": ("session", _l1_pool),
    "l1": ("function", _l1),
}


class Runner:
    """Runs the cases of a plan and writes events."""

    def __init__(self, plan: dict[str, Any], writer: EventWriter) -> None:
        self._writer = writer
        self._kernel_log = KernelLog(LEVELS.index(plan["options"]["--kernel-log"]))
        self._offer = HostOffer()
        self._fixtures = Fixtures(self._offer, standin.Config(plan["options"]), writer)
        self._failed = False
        #: What a case raised that ends more than the case.
        self.interrupted = ""

    def run(self, cases: list[Case]) -> int:
        """Run; returns the exit status that pytest would have."""
        for number, case in enumerate(cases):
            self._writer.send("start", id=case.id, series=case.series, sdm=case.sdm)
            # The lab's pump must get the line out before a kernel that this case breaks is gone.
            os.sched_yield()
            after = cases[number + 1] if number + 1 < len(cases) else None
            began = time.monotonic()
            try:
                result = self._case(case, after)
            except (KeyboardInterrupt, SystemExit) as ended:
                # Not the run is to end, but this process: its state is not a case's beginning.
                self.interrupted = f"{type(ended).__name__}: {ended}".rstrip(": ")
                return _INTERRUPTED
            seconds = round(time.monotonic() - began, 6)
            said = self._kernel_log.drain()
            if said:
                self._writer.send("kernel", text=said)
            self._writer.send(
                "result",
                id=case.id,
                series=case.series,
                sdm=case.sdm,
                outcome=result.pop("outcome", "passed"),
                seconds=seconds,
                detail=result.pop("detail", "")[:_LONGEST_DETAIL],
                **result,
            )
        self._offer.close()
        return int(self._failed)

    def _case(self, case: Case, after: Case | None) -> dict[str, str]:
        result: dict[str, str] = {}
        values: dict[str, Any] = {}
        when = "setup"
        self._fixtures.passed = False
        try:
            reason = why_skipped(self._offer, case.needs, case.params, vmx=case.vmx)
            if reason:
                raise standin.Skipped(reason)
            values = {name: self._fixtures.value(name, where) for name, where in case.fixtures}
            when = "call"
            if not case.asserts:
                standin.fail(NO_ASSERTION, pytrace=False)
            case.call(values)
            self._fixtures.passed = True
        except standin.Skipped as skipped:
            reason = str(skipped).strip()
            result = {"outcome": "skipped", "detail": reason}
            if not reason:
                result = {"outcome": "failed", "detail": NO_REASON, "summary": NO_REASON}
            self._fixtures.passed = True
        except Exception as error:
            result = self._failure(error, when, case, values)
        scopes = ["function"]
        if after is None or after.module != case.module:
            scopes.append("module")
        if after is None:
            scopes.append("session")
        for late_error in self._fixtures.end(*scopes):
            late = self._failure(late_error, "teardown", case, values)
            if result.get("outcome") in verdict.FAILED:
                result["detail"] += f"\n--- then, in teardown ---\n{late['detail']}"
                if late["outcome"] == "failed":
                    result["outcome"] = "failed"
            else:
                result = late
        self._failed |= result.get("outcome") in verdict.FAILED
        return result

    def _failure(
        self, error: Exception, when: str, case: Case, values: dict[str, Any]
    ) -> dict[str, str]:
        if isinstance(error, standin.Failed) and not error.pytrace:
            text = str(error)
        else:
            text = rewrite.traceback_text(error, case.function.__code__)
            text = explain.readable(text)
        return {
            "outcome": verdict.kind(error, when),
            "summary": explain.readable(verdict.summary(error)),
            "raised": verdict.raised(error),
            "detail": f"{text}\n{explain.context(values.values(), '')}",
        }


NO_ASSERTION = (
    "this case asserts nothing: it has no assert statement, pytest.raises or helper named"
    " check_*, expect_* or assert_* that has one"
)
NO_REASON = "this case skips without a reason"


def main(arguments: list[str]) -> int:
    """Run the plan named in ``arguments``."""
    path, events, first = arguments[0], arguments[1], int(arguments[2])
    with open(path, "rb") as file:
        plan = marshal.load(file)
    standin.install()
    if events == "check":
        for entry in plan["cases"]:
            Case(entry)
        return 0
    writer = EventWriter(events)
    writer.send(
        "session",
        kvmnest=kvmnest.__version__,
        python=sys.version.split()[0],
        pytest=plan["pytest"],
        kernel=host.kernel(),
        cpu=host.cpu_model(),
        cpu_flags=host.cpu_flags(),
        kvm_params=host.kvm_intel_params(),
        nested_roundtrip=plan["options"]["--nested-roundtrip"],
        kernel_log=os.access(kmsg.PATH, os.R_OK),
    )
    entries = plan["cases"]
    ids = [] if first else [[entry["id"], entry["series"]] for entry in entries]
    writer.send("collected", count=len(entries), first=first, cases=ids)
    cases = [Case(entry) for entry in entries[first:]]
    # What has been imported stays: the collector need not look at it again and again.
    gc.collect()
    gc.freeze()
    runner = Runner(plan, writer)
    status = runner.run(cases)
    writer.send("end", status=status if entries[first:] else 5, why=runner.interrupted)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
