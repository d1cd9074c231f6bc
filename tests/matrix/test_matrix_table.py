"""What differs between columns, and how a terminal shows it."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matrix_documents import case, column, document, empty

from kvmnest.matrix.cell import merge
from kvmnest.matrix.compare import as_json, changes, differences, ran_nowhere
from kvmnest.matrix.table import lines
from kvmnest.reports.model import OUTCOMES

LADDER = {
    "k1": document(case("a", "passed"), case("b", "passed"), case("z", "passed", 9)),
    "k2": document(case("a", "passed"), case("b", "failed", summary="boom"), case("z", "known", 9)),
    "k3": document(
        *(case("a", "passed"), case("b", "failed"), case("z", "known", 9)),
        case("c", "skipped", detail="needs X\nmore"),
    ),
}


def test_changes_between_neighbours():
    found = [
        (s.left, s.right, [(c.case, c.before, c.after, c.reason) for c in s.changes])
        for s in changes(LADDER)
    ]
    assert found == [
        ("k1", "k2", [("b", "passed", "failed", "boom"), ("z", "passed", "known", "")]),
        ("k2", "k3", [("c", "", "skipped", "needs X")]),
    ]
    assert [name for name, _ in differences(LADDER)] == ["b", "z", "c"]


def test_a_kernel_that_did_not_run_differs_from_none():
    """The neighbours of one that did not boot are compared with each other."""
    documents = {"k1": column(a="passed"), "k2": empty("no kernel"), "k3": column(a="known")}
    (step,) = changes(documents)
    assert (step.left, step.right) == ("k1", "k3")
    same = {"k1": column(a="passed"), "k2": empty("no kernel")}
    assert changes(same) == []
    assert differences(same) == []


def test_the_kernels_last_words():
    """Of a case in which the kernel died, what the kernel said is the reason."""
    died = case(
        "a", "error", summary="crashed: it ended", kernel_log="[ 1.0] kernel BUG at x.c:9!\n"
    )
    documents = {"k1": document(died), "k2": column(a="passed")}
    (step,) = changes(documents)
    assert step.changes[0].reason == "crashed: it ended (kernel BUG at x.c:9!)"


def test_json():
    found = as_json(LADDER)
    assert found["schema"] == 1
    assert found["columns"] == LADDER
    assert found["changes"][1] == {
        "from": "k2",
        "to": "k3",
        "cases": [{"id": "c", "before": "", "after": "skipped", "reason": "needs X"}],
    }


def test_cases_that_ran_nowhere():
    """Skipped in each column that has them; a column without results does not count."""
    documents = {
        "k1": document(case("a", "skipped", detail="needs A"), case("b", "skipped")),
        "k2": empty("no kernel"),
        "k3": document(case("a", "skipped", detail="needs B"), case("b", "known")),
    }
    assert ran_nowhere(documents) == [("a", "needs A")]
    assert as_json(documents)["ran_nowhere"] == [{"id": "a", "reason": "needs A"}]
    text = "\n".join(lines(documents, 80))
    assert "skipped everywhere: 1 case\n  a\n      needs A\n" in text
    assert ran_nowhere(LADDER) == [("c", "needs X")]
    assert "skipped everywhere" not in "\n".join(lines({"k1": LADDER["k1"]}, 80))


def test_lines():
    text = "\n".join(lines(LADDER, 80))
    assert text.startswith("k1 -> k2: 2 cases\n  b: passed -> failed\n      boom\n")
    assert re.search(r"^a .*P P P$", text, re.MULTILINE) is None  # it does not differ
    assert re.search(r"^b +P F F$", text, re.MULTILINE)
    assert re.search(r"^z +P K K$", text, re.MULTILINE)
    assert re.search(r"^c +- - S$", text, re.MULTILINE)
    assert re.search(r"^\* 3 VMXON and VMXOFF +2 +1 1F +1 1F 1S$", text, re.MULTILINE)
    assert re.search(r"^\* 9 VMCLEAR +1 +0 1K +0 1K$", text, re.MULTILINE)
    assert "\x1b" not in text


def test_what_differs_comes_first():
    documents = {
        "k1": document(case("a", "passed", 3), case("b", "passed", 9)),
        "k2": document(case("a", "passed", 3), case("b", "failed", 9)),
    }
    text = "\n".join(lines(documents, 80))
    assert text.index("* 9 VMCLEAR") < text.index("  3 VMXON")


def test_nothing_differs():
    text = "\n".join(lines({"k1": column(a="passed"), "k2": column(a="passed")}, 80))
    assert text.startswith("every case has the same outcome everywhere")
    assert "*  " not in text
    assert next(lines({"k": empty("no kernel")}, 80)) == "nothing ran"


def test_colour_changes_nothing_else():
    plain = "\n".join(lines(LADDER, 80))
    painted = "\n".join(lines(LADDER, 80, colour=True))
    assert painted != plain
    assert re.sub(r"\x1b\[[0-9;]*m", "", painted) == plain


NAMES = st.text("abc.:[]_", min_size=1, max_size=90)


@given(
    st.lists(st.dictionaries(NAMES, st.sampled_from(OUTCOMES), max_size=5), min_size=1, max_size=9),
    st.integers(40, 130),
)
def test_no_line_is_wider_than_the_terminal(columns, width):
    documents = {f"6.12.{n}+deb12-cloud-amd64 ept=0": column(**c) for n, c in enumerate(columns)}
    shown = list(lines(documents, width))
    assert max(len(line) for line in shown) <= width
    text = "".join(line.removeprefix("  ") for line in shown)
    for name, _ in differences(documents):
        assert name in text  # whole, to be copied, if in two lines


@given(st.lists(st.sampled_from(OUTCOMES), max_size=40), st.integers(1, 5))
def test_merging_parts_gives_the_whole(outcomes, parts):
    """Cases are dealt one by one: merged, they stand in their order again."""
    cases = [case(f"c{n}", outcome) for n, outcome in enumerate(outcomes)]
    whole = merge([document(*cases[part::parts]) for part in range(parts)])
    assert whole["cases"] == cases
    assert whole["summary"] == document(*cases)["summary"]
    assert whole["planned"] == len(cases)
    assert whole["complete"]


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_part_that_is_not_complete(lost):
    parts = [document(case(f"c{n}", "passed")) for n in range(3)]
    parts[lost] = document(complete=False, problems=["a worker failed"])
    whole = merge(parts)
    assert not whole["complete"]
    assert whole["problems"] == ["a worker failed"]
    assert len(whole["cases"]) == 2
