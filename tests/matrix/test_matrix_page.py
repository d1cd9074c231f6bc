"""The page of a matrix: complete, safe, and what its script does in a browser."""

import re
import shutil
import subprocess
from urllib.parse import quote

import pytest
from matrix_documents import case, document, empty

from kvmnest.matrix.page import page

BAD = "test_x.py::test_<b>&[\"quoted\" '<!--HEAD-->']"
LADDER = {
    "6.1.0-47": document(
        *(case("test_a.py::same", "passed"), case("test_a.py::worse", "passed")),
        case(BAD, "passed", 16),
    ),
    "6.1 <i>": document(
        case("test_a.py::same", "passed"),
        case("test_a.py::worse", "failed", summary="RFLAGS were not cleared"),
        case(BAD, "known", 16, detail="</td><script>alert(1)</script>"),
    ),
    "9.9": empty("no kernel 9.9 in Debian's archive"),
}


@pytest.fixture
def dom(tmp_path):
    """Gives the page as it is once its script ran, opened at an address."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("no chromium: apt-get install chromium")
    path = tmp_path / "matrix.html"
    path.write_text(page(LADDER))

    def opened(fragment=""):
        done = subprocess.run(
            [
                *(browser, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"),
                *(f"--user-data-dir={tmp_path}/profile", path.as_uri() + fragment),
            ],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        return done.stdout

    return opened


def shown(text):
    """Rows of cases that are not hidden, and the count that the page shows."""
    cases = text[text.index('id="cases"') :]
    rows = re.findall(r"<tr id=\"(test_[^\"]*)\"([^>]*)>", cases)
    count = re.search(r'<output id="count">([^<]*)', text)
    return [name for name, rest in rows if "hidden" not in rest], count[1] if count else ""


def test_needs_nothing_else_and_escapes():
    text = page(LADDER)
    assert not re.search(r"(src|action)=|url\(|@import|https?:", text)
    assert all(target.startswith("#") for target in re.findall(r'href="([^"]*)"', text))
    assert "<script>alert" not in text
    assert "<i>" not in text
    assert "test_<b>" not in text
    assert "no kernel 9.9" in text
    assert "RFLAGS were not cleared" in text


def test_every_link_leads_somewhere():
    text = page(LADDER)
    places = set(re.findall(r' id="([^"]*)"', text))
    links = re.findall(r'href="#([^"]*)"', text)
    assert len(links) == 2 + 2  # two changes, two patches
    quoted = {quote(place.replace("&lt;", "<").replace("&gt;", ">").replace("&quot;", '"')
                    .replace("&#x27;", "'").replace("&amp;", "&")) for place in places}  # fmt: skip
    assert set(links) <= quoted


def test_everything_is_shown(dom):
    rows, count = shown(dom())
    assert len(rows) == 3
    assert count == "3 of 3"


def test_the_address_filters(dom):
    """By the words of an outcome's reason, which only its tooltip has."""
    rows, count = shown(dom("#q=rflags%20cleared"))
    assert rows == ["test_a.py::worse"]
    assert count == "1 of 3"


def test_only_what_differs(dom):
    rows, count = shown(dom("#differs"))
    assert "test_a.py::same" not in rows
    assert count == "2 of 3"


def test_a_link_to_a_row(dom):
    text = dom("#" + quote("test_a.py::worse"))
    assert shown(text)[1] == "3 of 3"
    # The first cell of the row has the focus, and says what it is.
    assert re.search(r'id="says"[^>]*>test_a.py::worse, 6.1.0-47: passed<', text)


def test_differing_rows_come_first_in_their_patch():
    text = page(LADDER)
    assert text.index('<tr id="test_a.py::worse"') < text.index('<tr id="test_a.py::same"')
