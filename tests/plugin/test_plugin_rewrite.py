"""Failed assertions read the same under the light runner as under pytest."""

import ast
import re

import pytest
from _pytest.assertion import rewrite as real
from _pytest.assertion import util

from kvmnest.light import rewrite
from kvmnest.vmx import VmxError
from kvmnest.vmx.outcome import Succeed, VMfailValid

PRELUDE = """
class Thing:
    value = 7
    def get(self, n):
        return n * 2
    def __repr__(self):
        return "Thing"
thing = Thing()
table = {"k": thing}
text = "two\\nlines"
flag = False
"""


def _explain(source: str, using, **names: object) -> str:
    text = f"{PRELUDE}def case():\n    {source}\n"
    tree = ast.parse(text)
    real.rewrite_asserts(tree, text.encode())
    scope = {"__name__": "sample"}
    exec(compile(tree, "sample.py", "exec"), scope)
    assert scope["@pytest_ar"] is real
    scope |= {**names, "@pytest_ar": using}
    with pytest.raises(AssertionError) as caught:
        scope["case"]()
    return str(caught.value)


@pytest.mark.parametrize(
    "source",
    [
        "assert 1 == 2",
        "assert thing.value == 8",
        "assert thing.get(4) == thing.value",
        "assert not thing.get(1)",
        "assert flag",
        "assert flag or not thing",
        "assert thing and thing.value > 7",
        "assert 1 < thing.value < 5",
        "assert 9 in [thing.value, 8]",
        "assert table['k'].get(n=3) == 7",
        "assert text == 'one'",
        "assert flag, 'a message of 100%'",
        "assert flag, 'two\\nlines'",
        "assert all(x > 1 for x in [1, 2])",
        "assert isinstance(thing, int)",
        "assert thing.get(thing.get(2)) == (1, 2)",
        "assert flag is True",
    ],
)
def test_same_text(monkeypatch, source):
    monkeypatch.setattr(util, "_reprcompare", None)
    texts = [_explain(source, using) for using in (rewrite, real)]
    assert re.sub("0x[0-9a-f]+", "", texts[0]) == re.sub("0x[0-9a-f]+", "", texts[1])


def test_outcomes_are_explained():
    text = _explain(
        "assert got == want",
        rewrite,
        got=VMfailValid(VmxError.VMRESUME_NONLAUNCHED_VMCS),
        want=Succeed(),
    )
    assert text.startswith("assert got VMfailValid(5: VMRESUME of a VMCS that was not launched)")


def test_a_broken_repr_hides_nothing():
    class Broken:
        def __repr__(self):
            raise ValueError("no")

    assert "Broken whose repr" in _explain("assert thing is None", rewrite, thing=Broken())
    assert rewrite._saferepr(Broken()) == "<Broken whose repr raised ValueError>"
    assert len(rewrite._saferepr("x" * 1000)) < 300


def test_the_traceback_starts_at_the_case():
    def inner():
        raise ValueError("deep")

    def case():
        inner()

    try:
        case()
    except ValueError as error:
        lines = rewrite.traceback_text(error, case.__code__).splitlines()
    assert lines[0].endswith(": in case")
    assert lines[1] == "    inner()"
    assert lines[2].endswith(": in inner")
    assert lines[-1] == "E   ValueError: deep"
