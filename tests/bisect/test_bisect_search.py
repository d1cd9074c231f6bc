"""The search over a list: its ends, what cannot be tested, its state on disk."""

import pytest

from kvmnest.bisect.journal import Header, load, start
from kvmnest.bisect.probe import BAD, GOOD, SKIP, Answer, judge
from kvmnest.bisect.search import NotBisectable, search
from kvmnest.cli.main import main
from kvmnest.reports.model import Case, Run

NAMES = [f"k{number}" for number in range(16)]


HEADER = Header("q", NAMES[0], NAMES[-1])


@pytest.fixture
def journal(tmp_path):
    return start(tmp_path / "steps", HEADER)


def run(verdicts, journal):
    asked = []

    def ask(name):
        asked.append(name)
        return Answer(verdicts[name], "seen", name)

    found = search(NAMES, ask, journal, lambda step: None)
    return found, asked


@pytest.mark.parametrize("first_bad", range(1, 16))
def test_each_place_is_found(first_bad, journal):
    verdicts = {name: BAD if i >= first_bad else GOOD for i, name in enumerate(NAMES)}
    found, asked = run(verdicts, journal)
    assert (found.last_good, found.first_bad) == (f"k{first_bad - 1}", f"k{first_bad}")
    assert len(asked) <= 6
    assert found.skipped == ()


def test_kernels_that_cannot_be_tested_are_named(journal):
    verdicts = {name: BAD if i >= 8 else GOOD for i, name in enumerate(NAMES)}
    verdicts |= {"k7": SKIP, "k8": SKIP}
    found, _ = run(verdicts, journal)
    assert (found.last_good, found.first_bad, found.skipped) == ("k6", "k9", ("k7", "k8"))


@pytest.mark.parametrize(
    ("first", "last", "said"),
    [
        (BAD, GOOD, "swapped"),
        (BAD, BAD, "k0 is bad, expected good"),
        (GOOD, GOOD, "k15 is good, expected bad"),
        (SKIP, BAD, "k0 cannot be tested"),
    ],
)
def test_ends_that_are_not_as_stated(first, last, said, journal):
    verdicts = dict.fromkeys(NAMES, GOOD) | {"k0": first, "k15": last}
    with pytest.raises(NotBisectable, match=said) as caught:
        run(verdicts, journal)
    assert caught.value.exit_code == 2


def test_a_search_goes_on_from_its_journal(journal):
    verdicts = {name: BAD if i >= 5 else GOOD for i, name in enumerate(NAMES)}
    _, first = run(verdicts, journal)
    # As if the machine had gone down before the last two answers.
    lines = journal.path.read_text().splitlines(keepends=True)
    journal.path.write_text("".join(lines[:-2]))
    found, second = run(verdicts, load(journal.path, "q"))
    assert found.first_bad == "k5"
    assert second == first[-2:]


@pytest.mark.parametrize(
    ("outcome", "verdict"),
    [("passed", GOOD), ("failed", BAD), ("error", BAD), ("known", BAD), ("skipped", SKIP)],
)
def test_what_an_outcome_means(outcome, verdict):
    found = judge(Run("lab", cases=[Case("a", 1, "x", outcome, 0.1, detail="why")]))
    assert found.verdict == verdict


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--good", "6.1", "--bad", "6.12"], "one of --case and --repro"),
        (["--case", "test_vmxon.py"], "--good and --bad"),
        (["--case", "x", "--good", "a", "--bad", "b", "--kernels", "c,d"], "must hold"),
        (["--case", "x", "--good", "a", "--bad", "b", "--git", "/"], "--build"),
        (["--repro", "nothing", "--good", "a", "--bad", "b"], "no reproducer nothing"),
        (["leap", "--case", "x"], "unexpected: leap"),
    ],
)
def test_usage(words, said, capsys):
    assert main(["bisect", *words]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
