"""The pytest plugin: fixtures ``kvm``, ``vm`` and ``l1``, markers, failure reports, events.

It is loaded through the entry point ``pytest11`` in every pytest run of the environment, so it
imports little and does nothing to items that use none of it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING

import pytest

from kvmnest.plugin import options, policy
from kvmnest.plugin.fixtures import OFFER, kvm, l1, l1_pool, vm
from kvmnest.plugin.outcomes import judge

if TYPE_CHECKING:
    from kvmnest.plugin.stream import EventStream

# Helpers of the suite explain their failed assertions too, and so do reproducers.
pytest.register_assert_rewrite(policy.SUITE, policy.REPRODUCERS)

__all__ = ["kvm", "l1", "l1_pool", "vm"]

STREAM: pytest.StashKey[EventStream] = pytest.StashKey()
#: Whether the test that runs now uses kvmnest, so that numbers are explained in hexadecimal.
OURS: pytest.StashKey[bool] = pytest.StashKey()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of ``kvmnest run`` that act inside the pytest process."""
    options.add(parser)


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    """Register the markers and, if asked for, the event stream."""
    for marker in policy.MARKERS:
        config.addinivalue_line("markers", marker)
    spec = config.getoption("--kvmnest-events")
    if spec:
        from kvmnest.plugin.stream import EventStream

        config.stash[STREAM] = stream = EventStream(config, spec)
        config.pluginmanager.register(stream, "kvmnest-events")
        if config.getoption("--kvmnest-list"):
            from kvmnest.plugin.listed import Listing

            config.pluginmanager.register(Listing(stream.send), "kvmnest-list")
    else:
        from kvmnest.plugin.direct import DirectRun

        config.pluginmanager.register(DirectRun(config), "kvmnest-direct")


def pytest_unconfigure(config: pytest.Config) -> None:
    """Close /dev/kvm."""
    if OFFER in config.stash:
        config.stash[OFFER].close()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Hold the suite to its rules, shuffle, and leave out what is not to run in this process."""
    problems = policy.problems(items)
    if problems:
        if STREAM in config.stash:
            config.stash[STREAM].broken(policy.SUITE, "\n".join(problems))
        raise pytest.UsageError("cases break the rules of the suite:\n" + "\n".join(problems))
    seed = config.getoption("--kvmnest-shuffle")
    if seed is not None:
        random.Random(seed).shuffle(items)
    left_out = tuple(config.getoption("--kvmnest-deselect"))
    _keep(config, items, lambda _, item: not policy.case_id(item.nodeid, item).startswith(left_out))
    only = {*config.getoption("--kvmnest-only")}
    if only:
        _keep(config, items, lambda _, item: not policy.ships(item)
              or policy.case_id(item.nodeid, item) in only)  # fmt: skip
    part, parts = (int(n) for n in (config.getoption("--kvmnest-part") or "0/1").split("/"))
    _keep(config, items, lambda number, _: number % parts == part)
    first = config.getoption("--kvmnest-from")
    if STREAM in config.stash:
        config.stash[STREAM].collected(items, first)
    _keep(config, items, lambda number, _: number >= first)
    policy.note_assertions(items)


def _keep(
    config: pytest.Config, items: list[pytest.Item], wanted: Callable[[int, pytest.Item], bool]
) -> None:
    """Deselect all others."""
    kept = [wanted(number, item) for number, item in enumerate(items)]
    if not all(kept):
        config.hook.pytest_deselected(items=[i for i, k in zip(items, kept, strict=True) if not k])
        items[:] = [item for item, keep in zip(items, kept, strict=True) if keep]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what cannot run here, before any fixture of the case is made."""
    item.config.stash[OURS] = policy.ships(item) or policy.uses_kvmnest(item)
    policy.require(item)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    """Fail a case of the suite that asserts nothing, whatever it does."""
    if pyfuncitem.stash.get(policy.ASSERTS, True) is False:
        pytest.fail(
            "this case asserts nothing: it has no assert statement, pytest.raises or helper named"
            " check_*, expect_* or assert_* that has one",
            pytrace=False,
        )
    return (yield)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Tell failures from errors and add what one needs to understand them."""
    report = yield
    return judge(item, call, report)


def pytest_assertrepr_compare(
    config: pytest.Config, op: str, left: object, right: object
) -> list[str] | None:
    """Explain comparisons of outcomes and numbers; what came from L1 stands on the left."""
    from kvmnest.cases import explain

    if config.stash.get(OURS, False) or explain.is_outcome(left) or explain.is_outcome(right):
        return explain.relation(op, left, right)
    return None


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Kernel, CPU and module parameters, which decide over results."""
    from kvmnest import __version__, host

    return [
        f"kvmnest: {__version__}, kernel {host.kernel()}, {host.cpu_model()}",
        f"kvmnest: {host.params_text(host.kvm_intel_params())}",
    ]
