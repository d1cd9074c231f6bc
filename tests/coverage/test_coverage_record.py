"""Coverage as data: counted, kept, joined and compared."""

import json

import pytest

from kvmnest.cli.main import main
from kvmnest.coverage import record as records
from kvmnest.coverage import text
from kvmnest.errors import HarnessError, UsageError

NESTED = "arch/x86/kvm/vmx/nested.c"


@pytest.mark.parametrize("of_line_13", [("", "b"), ("b", ""), ("b", "c")])
def test_a_line_is_covered_by_any_of_its_blocks(record, of_line_13):
    source = record("a", *of_line_13, "", "", "").sources[NESTED]
    assert source.by_line() == {11: "a", 13: "b", 15: "", 21: "", 22: ""}
    assert source.by_function() == {"enter": {11: "a", 13: "b", 15: ""}, "leave": {21: "", 22: ""}}


def test_a_line_before_every_function_is_kept(record):
    source = record("a", "", lines=(3, 11)).sources[NESTED]
    assert source.by_function() == {"(before the first function)": {3: "a"}, "enter": {11: ""}}


def test_summary(record):
    lines = list(text.summary(record("a", "", "b", "", "", "")))
    assert lines == [
        "coverage of 7.3.4-amd64 (7.3.4-1)",
        f"{NESTED}  lines 40.0 % (2/5)  blocks 33.3 % (2/6)  functions 1/2",
    ]


def test_nearly_all_is_not_all():
    assert text.percent(1999, 2000) == "99.9 %"
    assert text.percent(2000, 2000) == "100.0 %"
    assert text.percent(0, 0) == "-"


def test_missing_names_ranges_without_covered_lines_in_them(record):
    found = record("", "", "", "x", "", "y", "", lines=(11, 12, 13, 14, 15, 21, 22))
    assert list(text.missing(found)) == [
        f"{NESTED}: enter 1/5, not 11-13, 15",
        f"{NESTED}: leave 1/2, not 22",
    ]


def test_runs_are_joined_and_the_first_keeps_its_lines(record):
    whole = record("a", "", "", "", "", "a")
    whole.add(record("b", "b", "", "", "", ""))
    assert whole.sources[NESTED].first == ["a", "b", "", "", "", "a"]


def test_sources_that_only_one_run_watched_are_kept(record):
    whole, other = record("a", "", "", "", "", ""), record("b", "", "", "", "", "")
    other.sources = {"arch/x86/kvm/x86.c": other.sources[NESTED]}
    whole.add(other)
    assert [source.first[0] for source in whole.sources.values()] == ["a", "b"]


def test_what_is_new(record):
    old, new = record("a", "", "a", "", "", ""), record("b", "b", "", "c", "c", "")
    assert new.new_against(old) == {NESTED: {"enter": {15: "c"}, "leave": {21: "c"}}}
    assert list(text.news(new, old)) == [
        "new: 2 lines",
        f"{NESTED}: enter 15, by c",
        f"{NESTED}: leave 21, by c",
    ]


@pytest.mark.parametrize("join", [records.Record.add, records.Record.new_against])
def test_another_kernel_is_refused(record, join):
    nothing = ("",) * 6
    with pytest.raises(UsageError, match=r"6\.1.*7\.3\.4-amd64"):
        join(record(*nothing), record(*nothing, kernel="6.1"))


def test_another_build_is_refused(record):
    with pytest.raises(UsageError, match=r"builds of .*nested\.c differ"):
        record(*("",) * 6).add(record(*("",) * 6, lines=(11, 13, 13, 15, 21, 23)))


def test_saved_and_read_again(record, tmp_path):
    found = record("a", "", "b", "", "", "a")
    records.save(found, tmp_path / "c.json")
    assert records.load(tmp_path / "c.json") == found


@pytest.mark.parametrize(
    ("place", "value", "told"),
    [
        ("lines", [11], "1 lines, but 6 in first"),
        ("first", [0, 9, -1, -1, -1, -1], "above the last of reached_by"),
        ("first", [0, -2, -1, -1, -1, -1], "at least -1"),
        ("functions", [[20, "leave"], [10, "enter"]], "not in the order"),
        ("functions", [[20]], "length"),
    ],
)
def test_damage_is_told_in_one_line(record, tmp_path, place, value, told):
    path = tmp_path / "c.json"
    document = records.document(record("a", "", "", "", "", ""))
    document["sources"][NESTED][place] = value
    path.write_text(json.dumps(document))
    with pytest.raises(HarnessError, match=told) as raised:
        records.load(path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_show_joins_files_and_compares(record, tmp_path, capsys):
    one, two, old = (tmp_path / name for name in ("one.json", "two.json", "old.json"))
    records.save(record("a", "", "", "", "", ""), one)
    records.save(record("", "", "", "b", "", ""), two)
    records.save(record("x", "", "", "", "", ""), old)
    both = tmp_path / "both.json"
    assert main(["coverage", "show", *map(str, (one, two)), "--against", str(old),
                 "--missing", "--data", str(both)]) == 0  # fmt: skip
    assert capsys.readouterr().out.splitlines() == [
        "coverage of 7.3.4-amd64 (7.3.4-1)",
        f"{NESTED}  lines 40.0 % (2/5)  blocks 33.3 % (2/6)  functions 1/2",
        f"{NESTED}: leave 0/2, not 21-22",
        f"{NESTED}: enter 2/3, not 13",
        "new: 1 line",
        f"{NESTED}: enter 15, by b",
    ]
    assert records.load(both).sources[NESTED].first == ["a", "", "", "b", "", ""]


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["show", "nothing.json"], 2, "nothing.json"),
        (["show", "damaged.json"], 3, "damaged.json is not a file of kvmnest coverage"),
        (["show", "one.json", "other.json"], 2, "coverage of 6.1"),
        (["show", "one.json", "--against", "other.json"], 2, "coverage of 6.1"),
        (["show", "one.json", "--pages", "one.json"], 2, "one.json is not a directory"),
        (["show", "one.json", "--data", "."], 2, "cannot write ."),
        (["show", "one.json", "--data", "/dev/full"], 3, "No space left on device"),
        (["run", "--add", "test_vmxon.py"], 2, "--add needs --data FILE"),
        (["run", "--against", "damaged.json"], 3, "damaged.json"),
        (["run", "--kvm-modules", "."], 2, "--kvm-modules: coverage builds the modules itself"),
    ],
)
def test_bad_input_is_one_line(record, tmp_path, monkeypatch, capsys, arguments, code, told):
    monkeypatch.chdir(tmp_path)
    records.save(record("a", "", "", "", "", ""), tmp_path / "one.json")
    records.save(record("a", "", "", "", "", "", kernel="6.1"), tmp_path / "other.json")
    (tmp_path / "damaged.json").write_text('{"schema": 1}')
    assert main(["coverage", *arguments]) == code
    said = capsys.readouterr().err
    assert told in said
    assert said.count("\n") == 1
