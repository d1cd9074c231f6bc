"""Sphinx directives ``schema-members`` and ``exit-codes``: pages made from what the code states."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

DATA = Path(__file__).resolve().parents[2] / "data"
_CODE = re.compile(r"\b(\d+) (.*?)(?=, \d+ |$)")


def commands(parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Every verb, and verb of a verb, with its parser."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                yield child.prog, child
                yield from commands(child)


def exit_codes(parser: argparse.ArgumentParser) -> list[tuple[str, str]]:
    """(number, meaning) as the epilog of a parser states them."""
    _, found, text = " ".join((parser.epilog or "").split()).partition("xit codes: ")
    return _CODE.findall(text) if found else []


def type_of(schema: dict[str, Any]) -> str:
    """What a value must be, in a few words."""
    if "const" in schema:
        return f"`{json.dumps(schema['const'])}`"
    if "enum" in schema:
        return " or ".join(f"`{json.dumps(value)}`" for value in schema["enum"])
    if "$ref" in schema:
        return f"object, see [](#member-{schema['$ref'].rpartition('/')[2]})"
    names = schema.get("type", "anything")
    text = " or ".join([names] if isinstance(names, str) else names)
    if "items" in schema:
        text += f" of {type_of(schema['items'])}"
    if schema.get("format"):
        text += f" ({schema['format']})"
    if "minimum" in schema and "maximum" in schema:
        text += f", {schema['minimum']} to {schema['maximum']}"
    elif "minimum" in schema:
        text += f", at least {schema['minimum']}"
    return text


def members(schema: dict[str, Any], definitions: dict[str, Any]) -> Iterator[str]:
    """Lines of Markdown: a definition list of an object's members."""
    required = schema.get("required", [])
    for name, member in schema.get("properties", {}).items():
        reference = member.get("$ref", "").rpartition("/")[2]
        if reference and "properties" not in definitions[reference]:
            member = definitions[reference]
        optional = "" if name in required else ", may be absent"
        yield f"`{name}`"
        text = member.get("description", "")
        yield f": {type_of(member)}{optional}." + (f" {text}" if text else "")
        yield ""


class SchemaMembers(SphinxDirective):
    """``schema-members:: FILE [DEFINITION]``: the members of a JSON Schema's object."""

    required_arguments = 1
    optional_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Read the schema in ``kvmnest/data`` and describe it."""
        path = DATA / self.arguments[0]
        self.env.note_dependency(str(path))
        schema = json.loads(path.read_text(encoding="utf-8"))
        definitions = schema.get("$defs", {})
        if len(self.arguments) > 1:
            schema = definitions[self.arguments[1]]
        return _parsed(self, list(members(schema, definitions)), str(path))


class ExitCodes(SphinxDirective):
    """``exit-codes``: a table of what each verb's codes mean, from the verbs themselves."""

    def run(self) -> list[nodes.Node]:
        """Ask every parser."""
        from kvmnest.cli.main import parser

        lines = ["| command | code | meaning |", "|---|---|---|"]
        for name, child in commands(parser([])):
            for number, (code, meaning) in enumerate(exit_codes(child)):
                shown = f"`{name}`" if number == 0 else ""
                lines.append(f"| {shown} | {code} | {meaning} |")
        return _parsed(self, lines, "exit codes")


def _parsed(directive: SphinxDirective, lines: list[str], source: str) -> list[nodes.Node]:
    holder = nodes.Element()
    holder.document = directive.state.document
    directive.state.nested_parse(StringList(lines, source=source), 0, holder)
    return list(holder.children)


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the directives."""
    app.add_directive("schema-members", SchemaMembers)
    app.add_directive("exit-codes", ExitCodes)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
