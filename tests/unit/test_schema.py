"""The validator against jsonschema, on the package's own schemas and on made-up ones."""

import copy
import json
from pathlib import Path

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmnest import schema
from kvmnest.bisect import journal as bisect_journal
from kvmnest.doctor import capabilities
from kvmnest.fuzz import journal
from kvmnest.reports import jsonfile
from kvmnest.reports.model import Case, Run


def _without_formats(rules):
    """jsonschema looks at formats only where other packages are installed."""
    if isinstance(rules, dict):
        return {key: _without_formats(inner) for key, inner in rules.items() if key != "format"}
    return [_without_formats(inner) for inner in rules] if isinstance(rules, list) else rules


RESULTS = _without_formats(
    json.loads((Path(schema.__file__).parent / "data" / "results.schema.json").read_text())
)
TEXT, COUNT = {"type": "string", "minLength": 1}, {"type": "integer", "minimum": 0, "maximum": 9}
SCHEMAS = {
    "results": RESULTS,
    "caps": capabilities._SCHEMA,
    "fuzz": journal.EVENT_SCHEMA,
    "bisect": bisect_journal.ANSWER_SCHEMA,
    "object": {
        "type": "object",
        "required": ["a"],
        "properties": {"a": COUNT, "b": {"type": ["string", "null"]}, "c": {"const": 1}},
        "additionalProperties": False,
        "dependentRequired": {"b": ["c"]},
    },
    "names": {"propertyNames": {"pattern": "^[a-c]"}, "additionalProperties": TEXT},
    "list": {"type": "array", "prefixItems": [TEXT, COUNT], "minItems": 1, "maxItems": 2},
    "items": {"items": {"anyOf": [COUNT, {"enum": ["x", 1.5, False, None]}]}},
    "logic": {
        "if": {"required": ["a"]},
        "then": {"properties": {"a": COUNT}},
        "else": {"not": {"required": ["b"]}},
    },
    "reference": {"$defs": {"n": COUNT}, "allOf": [{"properties": {"a": {"$ref": "#/$defs/n"}}}]},
    "number": {"type": "number", "minimum": -1.5},
    "never": {"properties": {"a": False, "b": True}},
}
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 12) | st.floats(-2, 12) | st.sampled_from("abcx"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abcd"), inner),
    max_leaves=8,
)


def agrees(value, rules):
    theirs = jsonschema.Draft202012Validator(rules).is_valid(value)
    assert (schema.problem(value, rules) == "") == theirs, schema.problem(value, rules)


@pytest.mark.parametrize("name", SCHEMAS)
@given(VALUES)
def test_any_value(name, value):
    agrees(value, SCHEMAS[name])


@given(st.data())
def test_damaged_results(data):
    """A results document with a part that is another value, or is missing."""
    document = copy.deepcopy(WHOLE)
    part, keys = document, []
    while isinstance(part, dict | list) and part and (not keys or data.draw(st.booleans())):
        keys.append(
            data.draw(st.sampled_from(range(len(part)) if isinstance(part, list) else [*part]))
        )
        holder, part = part, part[keys[-1]]
    if data.draw(st.booleans()):
        del holder[keys[-1]]
    else:
        holder[keys[-1]] = data.draw(VALUES)
    agrees(document, RESULTS)


WHOLE = jsonfile.whole(
    Run(
        "lab",
        "bochs 3.0",
        facts={"kernel": "7.3.4", "kvm_params": {"nested": "Y"}},
        started="2026-11-26T00:00:00+00:00",
        cases=[Case("test_vmxon.py::test_a", 3, "VMXON", "failed", 0.5, "detail", "summary")],
    )
)


def test_a_whole_document():
    assert schema.problem(WHOLE, RESULTS) == ""


def test_the_place_is_told():
    document = copy.deepcopy(WHOLE)
    document["cases"][0]["seconds"] = "x"
    assert schema.problem(document, RESULTS).startswith("cases[0].seconds must be a number")


@pytest.mark.parametrize(
    ("value", "right"),
    [("2026-11-26T00:00:00+00:00", True), ("2026-11-26", True), ("a", False), (1, True)],
)
def test_date_and_time(value, right):
    assert (schema.problem(value, {"format": "date-time"}) == "") is right


@pytest.mark.parametrize("rules", [{"oneOf": []}, {"minimun": 1}, {"format": "email"}])
def test_unknown_keyword(rules):
    with pytest.raises(ValueError, match="not known"):
        schema.problem("x", rules)
