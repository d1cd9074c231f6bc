"""A bisection over a real git history: its journal, interruptions, and what is refused."""

import json
import os
import shlex
import sys

import pytest

from kvmnest.bisect import git, journal
from kvmnest.bisect.probe import BAD, GOOD, SKIP, Answer, Question, judge
from kvmnest.cli.main import main
from kvmnest.errors import HarnessError, UsageError
from kvmnest.lab.errors import KernelSpecError, LabSetupError
from kvmnest.reports.model import Case, Run

COMMITS, FIRST_BAD = 16, 11
CASE = "test_vmxon.py"


class Power(Exception):
    """The machine goes down."""


def number_in(folder):
    return int((folder / "number").read_text())


def asker(folder, asked, skip=(), fail_at=None):
    def ask():
        number = number_in(folder)
        if fail_at is not None and len(asked) == fail_at:
            raise Power
        asked.append(number)
        if number in skip:
            return Answer(SKIP, "x", kind="build")
        return Answer(BAD if number >= FIRST_BAD else GOOD, f"saw {number}")

    return ask


def find(folder, ask, good="HEAD~15", bad="HEAD", **more):
    return git.bisect(git.Repository(folder), good, bad, ask, lambda step: None, **more)


def test_each_step_is_in_the_journal_and_head_comes_back(history, git_call):
    asked = []
    found, log = find(history, asker(history, asked))
    assert git.Repository(history).describe(found.first_bad).endswith(f"change {FIRST_BAD}")
    assert git.Repository(history).describe(found.last_good).endswith(f"change {FIRST_BAD - 1}")
    assert git_call(history, "symbolic-ref", "--short", "HEAD") == "topic"
    first, *steps = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert first["came_from"] == "topic"
    assert [step["answer"]["evidence"] for step in steps] == [f"saw {n}" for n in asked]
    assert git_call(history, "status", "--porcelain") == ""


@pytest.mark.parametrize("steps", range(6))
def test_power_loss_before_any_step_asks_nothing_twice(history, steps):
    asked = []
    with pytest.raises(Power):
        find(history, asker(history, asked, fail_at=steps))
    found, _ = find(history, asker(history, asked), go_on=True)
    assert git.Repository(history).describe(found.first_bad).endswith(f"change {FIRST_BAD}")
    assert len(asked) == len(set(asked))


def test_power_loss_between_the_journal_and_git(history):
    asked = []

    def lost(step):
        if len(asked) == 3:
            raise Power

    with pytest.raises(Power):
        git.bisect(git.Repository(history), "HEAD~15", "HEAD", asker(history, asked), lost)
    find(history, asker(history, asked), go_on=True)
    assert len(asked) == len(set(asked))


def test_a_half_written_line_is_cut_off(history, tmp_path):
    asked = []
    state = tmp_path / "steps"
    with pytest.raises(Power):
        find(history, asker(history, asked, fail_at=4), state=state)
    with open(state, "ab") as file:
        file.write(b'{"commit": "12')
    find(history, asker(history, asked), state=state, go_on=True)
    assert all(json.loads(line) for line in state.read_text().splitlines())


@pytest.mark.parametrize("content", ["{}\n", "[]\n", "", "nothing\n"])
def test_what_is_no_journal(tmp_path, content):
    (tmp_path / "steps").write_text(content)
    with pytest.raises(HarnessError, match="not a journal"):
        journal.load(tmp_path / "steps", "q")


def test_the_journal_of_another_search(history):
    asked = []
    with pytest.raises(Power):
        find(history, asker(history, asked, fail_at=2), question="a")
    with pytest.raises(HarnessError, match="another search"):
        find(history, asker(history, asked), question="b", go_on=True)


def test_only_skipped_commits_left(history, git_call):
    with pytest.raises(git.NotBisectable, match="only skipped"):
        find(history, asker(history, [], skip=range(1, 15)))
    assert git_call(history, "symbolic-ref", "--short", "HEAD") == "topic"
    assert not git.Repository(history).bisecting


def test_ends_that_are_not_as_stated(history, git_call):
    asked = []
    with pytest.raises(git.NotBisectable, match="is good, expected bad: saw 5"):
        find(history, asker(history, asked), bad="HEAD~10")
    assert git_call(history, "symbolic-ref", "--short", "HEAD") == "topic"
    with pytest.raises(git.NotBisectable, match="is bad, expected good: saw 12"):
        find(history, asker(history, asked), good="HEAD~3")
    with pytest.raises(git.NotBisectable, match=r"swapped.*--find fix"):
        find(history, lambda: Answer(BAD if number_in(history) < FIRST_BAD else GOOD, "x"))
    asked.clear()
    with pytest.raises(UsageError, match="swapped"):
        find(history, asker(history, asked), good="HEAD", bad="HEAD~15")
    assert asked == []


