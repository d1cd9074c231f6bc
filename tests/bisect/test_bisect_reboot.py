"""Bisections by restarts on a simulated machine whose power fails at every moment in turn."""

import json
import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reboot_sim import CRASH, DEAD, HOME, PowerLost, Sim, live, watched

from kvmnest.bisect.plan import Plan
from kvmnest.bisect.probe import BAD, GOOD, SKIP, Answer
from kvmnest.bisect.reboot import session, state
from kvmnest.bisect.reboot.state import Trial
from kvmnest.bisect.reboot.trial import MOST_BOOTS, TRIES, decide
from kvmnest.errors import HarnessError, UsageError

NAMES = [f"6.1.0-{number}-amd64" for number in range(40, 48)]
FIRST_BAD = 5
CASE = "test_vmxon.py"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No look into apt, and no wait for a disk that does not fail."""
    monkeypatch.setattr("kvmnest.bisect.over.package_version", lambda name: "")
    monkeypatch.setattr("os.fsync", lambda fd: None)


def outcomes(first_bad=FIRST_BAD, **other):
    told = {name: BAD if i >= first_bad else GOOD for i, name in enumerate(NAMES)}
    return told | {NAMES[int(key[1:])]: value for key, value in other.items()}


def plan(**more):
    return Plan(**{"case": CASE, "params": {}, "kernels": NAMES, **more})


def begin(sim, **more):
    options = {"keep_kernels": False, "stay": False}
    options |= {name: more.pop(name) for name in list(more) if name in options}
    return lambda: session.begin(sim.folder, plan(**more), sim, **options)


def bisect(tmp_path, monkeypatch, told, cuts=(), **more):
    """A whole bisection; returns (sim, exit code, lines of the result, all that was said)."""
    said = []
    with monkeypatch.context() as patch:
        sim = Sim(tmp_path, told, cuts)
        watched(sim, patch)
        code = live(sim, begin(sim, **more), said.append)
    return sim, code, state.load(tmp_path).result, said


def require_as_found(sim):
    assert sim.kernel == HOME
    assert sim.menu == {HOME}
    assert (sim.saved, sim.parameters, sim.next, sim.unit) == ("0", None, None, None)


def test_a_whole_bisection(tmp_path, monkeypatch):
    sim, code, result, said = bisect(tmp_path, monkeypatch, outcomes())
    assert code == 0
    assert result[-1] == f"first bad: {NAMES[FIRST_BAD]}"
    assert f"before: {NAMES[FIRST_BAD - 1]}: good on {NAMES[FIRST_BAD - 1]}" in result
    assert said[-len(result) :] == result
    assert (tmp_path / "result.txt").read_text().splitlines() == result
    assert len(sim.tested) == len(set(sim.tested)) == 5
    require_as_found(sim)
    assert state.load(tmp_path).phase == state.DONE


@pytest.mark.parametrize("first_bad", range(1, len(NAMES)))
def test_each_place_is_found(tmp_path, monkeypatch, first_bad):
    sim, code, result, _ = bisect(tmp_path, monkeypatch, outcomes(first_bad))
    assert (code, result[-1]) == (0, f"first bad: {NAMES[first_bad]}")
    require_as_found(sim)


def test_power_loss_at_every_moment(tmp_path, monkeypatch):
    """Each write and each change of the machine, before and after it."""
    told = outcomes(k2=DEAD, k6=CRASH)
    (tmp_path / "whole").mkdir()
    whole, code, result, _ = bisect(tmp_path / "whole", monkeypatch, told)
    assert code == 0
    assert whole.events > 100
    for cut in range(1, whole.events + 1):
        folder = tmp_path / str(cut)
        folder.mkdir()
        sim, code, again, _ = bisect(folder, monkeypatch, told, {cut})
        assert (code, again[-1]) == (0, result[-1]), cut
        names = [line.split()[1] for line in again if line.startswith(("before", "since"))]
        assert names == [f"{NAMES[FIRST_BAD - 1]}:", f"{NAMES[FIRST_BAD]}:"], cut
        require_as_found(sim)


def test_a_kernel_that_was_not_chosen_yet_has_not_failed_to_boot(tmp_path):
    """The power fails before the choice of the next boot, as often as a kernel is tried."""
    sim = Sim(tmp_path, outcomes())
    real, losses = sim.choose, []

    def choose(release):
        if len(losses) < TRIES:
            losses.append(release)
            raise PowerLost
        real(release)

    sim.choose = choose
    said = []
    assert live(sim, begin(sim), said.append) == 0
    assert losses == [NAMES[0]] * TRIES
    assert not [line for line in said if "did not come up" in line]


@settings(
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_any_kernels_and_several_losses(tmp_path_factory, monkeypatch, data):
    first_bad = data.draw(st.integers(1, len(NAMES) - 1))
    told = {
        name: data.draw(st.sampled_from([BAD, BAD, CRASH, DEAD, "gone"]))
        if i > first_bad
        else data.draw(st.sampled_from([GOOD, GOOD, DEAD]))
        for i, name in enumerate(NAMES)
    }
    told |= {NAMES[0]: GOOD, NAMES[-1]: data.draw(st.sampled_from([BAD, CRASH]))}
    told[NAMES[first_bad]] = data.draw(st.sampled_from([BAD, CRASH]))
    cuts = data.draw(st.sets(st.integers(1, 250), max_size=6))
    folder = tmp_path_factory.mktemp("state")
    sim, code, result, _ = bisect(folder, monkeypatch, told, cuts)
    assert (code, result[-1]) == (0, f"first bad: {NAMES[first_bad]}")
    require_as_found(sim)


def test_a_kernel_that_does_not_boot(tmp_path, monkeypatch):
    told = outcomes(k4=DEAD, k5=DEAD)
    sim, code, result, said = bisect(tmp_path, monkeypatch, told)
    assert code == 0
    assert result[-1] == f"first bad: {NAMES[6]}"
    assert f"not tested in between: {NAMES[4]}, {NAMES[5]}" in result
    assert f"skip  {NAMES[4]}: no start: {TRIES} boots ended in {HOME}" in said
    assert any("skip (no start 2)" in line for line in result)
    assert NAMES[4] not in sim.tested


def test_a_crash_in_the_case(tmp_path, monkeypatch):
    sim, code, result, said = bisect(tmp_path, monkeypatch, outcomes(k5=CRASH))
    assert (code, result[-1]) == (0, f"first bad: {NAMES[5]}")
    assert f"bad   {NAMES[5]}: crash: the machine went down in 2 of 2 runs" in said
    assert sim.tested.count(NAMES[5]) == 2


def test_a_crash_that_comes_and_goes_is_flaky(tmp_path, monkeypatch):
    told = outcomes(k3=[CRASH, GOOD, CRASH])
    _, code, result, said = bisect(tmp_path, monkeypatch, told)
    assert (code, result[-1]) == (0, f"first bad: {NAMES[5]}")
    assert f"skip  {NAMES[3]}: flaky: good, crash, crash" in said


def test_runs_that_must_agree(tmp_path, monkeypatch):
    told = outcomes() | {name: [BAD] * 3 if i >= 5 else [GOOD] * 3 for i, name in enumerate(NAMES)}
    told[NAMES[3]] = [GOOD, GOOD, BAD]
    sim, code, result, said = bisect(tmp_path, monkeypatch, told, repeat=3)
    assert (code, result[-1]) == (0, f"first bad: {NAMES[5]}")
    assert f"skip  {NAMES[3]}: flaky: good, good, bad" in said
    assert sim.tested.count(NAMES[5]) == 3


def test_a_kernel_that_left_the_archive(tmp_path, monkeypatch):
    _, code, result, said = bisect(tmp_path, monkeypatch, outcomes(k3="gone"))
    assert (code, result[-1]) == (0, f"first bad: {NAMES[5]}")
    assert any("no start: this system's apt has no linux-image-6.1.0-43-amd64" in s for s in said)


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({name: GOOD for name in NAMES}, "is good, expected bad"),
        ({name: GOOD for name in NAMES} | {NAMES[0]: BAD}, "good and bad are swapped"),
        (outcomes(k0=DEAD), "cannot be tested, expected good: no start"),
    ],
)
def test_ends_that_are_not_as_stated(tmp_path, monkeypatch, told, said):
    sim, code, result, _ = bisect(tmp_path, monkeypatch, told)
    assert code == 2
    (line,) = result
    assert said in line
    require_as_found(sim)


def test_a_fix_is_found(tmp_path, monkeypatch):
    told = {name: GOOD if i >= 5 else BAD for i, name in enumerate(NAMES)}
    _, code, result, _ = bisect(tmp_path, monkeypatch, told, find="fix")
    assert (code, result[-1]) == (0, f"fixed: {NAMES[5]}")


def test_kernels_that_stay(tmp_path, monkeypatch):
    sim, *_ = bisect(tmp_path, monkeypatch, outcomes(), keep_kernels=True)
    assert sim.menu == {HOME, *sim.tested}
    (tmp_path / "b").mkdir()
    sim, *_, said = bisect(tmp_path / "b", monkeypatch, outcomes(), stay=True)
    assert sim.kernel == sim.tested[-1]
    assert sim.menu == {HOME, sim.kernel}
    assert f"{sim.kernel} stays installed, since it runs" in said
    assert (sim.unit, sim.parameters) == (None, None)


def test_what_was_installed_before_is_not_removed(tmp_path, monkeypatch):
    sim = Sim(tmp_path, outcomes())
    sim.menu |= {NAMES[0], NAMES[3]}
    live(sim, begin(sim))
    assert sim.menu == {HOME, NAMES[0], NAMES[3]}


def test_the_kernel_at_home_is_booted_anew_before_it_is_tested(tmp_path):
    """The boot in which it all begins has a used machine and not our parameters."""
    names = [HOME, *NAMES[6:]]
    sim = Sim(tmp_path, {HOME: GOOD, NAMES[6]: BAD, NAMES[7]: BAD})
    live(sim, begin(sim, kernels=names))
    assert sim.tested[0] == HOME
    assert state.load(tmp_path).result[-1] == f"first bad: {NAMES[6]}"
    require_as_found(sim)


def test_a_full_disk_stops_and_goes_on_later(tmp_path):
    sim = Sim(tmp_path, outcomes())
    sim.full = True
    with pytest.raises(HarnessError, match="free space"):
        live(sim, begin(sim))
    assert state.load(tmp_path).phase == state.SEARCH
    sim.full = False
    assert live(sim, None) == 0
    require_as_found(sim)


def test_a_menu_that_keeps_its_choice_ends_it(tmp_path):
    sim = Sim(tmp_path, outcomes())
    sim.clears_choice = False
    with pytest.raises(HarnessError, match="did not take back its choice"):
        live(sim, begin(sim))
    assert sim.next is None


def test_a_kernel_is_not_restarted_for_ever(tmp_path):
    """Something restarts the machine before the unit can tell: other kernels come up each time."""
    sim = Sim(tmp_path, outcomes())
    found = begin(sim)()
    found.phase, found.trial = state.SEARCH, Trial(NAMES[0], state.BOOT, NAMES[0], boots=MOST_BOOTS)
    sim.menu.add(NAMES[0])
    sim.parameters = session.parameters(found.plan)
    sim.saved = HOME
    sim.start()
    sim.unit = session.unit_arguments(tmp_path)
    said = []
    found.save()
    live(sim, None, said.append)
    assert f"skip  {NAMES[0]}: no start: given up after {MOST_BOOTS} restarts" in said


def test_a_restart_that_has_not_happened_is_asked_for_again(tmp_path):
    sim = Sim(tmp_path, outcomes())
    found = begin(sim)()
    said = []
    for _ in range(2):
        with pytest.raises(session.RebootNeeded) as needed:
            session.go_on(found, sim, said.append)
        assert needed.value.into == NAMES[0]
    assert f"the restart into {NAMES[0]} has not happened yet: once more" in said
    assert found.trial.boots == 1


def test_a_test_that_is_interrupted_in_the_same_boot_is_no_crash(tmp_path):
    sim = Sim(tmp_path, outcomes())
    real, sim.test = sim.test, None

    def interrupted(question):
        sim.test = real
        raise KeyboardInterrupt

    sim.test = interrupted
    with pytest.raises(KeyboardInterrupt):
        live(sim, begin(sim))
    assert state.load(tmp_path).trial.phase == state.TEST
    assert live(sim, None) == 0
    assert sim.tested[0] == NAMES[0]
    assert sim.tested.count(NAMES[0]) == 1


def test_given_up(tmp_path):
    sim = Sim(tmp_path, outcomes())
    with pytest.raises(session.RebootNeeded):
        session.go_on(begin(sim)(), sim, print)
    sim.start()
    with pytest.raises(UsageError, match="not over"):
        begin(sim)()
    found = state.load(tmp_path)
    session.stop(found)
    assert live(sim, None) == 0
    assert state.load(tmp_path).result == ["given up"]
    require_as_found(sim)
    assert begin(sim)().phase == state.PREPARE


def test_given_up_before_a_restart_that_was_arranged(tmp_path):
    sim = Sim(tmp_path, outcomes())
    with pytest.raises(session.RebootNeeded):
        session.go_on(begin(sim)(), sim, print)
    found = state.load(tmp_path)
    session.stop(found)
    assert session.go_on(found, sim, print) == 0
    require_as_found(sim)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"schema": 0}', '{"schema": 1}'])
def test_a_damaged_state(tmp_path, content):
    (tmp_path / "state.json").write_text(content)
    with pytest.raises(HarnessError, match=r"not a state of kvmnest bisect"):
        state.load(tmp_path)


def test_the_state_is_private_and_held_by_one(tmp_path):
    folder = tmp_path / "a" / "b"
    with state.locked(folder):
        assert folder.stat().st_mode & 0o077 == 0
        with pytest.raises(UsageError, match="at work"), state.locked(folder):
            pass
    with state.locked(folder):
        begin(Sim(folder, {}))()
    assert (folder / "state.json").stat().st_mode & 0o077 == 0
    assert json.loads((folder / "state.json").read_text())["plan"]["kernels"] == NAMES


def test_a_folder_that_others_can_replace(tmp_path):
    """Its commands are run as root."""
    for mode, fails in ((0o777, True), (0o770, True), (0o1777, False), (0o755, False)):
        tmp_path.chmod(mode)
        if fails:
            with (
                pytest.raises(HarnessError, match=f"{tmp_path} can be changed by other users"),
                state.locked(tmp_path / "state"),
            ):
                pass
        else:
            with state.locked(tmp_path / "state"):
                pass


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a folder away")
def test_a_folder_of_somebody_else(tmp_path):
    os.chown(tmp_path, 65534, 65534)
    with pytest.raises(HarnessError, match="by other users"), state.locked(tmp_path / "state"):
        pass


def test_parameters_of_every_boot():
    given = plan(params={"ept": "0", "kvm.tdp_mmu": "0"})
    assert session.parameters(given) == [
        "panic=10", "kvm_intel.nested=1", "kvm_intel.ept=0", "kvm.tdp_mmu=0",
    ]  # fmt: skip


G, B, S = Answer(GOOD, "g"), Answer(BAD, "b"), Answer(SKIP, "s", kind="no start")


@pytest.mark.parametrize(
    ("runs", "lost", "repeat", "verdict", "kind"),
    [
        ([], 0, 1, None, ""),
        ([G], 0, 1, GOOD, ""),
        ([B], 0, 1, BAD, ""),
        ([S], 0, 1, SKIP, "no start"),
        ([G, G], 0, 3, None, ""),
        ([G, B], 0, 3, SKIP, "flaky"),
        ([G, G, G], 0, 3, GOOD, ""),
        ([], 1, 1, None, ""),  # the power?
        ([G], 1, 1, None, ""),
        ([G, G], 1, 1, GOOD, ""),
        ([G, B], 1, 1, SKIP, "flaky"),
        ([B], 1, 1, BAD, "crash"),
        ([], 2, 1, BAD, "crash"),
        ([G], 2, 1, SKIP, "flaky"),
        ([], 1, 3, None, ""),
        ([G], 1, 3, SKIP, "flaky"),
        ([B, B], 1, 3, BAD, "crash"),
    ],
)
def test_what_runs_mean(runs, lost, repeat, verdict, kind):
    answer = decide(Trial("k", runs=runs, lost=lost), repeat)
    assert (answer and answer.verdict, answer.kind if answer else "") == (verdict, kind)


def test_the_acted_power_really_fails(tmp_path, monkeypatch):
    sim = Sim(tmp_path, outcomes(), {3})
    watched(sim, monkeypatch)
    with pytest.raises(PowerLost):
        session.go_on(begin(sim)(), sim, print)
