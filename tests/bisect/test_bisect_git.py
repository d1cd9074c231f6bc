"""A planted bug is found in a git history of Debian's KVM source, with real builds and boots."""

import shutil
import subprocess
import sys

import pytest

from kvmnest.bisect.git import Repository
from kvmnest.cli.main import main
from kvmnest.errors import UsageError
from kvmnest.kernel import source
from kvmnest.lab import kernels
from kvmnest.mutants import catalogue

COMMITS = 12
PLANTED, BROKEN_BUILD = 8, 6


def git(folder, *arguments):
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.invalid"]
    done = subprocess.run(
        ["git", *identity, *arguments], cwd=folder, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@pytest.fixture(params=["6.1", "newest"])
def kernel(request):
    """SPEC of the kernel whose source the history is of."""
    return request.param


@pytest.fixture
def history(tmp_path, kernel):
    """A work tree with COMMITS commits; one brings a bug, one does not compile."""
    release = kernels.resolve(kernel).release
    folder = tmp_path / "linux"
    shutil.copytree(source.prepare(release).tree, folder)
    mutant = next(m for m in catalogue.load() if m.id == "resume-clear")
    nested = folder / mutant.edit.file
    git(folder, "init", "-q")
    for number in range(COMMITS):
        subject = f"comment {number}"
        text = nested.read_text()
        if number == PLANTED:
            text, subject = (
                mutant.edit_for(release).apply(text),
                "KVM: nVMX: relax the launch-state check",
            )
        if number == BROKEN_BUILD:
            text += "\n#error not yet\n"
        if number == BROKEN_BUILD + 1:
            text = text.replace("\n#error not yet\n", "")
        nested.write_text(f"{text}/* change {number} */\n")
        git(folder, "add", "-A")
        git(folder, "commit", "-q", "-m", subject)
    return folder


def test_the_planted_bug_is_found(history, kernel, capsys):
    build = f"{sys.executable} -m kvmnest build . out --kernel {kernel}"
    code = main(
        [
            *("bisect", "--git", str(history), "--good", f"HEAD~{COMMITS - 1}", "--bad", "HEAD"),
            *("--build", build, "--kernel", kernel, "--kvm-modules", "out"),
            *("--case", "test_vmlaunch_vmresume.py::test_vmresume_of_clear_vmcs"),
        ]
    )
    out = capsys.readouterr().out
    assert code == 0, out
    last = out.splitlines()[-1]
    assert last.startswith("first bad commit: ")
    assert last.endswith("KVM: nVMX: relax the launch-state check")
    assert "bad   " in out
    assert "good  " in out
    assert not Repository(history).bisecting


@pytest.mark.parametrize("kernel", ["6.1"], indirect=True)
def test_a_commit_that_does_not_compile_is_one_line(history, capsys):
    git(history, "checkout", "-q", f"HEAD~{COMMITS - 1 - BROKEN_BUILD}")
    assert main(["build", str(history), str(history / "out")]) == 1
    error = capsys.readouterr().err
    assert "not yet" in error
    assert error.count("\n") == 2  # that it compiles, and why it does not


def test_a_dirty_tree_and_wrong_revisions(tmp_path):
    git(tmp_path, "init", "-q")
    (tmp_path / "a").write_text("1")
    git(tmp_path, "add", "a")
    git(tmp_path, "commit", "-q", "-m", "one")
    (tmp_path / "a").write_text("2")
    repository = Repository(tmp_path)
    with pytest.raises(UsageError, match="uncommitted changes"):
        repository.require_clean()
    git(tmp_path, "commit", "-qam", "two")
    with pytest.raises(UsageError, match="no revision nowhere"):
        repository.commit("nowhere")
    with pytest.raises(UsageError, match="swapped"):
        repository.start("HEAD", "HEAD~1")
    with pytest.raises(UsageError, match="not a git work tree"):
        Repository(tmp_path.parent)
