"""Pages of coverage, read by an HTML parser as a browser would."""

from html.parser import HTMLParser

import pytest

from kvmnest.coverage import page
from kvmnest.errors import HarnessError

NESTED = "arch/x86/kvm/vmx/nested.c"
MARKED = 'a < b && "c" <!--BODY-->'
TEXT = "".join(f"{MARKED if n == 13 else f'line {n}'}\n" for n in range(1, 25))


class Table(HTMLParser):
    """Rows of a page: id and class, and the texts of their cells; and all links."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.links, self.inside = [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        if tag == "tr":
            self.rows.append((found.get("id"), found.get("class"), []))
        elif tag in ("td", "th"):
            self.rows[-1][2].append("")
            self.inside = True
        elif tag == "a":
            self.links.append(found["href"])

    def handle_endtag(self, tag):
        self.inside = self.inside and tag not in ("td", "th")

    def handle_data(self, data):
        if self.inside:
            self.rows[-1][2][-1] += data


@pytest.fixture
def pages(record, tmp_path):
    found = record("test_x.py::test_<a>", "", "b", "", "", "")
    return page.write(found, {NESTED: TEXT}, tmp_path / "pages")


def test_each_line_says_whether_it_ran_and_what_reached_it(pages):
    assert [path.name for path in pages] == ["index.html", "arch-x86-kvm-vmx-nested.c.html"]
    rows = {row[0]: row for row in Table(pages[1].read_text()).rows if row[0]}
    assert len(rows) == 24
    assert rows["L11"][1:] == ("ran", ["11", "line 11", "test_x.py::test_<a>"])
    assert rows["L13"][1:] == ("ran", ["13", MARKED, "b"])
    assert rows["L15"][1:] == ("not", ["15", "line 15", ""])
    assert rows["L12"][1:] == (None, ["12", "line 12", ""])


def test_the_index_leads_to_functions_with_holes_first(pages):
    index = Table(pages[0].read_text())
    assert [row[2] for row in index.rows[1:]] == [
        ["leave", "0/2", "0.0 %"],
        ["enter", "2/3", "66.6 %"],
    ]
    file = Table(pages[1].read_text())
    ids = {row[0] for row in file.rows}
    assert index.links == [f"{pages[1].name}{rest}" for rest in ("", "#L20", "#L10")]
    assert {"L20", "L10"} <= ids
    assert file.links == ["index.html"]


def test_a_folder_that_cannot_be_made(record, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(HarnessError, match="cannot write"):
        page.write(record(*("",) * 6), {NESTED: TEXT}, tmp_path / "file/pages")
