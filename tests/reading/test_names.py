"""Names that lead to no file, at every option that takes one: one line, before anything is made."""

from pathlib import Path

import pytest
from readers import results

from kvmnest.cli.main import main

CASE = "test_vmxon.py::test_vmxon_enters_vmx_operation"
LAB = ("--target", "lab")
#: Command lines in which BAD stands for the name.
COMMANDS = [
    ("run", *LAB, "BAD"),
    ("run", *LAB, "BAD::test_x"),
    ("run", *LAB, "--kernel", "BAD", CASE),
    ("run", *LAB, "--kvm-modules", "BAD", CASE),
    ("run", *LAB, "--bochs", "BAD", CASE),
    ("run", "--boot", "qemu", "--qemu", "BAD", CASE),
    ("run", *LAB, "--json", "BAD/x", CASE),
    ("run", *LAB, "--junit", "BAD/x", CASE),
    ("run", *LAB, "--html", "BAD/x", CASE),
    ("run", *LAB, "--ktap", "BAD/x", CASE),
    ("list", "BAD"),
    ("trace", *LAB, "BAD"),
    ("trace", *LAB, "--kernel", "BAD", CASE),
    ("shell", *LAB, "--kernel", "BAD"),
    ("lab", "run", "--kernel", "BAD", "--", "true"),
    ("lab", "run", "--kernel", "BAD.deb,BAD.deb", "--", "true"),
    ("lab", "run", "--bochs", "BAD", "--", "true"),
    ("lab", "emulators", "--bochs", "BAD", "--no-boot"),
    ("caps", "diff", "BAD.json", "BAD.json"),
    ("caps", *LAB, "--kernel", "BAD"),
    ("bench", "--compare", "BAD"),
    ("bench", "--json", "BAD/x"),
    ("diff", "BAD", "BAD"),
    ("report", "BAD", "--ktap", "-"),
    ("report", "GOOD", "--html", "BAD/x"),
    ("report", "GOOD", "--compare", "BAD", "--ktap", "-"),
    ("fuzz", *LAB, "--cases", "1", "--journal", "BAD/x", "--no-shrink"),
    ("fuzz", *LAB, "--cases", "1", "--tests", "BAD"),
    ("fuzz", *LAB, "--cases", "1", "--json", "BAD/x"),
    ("bisect", "log", "--state", "BAD"),
    ("bisect", "log", "--git", "BAD"),
    ("bisect", "--case", "BAD", "--kernels", "6.1,6.12", "--good", "6.1", "--bad", "6.12"),
    ("bisect", "--case", CASE, "--git", "BAD", "--build", "true", "--good", "a", "--bad", "b"),
    ("bisect", "--case", CASE, "--kernels", "a,b", "--good", "a", "--bad", "b", "--state", "BAD/x"),
    ("matrix", "BAD", "--kernels", "6.1"),
    ("matrix", CASE, "--kernels", "6.1", "--state", "BAD/x"),
    ("matrix", CASE, "--kernels", "6.1", "--json", "BAD/x"),
    ("matrix", CASE, "--kernels", "6.1", "--html", "BAD/x"),
    ("mutants", "--kernel", "BAD"),
    ("repro", "BAD"),
    ("repro", "./BAD.py"),
    ("repro", "show", "BAD.py"),
    ("repro", "new", "BAD"),
    ("build", "BAD", "BAD"),
    ("found", "BAD"),
    ("coverage", "show", "BAD"),
    ("coverage", "show", "GOOD", "--against", "BAD"),
    ("coverage", "run", "--data", "BAD/x", CASE),
    ("coverage", "run", "--against", "BAD", CASE),
    ("kernels", "forget", "BAD"),
]


@pytest.fixture
def bad_names(tmp_path: Path) -> list[str]:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").write_bytes(b"x")
    return [
        "x" * 300,
        "x/" * 2500 + "x",
        str(tmp_path / "loop"),
        str(tmp_path / "file/below"),
    ]


#: Names that can be, of which nothing is there.
NOT_THERE = ("/proc/nonexistent", "\udcff")
#: Options whose folder is made.
MADE = ("--state", "--journal")


@pytest.mark.parametrize("command", COMMANDS, ids=lambda words: " ".join(words).replace("/", " "))
def test_names_that_cannot_be(
    command: tuple[str, ...],
    bad_names: list[str],
    own_cache: Path,
    stand_ins: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(own_cache.parent))
    good = tmp_path / "good.json"
    good.write_bytes(results())
    before = {*tmp_path.iterdir()}
    made = any(option in command for option in MADE)
    names = bad_names if made else [*bad_names, *NOT_THERE]
    for name in names:
        words = [word.replace("BAD", name).replace("GOOD", str(good)) for word in command]
        try:
            code = main(words)
        except SystemExit as ended:
            code = int(str(ended.code))
        told = capsys.readouterr().err
        # A report that cannot be written is found in one way by all verbs.
        assert code in ((2,) if "BAD/x" in command and not made else (2, 3, 4)), (words, told)
        assert told.count("\n") == 1, (words, told)
        assert len(told) < 2000
        assert not (own_cache / "archive").exists(), words
    assert {*tmp_path.iterdir()} == before
