"""Over kernels: what is kept by default, what is printed, what is refused in one line."""

import json
import subprocess
import sys

import pytest

from kvmnest.bisect import plan
from kvmnest.bisect.probe import BAD, GOOD, SKIP, Answer, Question
from kvmnest.cli.main import main
from kvmnest.errors import HarnessError
from kvmnest.lab import debian, kernels
from kvmnest.lab.decompress import decompress
from kvmnest.lab.errors import KernelSpecError, LabSetupError

CASE = "test_vmxon.py"
NAMES = [f"6.1.0-{number}-amd64" for number in range(40, 48)]


@pytest.fixture
def told(monkeypatch, tmp_path):
    """Answers by kernel instead of boots, and a cache of our own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    answers, asked = {}, []

    def ask(self, kernel, kvm_modules=None):
        asked.append(kernel)
        answer = answers[kernel]
        if isinstance(answer, BaseException):
            raise answer
        return answer

    monkeypatch.setattr(Question, "ask", ask)
    monkeypatch.setattr("kvmnest.bisect.over.package_version", VERSIONS.get)
    answers.update({name: Answer(GOOD, f"passed on {name}") for name in NAMES[:5]})
    answers.update({name: Answer(BAD, f"failed on {name}") for name in NAMES[5:]})
    return answers, asked


VERSIONS = {NAMES[4]: "6.1.150-1", NAMES[5]: "6.1.153-1"}
WORDS = ["bisect", "--case", CASE, "--kernels", ",".join(NAMES)]
ENDS = ["--good", NAMES[0], "--bad", NAMES[-1]]


def test_what_differed_is_printed(told, capsys):
    answers, _ = told
    answers[NAMES[3]] = Answer(SKIP, "panic", kind="no start")
    answers[NAMES[7]] = Answer(BAD, "silence", kind="hang")
    assert main([*WORDS, *ENDS]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"first bad: {NAMES[5]}"
    assert f"before: {NAMES[4]} (6.1.150-1): passed on {NAMES[4]}" in lines
    assert f"since:  {NAMES[5]} (6.1.153-1): failed on {NAMES[5]}" in lines
    assert any("git log v6.1.150..v6.1.153 -- arch/x86/kvm virt/kvm" in line for line in lines)
    assert f"skip  {NAMES[3]}: no start: panic" in lines
    assert f"bad   {NAMES[7]}: hang: silence" in lines
    (summary,) = (line for line in lines if " tested: " in line)
    asked = [line for line in lines if line[:6] in ("good  ", "bad   ", "skip  ")]
    assert summary.startswith(f"{len(asked)} tested: ")
    assert summary.endswith("1 skip (hang 1, no start 1)")


def test_steps_are_kept_by_default_and_shown(told, capsys):
    answers, asked = told
    middle = NAMES[3]
    answers[middle] = KeyboardInterrupt()
    assert main([*WORDS, *ENDS]) == 130
    assert "interrupted: --continue goes on" in capsys.readouterr().err
    answers[middle] = Answer(GOOD, "x")
    asked.clear()
    assert main([*WORDS, *ENDS, "--continue"]) == 0
    assert asked[0] == middle
    assert not {NAMES[0], NAMES[-1]} & set(asked)
    path = capsys.readouterr().out.partition("all steps: ")[2].splitlines()[0]
    with open(path) as file:
        first, *steps = [json.loads(line) for line in file]
    assert first["good"] == NAMES[0]
    assert steps[0]["answer"]["evidence"] == f"passed on {NAMES[0]}"
    assert main(["bisect", "log"]) == 0
    out = capsys.readouterr().out
    for step in steps:
        assert f"{step['at']}  {step['answer']['verdict']:4}  {step['name']}: " in out
    assert main(["bisect", "log", "--state", path]) == 0
    assert capsys.readouterr().out == out


def test_another_search_keeps_its_own_steps(told, capsys):
    assert main([*WORDS, *ENDS]) == 0
    assert main([*WORDS, "--good", NAMES[2], "--bad", NAMES[-1]]) == 0
    assert len(list(plan.folder().glob("*.jsonl"))) == 2
    capsys.readouterr()
    assert main([*WORDS, "--good", NAMES[1], "--bad", NAMES[-1], "--continue"]) == 2
    assert "nothing to continue" in capsys.readouterr().err


def test_no_log_yet(told, capsys, tmp_path):
    assert main(["bisect", "log"]) == 2
    assert main(["bisect", "log", "--state", str(tmp_path / "none")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 2
    assert "no search over kernels so far" in error


@pytest.mark.parametrize(
    ("good", "bad", "said"),
    [
        (Answer(BAD, "x"), Answer(BAD, "x"), "is bad, expected good: x"),
        (Answer(BAD, "x"), Answer(GOOD, "y"), "good and bad are swapped"),
        (Answer(GOOD, "x"), Answer(GOOD, "y"), "is good, expected bad: y"),
        (Answer(SKIP, "good, bad", kind="flaky"), Answer(BAD, "y"), "flaky: good, bad"),
    ],
)
def test_ends_in_one_line(told, capsys, good, bad, said):
    answers, _ = told
    answers |= {NAMES[0]: good, NAMES[-1]: bad}
    assert main([*WORDS, *ENDS]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_what_a_step_says(told, capsys):
    answers, _ = told
    answers["6.1"] = Answer(SKIP, "panic", kind="no start")
    assert main(["bisect", "step", "--case", CASE, "--kernel", "6.1"]) == 125
    assert capsys.readouterr().out == "skip: no start: panic\n"


@pytest.mark.parametrize("error", [HarnessError("no disk"), LabSetupError("no bochs")])
def test_a_step_without_an_answer_stops_git_bisect_run(told, capsys, history, error):
    """To git everything up to 127 but 125 would be a verdict on the commit."""
    answers, _ = told
    answers["6.1"] = error
    words = ["bisect", "step", "--case", CASE, "--kernel", "6.1"]
    code = main(words)
    assert capsys.readouterr().err == f"kvmnest: {error}\n"
    assert main(["bisect", "step", "--case", "x", "--repro", "y"]) == code
    run = ["git", "bisect", "run", sys.executable, "-c", f"exit({code})"]
    subprocess.run(["git", "bisect", "start", "HEAD", "HEAD~15"], cwd=history, check=True)
    done = subprocess.run(run, cwd=history, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "first bad commit" not in done.stdout
    log = subprocess.run(["git", "bisect", "log"], cwd=history, capture_output=True, text=True)
    assert log.stdout.count("git bisect bad") + log.stdout.count("git bisect good") == 0


def refused(capsys, spec):
    """What is said of a kernel as both ends: no boot is needed to see that it does not do."""
    words = ["bisect", "--case", CASE, "--kernels", f"{spec},{spec}/", "--good", str(spec)]
    assert main([*words, "--bad", f"{spec}/"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    assert f"{spec} cannot be tested, expected good: no start: " in error
    return error


def test_kernels_that_this_system_can_boot(monkeypatch, tmp_path):
    """Of those that there are: not cloud, installed or in the lists of the system's own apt."""
    every = ["6.1.0-1-amd64", "6.1.0-2-amd64", "6.1.0-2-cloud-amd64", "6.1.0-3-amd64"]
    found = [kernels.Available(name, False, False, "6.1.9-1") for name in every]
    monkeypatch.setattr(kernels, "available", lambda: found)
    monkeypatch.setattr(debian.Apt, "offers", dict.fromkeys([every[0], every[2]]))
    monkeypatch.setattr(kernels, "installed_releases", lambda: [every[3]])
    chosen = plan.choose_kernels(None, "6.1.0-1", "6.1.0-3", here=True)
    assert chosen == [every[0], every[3]]
    with pytest.raises(KernelSpecError, match="for this system's apt"):
        plan.choose_kernels(None, "6.1.0-2", "6.1.0-3", here=True)
    assert kernels.package_version("6.1.0-3") == "6.1.9-1"
    assert kernels.package_version("/some/folder") == ""


