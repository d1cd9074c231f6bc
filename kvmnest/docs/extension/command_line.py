"""The parser of ``kvmnest``, as the directive ``sphinx_argparse_cli`` asks for it."""

from __future__ import annotations

import argparse
import re

from kvmnest.cli import main

_MARKUP = re.compile(r"[*`|\\]|(?<=\w)_(?!\w)")


def parser() -> argparse.ArgumentParser:
    """The parser with all verbs, its texts escaped: the directive reads them as markup."""
    top = main.parser([])
    _escape(top)
    return top


def _escape(parser: argparse.ArgumentParser) -> None:
    parser.description = _plain(parser.description)
    parser.epilog = _plain(parser.epilog)
    for action in parser._actions:
        if action.help != argparse.SUPPRESS:
            action.help = _plain(action.help)
        if isinstance(action, argparse._SubParsersAction):
            for entry in action._choices_actions:
                entry.help = _plain(entry.help)
            for child in action.choices.values():
                _escape(child)


def _plain(text: str | None) -> str | None:
    return _MARKUP.sub(r"\\\g<0>", text) if text else text
