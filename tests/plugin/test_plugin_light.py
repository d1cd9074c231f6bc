"""The light runner and pytest agree on everything but the wording of tracebacks."""

import importlib.util
import json
import marshal
import subprocess
import sys

import pytest
from plugin_helpers import environment, results, run_events, run_pytest

from kvmnest.lab import cache
from kvmnest.light.compiled import rewritten
from kvmnest.light.plan import options
from kvmnest.plugin import policy
from kvmnest.run import collect
from kvmnest.run.selection import Selection, pytest_arguments

SAMPLE = """
import enum
import pytest
from kvmnest.errors import HarnessError
from kvmnest.kvm import Cap
from kvmnest.l1 import VmLost
from kvmnest.vmx.outcome import Fault
from samplesuite.support import check_even, check_nothing

pytestmark = [pytest.mark.series(3), pytest.mark.sdm("A section")]
other = [pytest.mark.series(4), pytest.mark.sdm("Another")]


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


@pytest.mark.parametrize("a", [1, 2])
@pytest.mark.parametrize(("b", "c"), [(3, 4), pytest.param(5, 6, id="five", marks=other)])
def test_product(a, b, c):
    assert c == b + 1
    assert a < 2


@pytest.mark.parametrize("n", (n for n in range(3)))
def test_generator(n):
    check_even(n)


@pytest.mark.parametrize("colour", Colour)
def test_enum(colour):
    assert colour is Colour.RED


class TestGroup:
    @pytest.mark.parametrize("n", [1])
    def test_method(self, l1, n):
        assert not l1.log
        assert n


def test_l1_fails(l1):
    assert l1.cpuid(0) == Fault(6)


@pytest.mark.parametrize("n", range(3))
def test_l1_is_fresh(l1, vm, kvm, n):
    assert not l1.log
    assert l1.cpuid(n)


def test_nothing():
    check_nothing(1)


def test_skips():
    pytest.skip("a reason")
    assert 1


def test_skips_without_reason():
    pytest.skip()
    assert 1


@pytest.mark.needs(Cap.NR_VCPUS)
def test_has():
    assert 1


@pytest.mark.kvm_param(no_such_parameter=1)
def test_lacks():
    assert 1


def test_raises():
    with pytest.raises(ValueError, match="literal") as caught:
        int("x")
    assert isinstance(caught.value, ValueError)


def test_does_not_raise():
    with pytest.raises(ValueError):
        int("1")


def test_harness():
    raise HarnessError("ours")
    assert 0


def test_lost():
    raise VmLost("hang", "no end", "vmlaunch", {"rip": 1})
    assert 0


def test_type_error():
    assert 1 + None


events = []


@pytest.fixture(scope="module")
def shared():
    events.append("up")
    yield "shared"
    events.append("down")


@pytest.fixture
def derived(shared, kvm):
    return shared + "!"


def test_fixture(derived, shared):
    assert derived == shared + "!"


def test_module_scope(shared):
    assert events == ["up"]


@pytest.fixture
def broken():
    raise ValueError("in setup")


def test_broken(broken):
    assert 1


@pytest.fixture
def late():
    yield 1
    raise ValueError("late")


def test_late(late):
    assert late


def test_late_and_failed(late):
    assert not late


def test_option(pytestconfig):
    assert pytestconfig.getoption("--kvmnest-target") == "kvm"
"""

SUPPORT = """
def check_even(n):
    assert n % 2 == 0


def check_nothing(n):
    n + 1
"""

#: Loaded without a look at the source (PEP 552).
UNCHECKED = importlib.util.MAGIC_NUMBER + b"\1\0\0\0" + bytes(8)

CONFTEST = """
from kvmnest.plugin import policy
policy.SUITE = "samplesuite"
policy.needs_vmx = lambda item: False
"""


def _light(folder, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "kvmnest.light.runner", *arguments],
        cwd=folder,
        env=environment() | {"PYTHONPATH": f"{folder}:{environment()['PYTHONPATH']}"},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


@pytest.fixture
def sample(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "")
    monkeypatch.delenv("PYTHONPYCACHEPREFIX", raising=False)
    package = tmp_path / "samplesuite"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "support.py").write_text(SUPPORT)
    (package / "test_sample.py").write_text(SAMPLE)
    (tmp_path / "conftest.py").write_text(CONFTEST)
    return tmp_path


def _plan(folder):
    done = run_pytest(folder, "--collect-only", *options("plan"))
    assert done.returncode == 0, done.stdout
    # As the lab's guest gets it: what pytest compiled stands where Python looks for its own.
    (compiled,) = (folder / "samplesuite" / "__pycache__").glob("test_sample.*-pytest-*.pyc")
    plain = compiled.with_name(f"test_sample.{sys.implementation.cache_tag}.pyc")
    plain.write_bytes(UNCHECKED + compiled.read_bytes()[16:])


def _results(events):
    kept = ("id", "series", "sdm", "outcome", "summary")
    found = [e for e in events if e["e"] == "result"]
    return [{k: e.get(k) for k in kept} | {"raised": e.get("raised") or ""} for e in found]


def test_same_results(sample):
    expected = run_events(sample)
    _plan(sample)
    assert _light(sample, "plan", "check", "0").returncode == 0
    done = _light(sample, "plan", "light", "0")
    assert done.stderr == ""
    assert done.returncode == 1
    events = [json.loads(line) for line in (sample / "light").read_text().splitlines()]
    assert [e["e"] for e in events] == [e["e"] for e in expected]
    assert events[0] == expected[0]
    assert events[1] == expected[1]
    assert events[-1] == expected[-1]
    for got, want in zip(_results(events), _results(expected), strict=True):
        assert got == want
    outcomes = {e["outcome"] for e in events if e["e"] == "result"}
    assert outcomes == {"passed", "failed", "skipped", "error"}


