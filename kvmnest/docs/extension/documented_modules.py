"""Sphinx directive ``public-modules``: autodoc of every module of a package, none forgotten."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from typing import Any

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective


def public_modules(package: str) -> Iterator[str]:
    """Names of a package and of its modules, those of subpackages included, in order.

    Modules whose name begins with an underscore are private (or generated).
    """
    yield package
    found = importlib.import_module(package)
    for module in sorted(pkgutil.iter_modules(found.__path__), key=lambda m: m.name):
        if module.name.startswith("_"):
            continue
        name = f"{package}.{module.name}"
        if module.ispkg:
            yield from public_modules(name)
        else:
            yield name


class PublicModules(SphinxDirective):
    """``public-modules:: PACKAGE``: a section for each module that has something to show."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Give automodule directives to the parser."""
        lines: list[str] = []
        for name in public_modules(self.arguments[0]):
            module = importlib.import_module(name)
            is_package = hasattr(module, "__path__")
            # A package names again what its modules define: its own text says enough.
            members = [] if is_package else ["   :members:", "   :show-inheritance:"]
            lines += [name, "~" * len(name), "", f".. automodule:: {name}", *members, ""]
        section = nodes.section()
        section.document = self.state.document
        self.state.nested_parse(StringList(lines, source=self.arguments[0]), 0, section, True)
        return section.children


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the directive."""
    app.add_directive("public-modules", PublicModules)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
