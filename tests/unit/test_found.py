"""The list of defects found in KVM agrees with the record of deviations, the suite, the record."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

import kvmnest.suite
from kvmnest import found
from kvmnest.cli.main import main
from kvmnest.errors import HarnessError
from kvmnest.found import record, verify
from kvmnest.lab.emulators import Choice
from kvmnest.repro import corpus
from kvmnest.repro.evidence import Seen
from kvmnest.repro.verify import Verifier

SUITE = Path(kvmnest.suite.__path__[0])
DEFECTS = found.load()
NEWEST = "7.3.4+deb13-cloud-amd64"
#: Kernels on which each was really asked for; the last has the source that the fixes fit.
LADDER = ("6.1.0-56", "6.12.118", "6.18.15", "7.2.13", "7.3.4")
ALL = pytest.mark.parametrize("defect", DEFECTS, ids=lambda each: each.id)


@ALL
def test_a_defect_is_shown_by_cases(defect):
    """Each case is in the suite, and recorded as KVM's fault on the newest kernel."""
    newest = [
        deviation
        for deviation in defect.deviations()
        if deviation.applies(
            "lab",
            NEWEST,
            {k: "Y" if v else "N" for k, v in deviation.params.items()},
            "bochs 3.0",
        )
    ]
    assert {deviation.case for deviation in newest} == set(defect.cases)
    for deviation in newest:
        assert deviation.emulator == ""
        file, _, name = deviation.case.partition("::")
        function = name.partition("[")[0].rstrip("*")
        assert re.search(rf"^def {function}\(", (SUITE / file).read_text(), re.MULTILINE), name


@ALL
def test_a_defect_is_told_in_full(defect):
    """Reproducer with fix, place in the source, what a user loses: one line each."""
    script = defect.reproducer
    assert not script.bug.subject
    assert script.fix
    for edit in script.fix:
        assert edit.file.startswith(("arch/x86/kvm/", "virt/kvm/"))
    for name in ("seen", "right", "file", "function", "line", "loss", "fix", "witness"):
        assert getattr(defect, name), name
        assert "\n" not in getattr(defect, name)
    with pytest.raises(HarnessError, match="no reproducer"):
        _ = dataclasses.replace(defect, id="nothing").reproducer


@ALL
def test_a_defect_was_shown(defect):
    """On the newest kernel seen, gone with all fixes and with its own; and asked for on others."""
    verify = f"kvmnest found --verify --record {record.RECORD} {defect.id}"
    shown = record.load().get(defect.id, {})
    assert set(LADDER) <= {record.short(release) for release in shown}, verify
    assert list(shown) == sorted(shown, key=record.age)
    for release, each in shown.items():
        assert each.script == record.script_hash(defect.reproducer), f"{release}: {verify}"
    newest = shown[NEWEST]
    assert newest.verdicts == record.NEEDED, verify
    assert newest.edits == record.edits_hash(defect.reproducer), verify
    assert re.fullmatch(rf"{re.escape(defect.file)}:\d+", newest.line), verify


@ALL
def test_a_defect_says_how_it_is_reached(defect):
    """A parameter for tests is no guest: who reads of it has to know what else leads there."""
    if defect.reproducer.params.get("force_emulation_prefix"):
        assert defect.reach


def test_minor_defects_come_last():
    weights = [defect.weight for defect in DEFECTS]
    assert weights == sorted(weights)
    assert set(weights) == {"", found.MINOR}


def test_a_weight_that_is_none(monkeypatch, tmp_path):
    (tmp_path / "found.toml").write_text(
        found.FILE.read_text().replace('weight = "minor"', 'weight = "small"', 1)
    )
    monkeypatch.setattr(found, "FILE", tmp_path / "found.toml")
    found.load.cache_clear()
    with pytest.raises(HarnessError, match="weight is minor or left out"):
        found.load()
    found.load.cache_clear()


def test_a_defect_that_needs_another_cpu(monkeypatch):
    """Its reproducer runs there, unless the user chose a CPU model; the others run on the usual."""
    asked = []
    monkeypatch.setattr(verify, "check", lambda scripts, target: asked.append(target({})) or [])
    monkeypatch.setattr(Verifier, "target", lambda it, params, kvm_modules: it.emulator.cpu_model)
    for chosen in (None, "broadwell_ult"):
        asked.clear()
        verifier = Verifier("newest", NEWEST, Choice(cpu_model=chosen))
        verify._run(DEFECTS, verifier, None)
        models = {each.cpu_model or None for each in DEFECTS}
        assert set(asked) == ({chosen} if chosen else models)
        assert len(models) == 2


