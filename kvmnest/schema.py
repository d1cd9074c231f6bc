"""What is wrong with a value, by a JSON schema: the keywords that the schemas of this package use.

The package needs cffi, pytest and pyelftools and no validator beside them; the tests compare this
one with jsonschema. The rules are those of JSON Schema (draft 2020-12). A keyword that is not
known here is an error of the schema, so that nothing stays unchecked.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

Schema = Mapping[str, Any]
#: Value, the keyword's rule, the schema around it, the whole schema, the place of the value.
Check = Callable[[Any, Any, Schema, Schema, str], Iterator[str]]

_TYPES: Mapping[str, tuple[type, ...]] = {
    **{"object": (dict,), "array": (list,), "string": (str,), "boolean": (bool,)},
    **{"integer": (int,), "number": (int, float), "null": (type(None),)},
}
_WORDS = {
    **{"object": "an object", "array": "a list", "string": "a text", "boolean": "true or false"},
    **{"integer": "an integer", "number": "a number", "null": "null"},
}
_SAYING = frozenset(("$schema", "$id", "$comment", "$defs", "title", "description", "then", "else"))


#: Parts of schemas that many have.
TEXT: Schema = {"type": "string"}
TEXTS: Schema = {"type": "array", "items": TEXT}
COUNT: Schema = {"type": "integer", "minimum": 0}


def exactly(required: Sequence[str], **properties: object) -> Schema:
    """An object with these properties and no other, of which some have to be there."""
    return {
        "type": "object",
        "required": [*required],
        "additionalProperties": False,
        "properties": properties,
    }


def by_name(value: object) -> Schema:
    """An object with any names, each with a value that meets a schema."""
    return {"type": "object", "additionalProperties": value}


def problem(value: object, schema: Schema) -> str:
    """The first rule of ``schema`` that ``value`` breaks, with the place in it; "" if none."""
    return next(_problems(value, schema, schema, ""), "")


def _problems(value: Any, schema: Schema | bool, root: Schema, at: str) -> Iterator[str]:
    if isinstance(schema, bool):
        if not schema:
            yield f"{at or 'it'} must not be there"
        return
    for keyword, rule in schema.items():
        if keyword in _SAYING:
            continue
        check = _CHECKS.get(keyword)
        if check is None:
            raise ValueError(f"the keyword {keyword} of a schema is not known")
        yield from check(value, rule, schema, root, at)


def _place(at: str, key: str | int) -> str:
    if isinstance(key, int):
        return f"{at}[{key}]"
    return f"{at}.{key}" if at else key


def _is(value: object, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    if kind == "integer" and isinstance(value, float):
        return value.is_integer()
    return isinstance(value, _TYPES[kind])


def _equal(one: object, other: object) -> bool:
    """Equality of JSON, with a constant that is not a list or object: true is not 1."""
    return one == other and isinstance(one, bool) == isinstance(other, bool)


def _type(value: Any, rule: Any, schema: Schema, root: Schema, at: str) -> Iterator[str]:
    kinds = [rule] if isinstance(rule, str) else rule
    if not any(_is(value, kind) for kind in kinds):
        yield f"{at or 'it'} must be {' or '.join(_WORDS[kind] for kind in kinds)}"


def _enum(value: Any, rule: Any, schema: Schema, root: Schema, at: str) -> Iterator[str]:
    if not any(_equal(value, each) for each in rule):
        yield f"{at or 'it'} must be one of {', '.join(map(json.dumps, rule))}"


def _const(value: Any, rule: Any, schema: Schema, root: Schema, at: str) -> Iterator[str]:
    if not _equal(value, rule):
        yield f"{at or 'it'} must be {json.dumps(rule)}"


def _required(value: Any, rule: Any, schema: Schema, root: Schema, at: str) -> Iterator[str]:
    missing = [name for name in rule if name not in value] if isinstance(value, dict) else []
    if missing:
        yield f"{at or 'it'} must have {', '.join(missing)}"


def _properties(value: Any, rule: Any, schema: Schema, root: Schema, at: str) -> Iterator[str]:
    if isinstance(value, dict):
        for name, inner in rule.items():
            if name in value:
                yield from _problems(value[name], inner, root, _place(at, name))


def _more(value: Any, rule: Any, schema: Schema, root: Schema, at: str) -> Iterator[str]:
    if isinstance(value, dict):
        known = schema.get("properties", {})
        for name in value:
            if name not in known:
                yield from _problems(value[name], rule, root, _place(at, name))


def _names(value: Any, rule: Any, schema: Schema, root: Schema, at: str) -> Iterator[str]:
    if isinstance(value, dict):
        for name in value:
            yield from _problems(name, rule, root, f"the name {name!r} in {at or 'it'}")


def _items(value: Any, rule: Any, schema: Schema, root: Schema, at: str) -> Iterator[str]:
    if isinstance(value, list):
        for number, each in enumerate(value):
            yield from _problems(each, rule, root, _place(at, number))


def _prefix(value: Any, rule: Any, schema: Schema, root: Schema, at: str) -> Iterator[str]:
    if isinstance(value, list):
        for number, (each, inner) in enumerate(zip(value, rule, strict=False)):
            yield from _problems(each, inner, root, _place(at, number))


def _bound(kind: str, what: str, types: tuple[type, ...]) -> Check:
    """Check a number, or the length of a list or a text, against a limit."""
    least = kind.startswith("min")

    def check(value: Any, rule: Any, schema: Schema, root: Schema, at: str) -> Iterator[str]:
        if isinstance(value, bool) or not isinstance(value, types):
            return
        size: Any = len(value) if isinstance(value, list | str) else value
        if size < rule if least else size > rule:
            yield f"{at or 'it'} must {what} {'at least' if least else 'at most'} {rule}"

    return check


def _pattern(value: Any, rule: Any, schema: Schema, root: Schema, at: str) -> Iterator[str]:
    if isinstance(value, str) and re.search(rule, value) is None:
        yield f"{at or 'it'} must look like {rule}"


def _together(value: Any, rule: Any, schema: Schema, root: Schema, at: str) -> Iterator[str]:
    if isinstance(value, dict):
        for name, others in rule.items():
            if name in value:
                yield from _required(value, others, schema, root, at)


def _format(value: Any, rule: Any, schema: Schema, root: Schema, at: str) -> Iterator[str]:
    if rule != "date-time":
        raise ValueError(f"the format {rule} of a schema is not known")
    if isinstance(value, str):
        try:
            datetime.datetime.fromisoformat(value)
        except ValueError:
            yield f"{at or 'it'} must be a date and a time"


def _all(value: Any, rule: Any, schema: Schema, root: Schema, at: str) -> Iterator[str]:
    for inner in rule:
        yield from _problems(value, inner, root, at)


def _any(value: Any, rule: Any, schema: Schema, root: Schema, at: str) -> Iterator[str]:
    found = [next(_problems(value, inner, root, at), "") for inner in rule]
    if all(found):
        yield found[-1]


def _not(value: Any, rule: Any, schema: Schema, root: Schema, at: str) -> Iterator[str]:
    if not next(_problems(value, rule, root, at), ""):
        yield f"{at or 'it'} has what must not be there together"


def _if(value: Any, rule: Any, schema: Schema, root: Schema, at: str) -> Iterator[str]:
    holds = not next(_problems(value, rule, root, at), "")
    yield from _problems(value, schema.get("then" if holds else "else", True), root, at)


def _ref(value: Any, rule: Any, schema: Schema, root: Schema, at: str) -> Iterator[str]:
    inner: Any = root
    for part in rule.removeprefix("#/").split("/"):
        inner = inner[part]
    yield from _problems(value, inner, root, at)


_CHECKS: Mapping[str, Check] = {
    **{"type": _type, "enum": _enum, "const": _const, "required": _required},
    **{"properties": _properties, "additionalProperties": _more, "propertyNames": _names},
    **{"items": _items, "prefixItems": _prefix, "pattern": _pattern, "format": _format},
    **{"allOf": _all, "anyOf": _any, "not": _not, "if": _if, "$ref": _ref},
    "dependentRequired": _together,
    "minimum": _bound("minimum", "be", (int, float)),
    "maximum": _bound("maximum", "be", (int, float)),
    "minItems": _bound("minItems", "have a length of", (list,)),
    "maxItems": _bound("maxItems", "have a length of", (list,)),
    "minLength": _bound("minLength", "have a length of", (str,)),
}
