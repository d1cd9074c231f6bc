"""What rewritten assert statements call when they fail, in place of ``_pytest.assertion.rewrite``.

pytest compiles ``assert a == f(b)`` into code that, on failure, describes its parts with the
functions below and joins them to one text: a line that starts with ``{`` explains the part before
it up to ``}``, one that starts with ``~`` continues. They keep pytest's names, since that code
was compiled by the host's pytest.
"""

from __future__ import annotations

import types
from collections.abc import Sequence

from kvmnest.cases import explain

_LONGEST_REPR = 240


def _saferepr(value: object) -> str:
    if isinstance(value, types.MethodType):
        return value.__name__  # its object is explained beside it
    try:
        text = repr(value)
    except Exception as error:  # a broken repr must not hide the failure
        text = f"<{type(value).__name__} whose repr raised {type(error).__name__}>"
    if len(text) > _LONGEST_REPR:
        half = _LONGEST_REPR // 2
        text = f"{text[:half]}...{text[-half:]}"
    return text.replace("\n", "\\n")


def _format_assertmsg(message: object) -> str:
    text = message if isinstance(message, str) else _saferepr(message)
    return text.replace("\n", "\n~").replace("%", "%%")


def _should_repr_global_name(value: object) -> bool:
    # Functions, classes and modules are clear from their name.
    return not (callable(value) or hasattr(value, "__name__"))


def _format_boolop(explanations: Sequence[str], is_or: bool) -> str:
    joined = (" or " if is_or else " and ").join(explanations)
    return f"({joined})".replace("%", "%%")


def _call_reprcompare(
    ops: Sequence[str],
    results: Sequence[object],
    expls: Sequence[str],
    each_obj: Sequence[object],
) -> str:
    """Explain the first comparison of a chain that does not hold."""
    failed = next((i for i, result in enumerate(results) if not result), len(results) - 1)
    left, right = each_obj[failed : failed + 2]
    lines = explain.relation(ops[failed], left, right)
    if lines is None:
        return expls[failed]
    return "\n~".join(line.replace("\n", "\\n") for line in lines).replace("%", "%%")


def _format_explanation(explanation: str) -> str:
    """Lay the joined text out: what explains a part stands indented below it."""
    first, *others = explanation.split("\n")
    lines = [first]
    opened = [0]  # indices of the lines that are being explained, the innermost last
    explained = {0: 0}  # parts of each that have been
    for text in others:
        kind, rest = text[:1], text[1:]
        if kind == "{":
            word = "and  " if explained[opened[-1]] else "where"
            explained[opened[-1]] += 1
            opened.append(len(lines))
            explained[len(lines)] = 0
            lines.append(f" +{'  ' * (len(opened) - 1)}{word} {rest}")
        elif kind == "}":
            opened.pop()
            lines[opened[-1]] += rest
        elif kind in ("~", ">"):
            lines.append("  " * (len(opened) - (kind == ">")) + rest)
        else:  # a newline inside a value
            lines[-1] += f"\\n{text}"
    return "\n".join(lines)


def traceback_text(error: BaseException, first: object) -> str:
    """Traceback in the form of pytest's ``--tb=short``, from the frame of code ``first`` on."""
    import linecache

    frames = []
    trace = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        frames.append((code, trace.tb_lineno))
        trace = trace.tb_next
    start = next((i for i, (code, _) in enumerate(frames) if code is first), 0)
    lines = []
    for code, number in frames[start:]:
        lines.append(f"{code.co_filename}:{number}: in {code.co_name}")
        source = linecache.getline(code.co_filename, number).strip()
        if source:
            lines.append(f"    {source}")
    said = str(error)
    if not isinstance(error, AssertionError):
        said = f"{type(error).__name__}: {said}"
    lines += [f"E   {text}" for text in (said or type(error).__name__).splitlines()]
    return "\n".join(lines)