def test_every_script_is_a_defect():
    ids = [defect.id for defect in DEFECTS]
    assert len(set(ids)) == len(ids) >= 20
    assert set(ids) == {each.id for each in corpus.load(corpus.UNFIXED)} == set(record.load())


def test_the_verb(capsys):
    assert main(["found"]) == 0
    told = capsys.readouterr().out
    assert all(f"{each.id}: {each.reproducer.title}\n    seen on " in told for each in DEFECTS)
    minor = told.partition("\nMinor: ")[2]
    assert {each.id for each in DEFECTS if f"{each.id}: " in minor} == {
        each.id for each in DEFECTS if each.weight
    }
    assert main(["found", DEFECTS[0].id]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert f"source: {DEFECTS[0].file}:" in told
    assert DEFECTS[0].line in told
    assert "with the fix 7.3.4 says FIXED" in told
    assert main(["found", "--json"]) == 0
    entries = json.loads(capsys.readouterr().out)
    assert len(entries) == len(DEFECTS)
    assert entries[0]["shown"][NEWEST]["together"]["verdict"] == "FIXED"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nothing"], "no such defect: nothing"),
        (["--record", "x.json"], "--record is for kvmnest found --verify"),
        (["--as-it-is"], "--as-it-is is for kvmnest found --verify"),
        (["--kernel", "newest"], "--kernel is for kvmnest found --verify"),
        (["--verify", "--kvm-modules", "/tmp"], "builds the modules itself"),
        (["--verify", "--build", "fixed"], "no --build"),
        (["--build", "fixed", "--record", "x.json"], "--record is for kvmnest found --verify"),
        (["--verify", "--record", "/nowhere/x.json"], "No such file or directory"),
    ],
)
def test_usage(capsys, words, said):
    assert main(["found", *words]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("text", ["[[defect]]\nid = 1", "junk", "[[defect]]\nid = 'x'\nwhat = 1"])
def test_a_damaged_file(monkeypatch, tmp_path, text):
    (tmp_path / "found.toml").write_text(text)
    monkeypatch.setattr(found, "FILE", tmp_path / "found.toml")
    found.load.cache_clear()
    with pytest.raises(HarnessError, match=r"found\.toml (cannot be used|is not TOML)"):
        found.load()
    found.load.cache_clear()


def test_a_case_that_is_not_recorded():
    defect = dataclasses.replace(DEFECTS[0], cases=("test_vmxon.py::test_a",))
    with pytest.raises(HarnessError, match=r"test_a is not in known\.toml"):
        defect.deviations()


def test_a_record_is_kept_in_the_order_of_kernels(tmp_path):
    path, kept = tmp_path / "shown.json", {}
    fixed, seen = Seen("FIXED", "passes"), Seen("VULNERABLE", "assert")
    full = record.Shown("ab", seen, "cd", "vmx.c:1", fixed, fixed)
    old = record.Shown("ab", fixed)
    for release in (NEWEST, "7.3-cloud-amd64", "6.12.118+deb13-amd64", "6.1.0-56-amd64"):
        record.add(kept, "x", release, full if release == NEWEST else old)
    record.save(path, kept)
    assert record.load(path) == kept
    assert [record.short(each) for each in record.load(path)["x"]] == [
        *("6.1.0-56", "6.12.118", "7.3", "7.3.4")
    ]
    assert (full.verdicts, old.verdicts) == (record.NEEDED, ("FIXED", "", ""))


@pytest.mark.parametrize(
    "text", ["junk", "[]", '{"schema": 9}', '{"schema": 1, "shown": {"x": 1}}']
)
def test_a_damaged_record(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(HarnessError, match="not a record of kvmnest found --verify"):
        record.load(tmp_path / "x.json")


def test_the_hash_of_a_script_is_not_that_of_its_fix():
    """A better fix makes no kernel's verdict stale; another test does."""
    script = DEFECTS[0].reproducer
    other = dataclasses.replace(script, bug=dataclasses.replace(script.bug, fix=()))
    assert record.script_hash(script) == record.script_hash(other)
    assert record.edits_hash(script) != record.edits_hash(other)
    changed = dataclasses.replace(script, does=script.does + "\nassert True")
    assert record.script_hash(script) != record.script_hash(changed)