def test_a_kernel_without_nested_support(package, own_cache, capsys):
    """kvm_intel of the lab's own kernel, its parameter renamed."""
    (path,) = package.rglob("kvm-intel.ko*")
    whole = decompress(path.read_bytes())
    assert whole.count(b"parmtype=nested:") == 1
    changed = path.with_name("kvm-intel.ko")
    kept = path.read_bytes()
    path.unlink()
    changed.write_bytes(whole.replace(b"parmtype=nested:", b"parmtype=nesteb:"))
    try:
        assert "has no parameter nested" in refused(capsys, package)
    finally:
        changed.unlink()
        path.write_bytes(kept)


def test_a_kernel_without_kvm_intel(package, own_cache, capsys):
    (path,) = package.rglob("kvm-intel.ko*")
    kept = path.read_bytes()
    path.unlink()
    try:
        assert "has no module kvm_intel" in refused(capsys, package)
    finally:
        path.write_bytes(kept)


def test_a_kernel_of_another_architecture(own_cache, capsys, tmp_path):
    (tmp_path / "vmlinux").write_bytes(b"\x7fELF\x02\x01\x01" + bytes(11) + b"\xb7\0" + bytes(200))
    assert "vmlinux" in refused(capsys, tmp_path)


def test_a_package_that_is_no_kernel(own_cache, capsys, tmp_path):
    control = tmp_path / "root" / "DEBIAN" / "control"
    control.parent.mkdir(parents=True)
    control.write_text(
        "Package: x\nVersion: 1\nArchitecture: all\nMaintainer: x <x@x>\nDescription: x\n"
    )
    paths = [tmp_path / "a.deb", tmp_path / "b.deb"]
    for path in paths:
        command = ["dpkg-deb", "--root-owner-group", "-b", tmp_path / "root", path]
        subprocess.run(command, check=True, capture_output=True)
    specs = ",".join(map(str, paths))
    words = ["bisect", "--case", CASE, "--kernels", specs]
    assert main([*words, "--good", str(paths[0]), "--bad", str(paths[1])]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"{paths[0]} cannot be tested" in error
    assert "holds no bzImage" in error
