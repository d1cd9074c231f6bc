"""For all tests of the harness."""

import contextlib
import signal
from pathlib import Path

import pytest

from kvmnest.lab import apts, debian, kernels
from kvmnest.lab.machine import Lab

# How long an example takes says how busy the machine is. A run of the suite reads this file too,
# where only what users need is installed.
with contextlib.suppress(ImportError):
    import hypothesis

    hypothesis.settings.register_profile(
        "kvmnest", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
    )
    hypothesis.settings.load_profile("kvmnest")


def pytest_configure() -> None:
    # A background job of a script starts with SIGINT ignored, and so would all that tests start
    # and interrupt.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, whose content is nobody else's: what is said of the user's is not told."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "kvmnest"


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package of the lab's own kernel, unpacked; with the user's cache, which has its name."""
    release = kernels.resolve().release
    folder = tmp_path_factory.mktemp("package")
    debian.fetch(apts.of(release), release, folder)
    return folder


@pytest.fixture(scope="session")
def prepared() -> None:
    """The lab's own kernel is ready: a run that boots it now has nothing to say of the cache."""
    Lab()