def test_a_build_that_changes_tracked_files_ends_with_one_line(history):
    def ask():
        number = number_in(history)
        if 0 < number < COMMITS - 1:
            (history / "number").write_text("changed\n")
        return Answer(BAD if number >= FIRST_BAD else GOOD, "x")

    with pytest.raises(HarnessError, match="tracked files"):
        find(history, ask)


def run_cli(history, build, capsys, *more):
    words = ["bisect", "--git", str(history), "--case", CASE, "--build", build]
    code = main([*words, "--good", "HEAD~15", "--bad", "HEAD", *more])
    return code, capsys.readouterr()


def test_a_full_disk_is_no_verdict_on_a_commit(history, capsys):
    code, out = run_cli(history, "cp /etc/passwd /dev/full", capsys)
    assert code == 3
    assert f"no space left for the build in {history}" in out.err
    assert "MiB free" in out.err
    assert out.err.count("\n") == 1


def test_an_end_that_does_not_compile(history, capsys):
    code, out = run_cli(
        history, f"{shlex.quote(sys.executable)} -c 'exit(\"no such type\")'", capsys
    )
    assert code == 2
    assert "cannot be tested, expected good: build: no such type" in out.err
    assert out.err.count("\n") == 1


def test_nothing_to_continue_and_a_dirty_tree(history, capsys):
    assert run_cli(history, "true", capsys, "--continue")[0] == 2
    (history / "number").write_text("dirty\n")
    code, out = run_cli(history, "true", capsys)
    assert code == 2
    assert "uncommitted changes" in out.err
    assert out.err.count("\n") == 1


@pytest.mark.parametrize(
    ("lost", "kind"),
    [({"a": "hang"}, "hang"), ({"a": "crash"}, "crash"), ({"b": "hang"}, "crash"), ({}, "crash")],
)
def test_a_hang_and_a_crash_are_told_apart(lost, kind):
    case = Case("a", 1, "x", "error", 0.1, detail="the guest said nothing for 120 s")
    found = judge(Run("lab", cases=[case], lost=lost))
    assert (found.verdict, found.kind) == (BAD, kind)


def test_a_process_that_is_stuck_in_the_kernel_is_a_hang():
    problem = "process 12 is stuck in the kernel and does not end (see dmesg)"
    name = "test_a.py::test_b"
    found = judge(Run("kvm", running=name, problems=[problem], lost={name: "hang"}))
    assert found == Answer(BAD, f"test_a.py::test_b: {problem}", kind="hang")
    assert judge(Run("kvm", problems=["no space left"])).verdict == SKIP


class Told(Question):
    """A question whose single runs are told in advance."""

    def _once(self, *_):
        item = TOLD.pop(0)
        if isinstance(item, Exception):
            raise item
        return item


TOLD = []


def test_runs_that_do_not_agree_and_what_is_no_fault_of_the_kernel():
    question = Told(CASE, {}, 3)
    TOLD[:] = [Answer(GOOD, "a"), Answer(BAD, "b"), Answer(GOOD, "a")]
    found = question.ask(None)
    assert (found.verdict, found.kind) == (SKIP, "flaky")
    TOLD[:] = [HarnessError("the cases' process did not start (panic)")]
    assert question.ask(None).kind == "no start"
    TOLD[:] = [KernelSpecError("no kvm_intel")]
    assert question.ask(None).verdict == SKIP
    TOLD[:] = [LabSetupError("no space left on the disk while preparing kernels")]
    with pytest.raises(LabSetupError, match="no space"):
        question.ask(None)


def test_the_journal_is_private(history):
    _, log = find(history, asker(history, []))
    assert os.stat(log.path).st_mode & 0o077 == 0


@pytest.mark.parametrize(
    "content",
    [
        b"my notes, without a newline at their end",
        b"line\nnotes",
        b"",
        b"\xff\xfe\n",
        b"[" * 100_000 + b"\n",
        b"{}\n",
        b"[]\n",
        b"7\nx",
    ],
    ids=range(8),
)
def test_a_file_that_is_no_journal_stays_as_it_is(tmp_path, content):
    path = tmp_path / "notes"
    path.write_bytes(content)
    with pytest.raises(HarnessError, match="not a journal of kvmnest bisect"):
        journal.load(path)
    assert path.read_bytes() == content


def test_a_damaged_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "j"
    started = journal.start(path, journal.Header("a", "b", "c"))
    for name in ("one", "two"):
        started.add(name, "", Answer(GOOD, "x"))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"\x00\x00\n" + lines[2])
    with pytest.raises(HarnessError, match="line 2 is not a journal"):
        journal.load(path)


def test_a_journal_that_is_a_fifo(tmp_path):
    os.mkfifo(tmp_path / "j")
    with pytest.raises(HarnessError, match="no regular file"):
        journal.load(tmp_path / "j")