def test_failures_are_explained(sample):
    _plan(sample)
    _light(sample, "plan", "light", "0")
    events = [json.loads(line) for line in (sample / "light").read_text().splitlines()]
    found = {e["id"].rpartition("::")[2]: e for e in events if e["e"] == "result"}
    detail = found["test_l1_fails"]["detail"]
    assert "in test_l1_fails\n    assert l1.cpuid(0) == Fault(6)" in detail
    assert "last commands of 1:" in detail
    assert "kernel " in detail
    assert found["test_late_and_failed"]["detail"].count("ValueError: late") == 1
    assert found["test_lacks"]["detail"].startswith("needs kvm_intel.no_such_parameter=1: no ")


def test_from_the_middle(sample):
    _plan(sample)
    _light(sample, "plan", "light", "30")
    events = [json.loads(line) for line in (sample / "light").read_text().splitlines()]
    assert events[1]["cases"] == []
    assert len(_results(events)) == events[1]["count"] - 30


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("@pytest.mark.skipif(True, reason='x')\ndef test_a(): assert 1", "the mark skipif"),
        ("def test_a(tmp_path): assert 1", "the fixture tmp_path"),
        ("def test_a(request): assert 1", "the fixture request"),
        (
            "@pytest.fixture(params=[1])\ndef f(request): return 1\ndef test_a(f): assert f",
            "with parameters",
        ),
        (
            "def pytest_generate_tests(metafunc): pass\ndef test_a(): assert 1",
            "pytest_generate_tests",
        ),
        ("pytestmark += [pytest.mark.parametrize('n', [1])]\ndef test_a(n): assert n", "module"),
    ],
)
def test_what_it_cannot_run_is_named(sample, text, why):
    header = SAMPLE[: SAMPLE.index("other =")]
    (sample / "samplesuite" / "test_sample.py").write_text(header + text)
    _plan(sample)
    plan = marshal.loads((sample / "plan").read_bytes())
    assert why in plan["unsupported"]


def test_what_the_stand_in_lacks_is_found_by_the_check(sample):
    header = SAMPLE[: SAMPLE.index("other =")]
    (sample / "samplesuite" / "test_sample.py").write_text(
        header + "near = pytest.approx(1)\ndef test_a(): assert near == 1"
    )
    _plan(sample)
    done = _light(sample, "plan", "check", "0")
    assert done.returncode == 1
    assert "approx" in done.stderr.strip().splitlines()[-1]


#: What becomes of each case of the sample, by its meaning.
EXPECTED = {
    "test_product[3-4-1]": "passed", "test_product[3-4-2]": "failed",
    "test_product[five-1]": "passed", "test_product[five-2]": "failed",
    "test_generator[0]": "passed", "test_generator[1]": "failed", "test_generator[2]": "passed",
    "test_enum[Colour.RED]": "passed", "test_enum[Colour.BLUE]": "failed",
    "test_method[1]": "passed", "test_l1_fails": "failed",
    "test_l1_is_fresh[0]": "passed", "test_l1_is_fresh[1]": "passed",
    "test_l1_is_fresh[2]": "passed",
    "test_nothing": "failed", "test_skips": "skipped", "test_skips_without_reason": "failed",
    "test_has": "passed", "test_lacks": "skipped",
    "test_raises": "passed", "test_does_not_raise": "failed",
    "test_harness": "error", "test_lost": "failed", "test_type_error": "failed",
    "test_fixture": "passed", "test_module_scope": "passed",
    "test_broken": "error", "test_late": "error", "test_late_and_failed": "failed",
    "test_option": "passed",
}  # fmt: skip


def test_outcomes(sample):
    found = results(run_events(sample))
    assert {name: case["outcome"] for name, case in found.items()} == EXPECTED
    five = found["test_product[five-1]"]
    assert (five["series"], five["sdm"]) == (4, "Another")


def test_deselected(sample):
    events = run_events(
        sample, "--kvmnest-deselect=test_sample.py::test_product", "--kvmnest-deselect=x"
    )
    left = [name for name in EXPECTED if not name.startswith("test_product")]
    assert [*results(events)] == left
    assert events[1]["count"] == len(left)


def test_listed(sample):
    events = run_events(sample, "--collect-only", "--kvmnest-list")
    listed = {e["id"].rpartition("::")[2]: e for e in events if e["e"] == "listed"}
    assert [*listed] == [*EXPECTED]
    assert listed["test_lacks"]["needs"] == ["kvm_intel.no_such_parameter=1"]
    assert "no_such_parameter" in listed["test_lacks"]["skip"]
    assert listed["test_raises"]["skip"] == ""


def test_only_what_this_pytest_compiled_goes_into_the_lab(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = collect.collect(pytest_arguments(Selection(), "lab", ["kvmnest.suite.test_vmxon"], []))
    folder = cache.root() / "pycache" / policy.SUITE_DIR.lstrip("/")
    ours = folder / f"test_vmxon{found.tail}"
    content = ours.read_bytes()
    # Another version's file, and damaged ones of modules that this run does not need.
    (folder / "test_vmxon.cpython-311-pytest-8.0.0.pyc").write_bytes(
        content[:16] + marshal.dumps(0)
    )
    for name, junk in (("test_vmclear", b""), ("test_exit_io", b"\xff" * 99), ("test_nmi", b"i")):
        (folder / f"{name}{found.tail}").write_bytes(content[:16] + junk)
    for light in (True, False):
        files = rewritten(cache.root() / "pycache", found.tail, light=light)
        (name,) = [name for name in files if "/test_" in name]
        code = marshal.loads(files[name][16:])
        assert code.co_filename.endswith("/kvmnest/suite/test_vmxon.py")
