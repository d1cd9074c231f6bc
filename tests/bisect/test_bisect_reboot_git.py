"""Bisections by restarts over a real git history, with real commands that build and install."""

import os
import sys

import pytest
from reboot_sim import CRASH, DEAD, HOME, Sim, live, watched

from kvmnest.bisect import git
from kvmnest.bisect.plan import Plan
from kvmnest.bisect.probe import BAD, GOOD
from kvmnest.bisect.reboot import session, state
from kvmnest.errors import HarnessError, UsageError

CASE = "test_vmxon.py"
FIRST_BAD = 11
# Called as build, release and install; "vmlinuz" is what is built.
KERNEL = """
import os, pathlib, sys
tag = os.environ["LOCALVERSION"]
number = int(open("number").read())
what, boot = sys.argv[1], pathlib.Path(sys.argv[2])
if what == "build":
    if number in BROKEN:
        sys.exit("a.c:1:1: error: no such type")
    pathlib.Path(".git/vmlinuz").write_text(f"6.12.0{tag} {number}")
elif what == "release":
    print(pathlib.Path(".git/vmlinuz").read_text().split()[0])
else:
    release, built = pathlib.Path(".git/vmlinuz").read_text().split()
    assert int(built) == number, "installed what was not built"
    (boot / release).write_text(built)
"""


class Boot(Sim):
    """Its menu is the folder into which the kernels are installed."""

    def __init__(self, folder, boot, told, cuts=()):
        super().__init__(folder, {}, cuts)
        self.folder_of_kernels = boot
        self.told = told

    def _look(self):
        for path in self.folder_of_kernels.iterdir():
            self.menu.add(path.name)
            number = int(path.read_text())
            self.outcomes[path.name] = self.told.get(number, BAD if number >= FIRST_BAD else GOOD)

    def has(self, release):
        self._look()
        return super().has(release)

    def remove(self, release):
        super().remove(release)
        (self.folder_of_kernels / release).unlink(missing_ok=True)


@pytest.fixture
def world(history, tmp_path, monkeypatch):
    """Makes (sim, begin) for what kernels do, which do not build, and where power is lost."""
    monkeypatch.setattr("os.fsync", lambda fd: None)
    boot, script = tmp_path / "boot", tmp_path / "kernel.py"
    boot.mkdir()

    def make(name, told=None, broken=(), cuts=(), good="HEAD~15", kernel=KERNEL):
        script.write_text(f"BROKEN = {broken!r}\n{kernel}")
        words = [f"{sys.executable} {script} {what} {boot}" for what in ("build", "release", "in")]
        plan = Plan(
            case=CASE, params={}, good=good, bad="HEAD", git=str(history),
            build=words[0], release=words[1], install=words[2],
        )  # fmt: skip
        folder = tmp_path / name
        folder.mkdir()
        sim = Boot(folder, boot, told or {}, cuts)

        def begin():
            return session.begin(folder, plan, sim, keep_kernels=False, stay=False)

        return sim, begin

    return make


def require_as_found(sim, history, git_call):
    assert git_call(history, "symbolic-ref", "--short", "HEAD") == "topic"
    assert not git.Repository(history).bisecting
    assert list(sim.folder_of_kernels.iterdir()) == []
    assert (sim.kernel, sim.menu) == (HOME, {HOME})
    assert (sim.unit, sim.parameters, sim.next) == (None, None, None)


def test_a_commit_is_found(world, history, git_call):
    sim, begin = world("a", told={7: DEAD, 12: CRASH}, broken=(6, 8))
    said = []
    assert live(sim, begin, said.append) == 0
    result = state.load(sim.folder).result
    assert result[-1].startswith("first bad commit: ")
    assert result[-1].endswith(f" change {FIRST_BAD}")
    assert any(": build: a.c:1:1: error: no such type" in line for line in said)
    assert any(f" change 7: no start: 2 boots ended in {HOME}" in line for line in said)
    assert any(" change 12: crash: the machine went down" in line for line in said)
    require_as_found(sim, history, git_call)


def test_power_loss_now_and_then(world, history, git_call, monkeypatch):
    """Every eleventh moment, which over all kernels meets each kind of them."""
    sim, begin = world("whole")
    with monkeypatch.context() as patch:
        watched(sim, patch)
        live(sim, begin)
    for cut in range(1, sim.events + 1, 11):
        again, begin = world(str(cut), cuts={cut})
        with monkeypatch.context() as patch:
            watched(again, patch)
            assert live(again, begin) == 0
        assert state.load(again.folder).result[-1].endswith(f" change {FIRST_BAD}"), cut
        require_as_found(again, history, git_call)


def test_half_a_checkout_is_undone(world, history, git_call):
    """What a git leaves that was cut by the power: its lock, and files of another commit."""
    sim, begin = world("a")
    for _ in range(3):
        with pytest.raises(session.RebootNeeded):
            session.go_on(state.load(sim.folder) or begin(), sim, print)
        sim.start()
    lock = history / ".git" / "index.lock"
    lock.write_text("")
    os.utime(lock, (1, 1))
    (history / "number").write_text("half")
    assert live(sim, None) == 0
    assert state.load(sim.folder).result[-1].endswith(f" change {FIRST_BAD}")
    require_as_found(sim, history, git_call)


def test_the_lock_of_a_git_at_work_is_left_alone(history):
    lock = history / ".git" / "index.lock"
    lock.write_text("")
    (history / "number").write_text("mine")
    git.Repository(history).repair()
    assert lock.exists()
    assert (history / "number").read_text() == "mine"


def test_given_up_in_the_middle(world, history, git_call):
    sim, begin = world("a")
    for _ in range(3):
        with pytest.raises(session.RebootNeeded):
            session.go_on(state.load(sim.folder) or begin(), sim, print)
        sim.start()
    assert git.Repository(history).bisecting
    found = state.load(sim.folder)
    session.stop(found)
    live(sim, None)
    require_as_found(sim, history, git_call)


def test_a_build_that_ignores_the_tag(world):
    sim, begin = world("a", kernel=KERNEL.replace("6.12.0{tag}", "6.12.0"))
    with pytest.raises(UsageError, match=r"not this commit's own.*LOCALVERSION=-kvmnest-"):
        live(sim, begin)


def test_commands_that_fail(world):
    sim, begin = world("a", kernel=KERNEL.replace("assert int(built) == number", "assert 0"))
    with pytest.raises(HarnessError, match="failed: AssertionError"):
        live(sim, begin)
    assert sim.kernel == HOME
    sim, begin = world("b", kernel=KERNEL.replace("print(", "print('no release', "))
    with pytest.raises(UsageError, match="does not say the release"):
        live(sim, begin)


def test_a_dirty_tree_and_swapped_ends(world, history):
    sim, begin = world("a", good="nowhere")
    with pytest.raises(UsageError, match="no revision nowhere"):
        begin()
    (history / "number").write_text("dirty\n")
    sim, begin = world("b")
    with pytest.raises(UsageError, match="uncommitted changes"):
        begin()
    assert state.load(sim.folder) is None
