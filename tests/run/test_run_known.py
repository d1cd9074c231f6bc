"""The record of known deviations."""

import pytest

from kvmnest import known
from kvmnest.errors import HarnessError
from kvmnest.reports.model import Run
from kvmnest.run.judge import Judge
from kvmnest.run.report import exit_code

KERNEL = "6.1.0-56-cloud-amd64"


@pytest.mark.parametrize(
    ("release", "numbers"),
    [
        (KERNEL, (6, 1, 0, 56)),
        ("6.12.117+deb13-amd64", (6, 12, 117)),
        ("6.18.44-fc-v657", (6, 18, 44)),
        ("5.10", (5, 10)),
        ("next", ()),
    ],
)
def test_kernel_version(release, numbers):
    assert known.kernel_version(release) == numbers


@pytest.mark.parametrize(
    ("condition", "met"),
    [
        ("any", True),
        (">=6.1", True),
        (">=6.1,<6.13", True),
        ("<6.1", False),
        ("<=6.1", True),
        ("==6.1", True),
        ("==6.1.0-56", True),
        ("==6.1.0-55", False),
        (">6.1", False),
        (">6.1.0-55", True),
        (">=6.1.0-57", False),
        (">= 5.10, < 6.2", True),
    ],
)
def test_kernel_in_range(condition, met):
    assert known.kernel_in_range(KERNEL, condition) is met


@pytest.mark.parametrize("condition", ["", "6.1", ">=six", ">=6.1;<7", ">=6.1,"])
def test_kernel_range_that_cannot_be_read(condition):
    with pytest.raises(ValueError, match="kernel range"):
        known.kernel_in_range(KERNEL, condition)


@pytest.mark.parametrize(
    ("have", "wanted", "same"),
    [
        ("Y", True, True),
        ("Y", 1, True),
        ("Y", "1", True),
        ("Y", "y", True),
        ("1", "Y", True),
        ("N", False, True),
        ("0", "N", True),
        ("N", True, False),
        ("128", 128, True),
        ("128", "127", False),
        ("never", "never", True),
        (None, "N", False),
    ],
)
def test_same_parameter(have, wanted, same):
    assert known.same_parameter(have, wanted) is same


def _load(tmp_path, text, target="lab", params=None):
    path = tmp_path / "known.toml"
    path.write_text(text)
    return known.load(target, KERNEL, params or {}, path)


ENTRY = '[[deviation]]\ncase = "test_a.py::test_b[*]"\nreason = "r"\n'


def test_match(tmp_path):
    record = _load(tmp_path, ENTRY)
    assert record.match("test_a.py::test_b[0-x]").reason == "r"
    assert record.match("test_a.py::test_b") is None
    # Brackets are text, not a character class.
    assert record.match("test_a.py::test_bz") is None


@pytest.mark.parametrize(
    ("extra", "applies"),
    [
        ("", True),
        ('target = "lab"', True),
        ('target = "kvm"', False),
        ('kernels = "<6.1"', False),
        ('kernels = ">=6.1,<6.2"', True),
        ('params = { ept = "N" }', False),
        ('params = { ept = true, nested = "1" }', True),
    ],
)
def test_applies(tmp_path, extra, applies):
    record = _load(tmp_path, ENTRY + extra, params={"ept": "Y", "nested": "Y"})
    assert bool(record.match("test_a.py::test_b[1]")) is applies


@pytest.mark.parametrize(
    ("extra", "emulator", "applies"),
    [
        ("", "", True),
        ("", "bochs 2.7", True),
        ('emulator = "bochs <3"', "bochs 2.7", True),
        ('emulator = "bochs <3"', "bochs 3.0", False),
        ('emulator = "bochs <3"', "", False),
        ('emulator = "bochs"', "bochs 3.1", True),
        ('emulator = "bochs"', "", False),
        ('emulator = "bochs >=3,<3.1"', "bochs 3.0", True),
        ('emulator = "bochs >=3,<3.1"', "bochs 3.1", False),
        ('emulator = "other"', "bochs 3.0", False),
        ('hidden_by = "bochs <3"', "bochs 2.7", False),
        ('hidden_by = "bochs <3"', "bochs 3.0", True),
        ('hidden_by = "bochs <3"', "", True),
        ('emulator = "bochs <3.0-25"', "bochs 2.7", True),
        ('emulator = "bochs <3.0-25"', "bochs 3.0", True),
        ('emulator = "bochs <3.0-25"', "bochs 3.0-24", True),
        ('emulator = "bochs <3.0-25"', "bochs 3.0-25", False),
        ('emulator = "bochs <=3.0"', "bochs 3.0-25", True),
    ],
)
def test_emulators(tmp_path, extra, emulator, applies):
    path = tmp_path / "known.toml"
    path.write_text(ENTRY + extra)
    record = known.load("lab", KERNEL, {}, path, emulator=emulator)
    assert bool(record.match("test_a.py::test_b[1]")) is applies


@pytest.mark.parametrize("condition", ["cpu_lacks", "cpu_has"])
@pytest.mark.parametrize(
    ("flags", "has"), [("fpu vme", False), ("fpu umip vme", True), ("fpu umip2", False)]
)
def test_what_the_cpu_has(tmp_path, condition, flags, has):
    path = tmp_path / "known.toml"
    path.write_text(f'{ENTRY}{condition} = "umip"')
    record = known.load("kvm", KERNEL, {}, path, cpu_flags=flags)
    assert bool(record.match("test_a.py::test_b[1]")) is (has is (condition == "cpu_has"))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[[deviation", "known.toml is not TOML: "),
        ('[[deviation]]\ncase = "x"\n', "deviation 1: missing 1 required"),
        (ENTRY + "colour = 1", "unexpected keyword argument 'colour'"),
        (ENTRY + 'kernels = "new"', "kernel range 'new'"),
        (ENTRY + 'target = "moon"', "target is"),
        (ENTRY + 'emulator = "bochs 3"', "kernel range"),
        (ENTRY + 'emulator = ">=3"', "emulator '>=3'"),
        (ENTRY + 'hidden_by = "3.0"', "emulator '3.0'"),
        ('[[deviation]]\ncase = "x"\nreason = " "', "needs a reason"),
    ],
)
def test_wrong_records_are_named(tmp_path, text, complaint):
    with pytest.raises(HarnessError) as caught:
        _load(tmp_path, text)
    assert complaint in str(caught.value)
    assert "known.toml" in str(caught.value)


def test_no_file_is_an_empty_record(tmp_path):
    assert known.load("lab", KERNEL, {}, tmp_path / "none").match("x") is None


def test_the_shipped_record_loads():
    for target in ("kvm", "lab"):
        known.load(target, KERNEL, {})


@pytest.mark.parametrize(("extra", "outcome"), [("", "error"), ("crash = true\n", "known")])
def test_a_crash_is_known_as_such_only(tmp_path, monkeypatch, extra, outcome):
    """The emulator may be killed from outside while a case runs that is known to fail."""
    path = tmp_path / "known.toml"
    path.write_text(ENTRY + extra)
    monkeypatch.setattr(known, "KNOWN_FILE", path)
    judge = Judge(Run("lab"))
    case_id = "test_a.py::test_b[0]"
    judge.event({"e": "session", "kernel": KERNEL, "kvm_params": {}})
    judge.event({"e": "collected", "first": 0, "cases": [[case_id, 1]]})
    judge.event({"e": "start", "id": case_id, "series": 1, "sdm": None})
    judge.lost("bochs was killed by signal 9")
    assert [case.outcome for case in judge.run.cases] == [outcome]
    assert exit_code(judge.run) == (3 if outcome == "error" else 0)
