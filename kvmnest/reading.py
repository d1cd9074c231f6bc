"""The one way in for files: of the user, of an earlier run, of this package.

Whatever a name leads to, what comes back is the content, or an error whose one line names the
file, the place in it and the reason. A device, a folder or a pipe without a writer is not a file;
a file has a size, UTF-8 has rules, JSON has a depth, and a document has a schema.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import select
import stat
import sys
import tomllib
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from kvmnest import schema as schemas
from kvmnest.errors import HarnessError, UsageError
from kvmnest.schema import Schema

#: Bytes that a file of JSON or text may have; the results of the whole suite have some 2 MB.
LIMIT = 64 << 20
#: Levels of lists and objects in JSON.
DEPTH = 64
_LARGEST = 1 << 64  # numbers: nothing that is counted or read from a register is larger
_PATIENCE = 30.0  # seconds without a byte from a pipe
_BAD_NAME = (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOENT, errno.ENOTDIR, errno.EINVAL)
_KINDS = (
    (stat.S_ISDIR, "it is a directory"),
    (stat.S_ISCHR, "it is a device, not a file"),
    (stat.S_ISBLK, "it is a device, not a file"),
    (stat.S_ISSOCK, "it is a socket, not a file"),
)
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


class NoSuchFile(UsageError):
    """There is nothing of that name."""


class Damaged(HarnessError):
    """A file that is not what it is to be."""


def shown(path: str | os.PathLike[str]) -> str:
    """A file's name for a message: one line, not too long."""
    name = "".join(char if char.isprintable() else repr(char)[1:-1] for char in os.fspath(path))
    return name if len(name) <= 200 else f"{name[:100]}... ({len(name)} characters)"


def data(path: str | os.PathLike[str], *, limit: int = LIMIT, pipes: bool = True) -> bytes:
    """Content of a regular file, or (``pipes``) of a pipe to its end.

    Raises NoSuchFile or UsageError for a name that leads to no file, HarnessError for a file that
    cannot be read, is not a file, or has more than ``limit`` bytes.
    """
    try:
        # Without waiting: a pipe may have no writer, and a device may do something.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
        try:
            mode = os.fstat(descriptor).st_mode
            why = next((text for is_kind, text in _KINDS if is_kind(mode)), "")
            if stat.S_ISFIFO(mode) and not pipes:
                why = "it is a pipe, no regular file"
            if why:
                raise HarnessError(f"cannot read {shown(path)}: {why}")
            chunks = _pipe(descriptor) if stat.S_ISFIFO(mode) else _regular(descriptor)
            found = bytearray()
            for chunk in chunks:
                found += chunk
                if len(found) > limit:
                    raise HarnessError(f"cannot read {shown(path)}: more than {_size(limit)}")
        finally:
            os.close(descriptor)
    except OSError as error:
        text = f"cannot read {shown(path)}: {error.strerror or error}"
        if error.errno == errno.ENOENT:
            raise NoSuchFile(text) from error
        raise (UsageError if error.errno in _BAD_NAME else HarnessError)(text) from error
    except ValueError as error:  # a name with a null character
        raise UsageError(f"cannot read {shown(path)}: {error}") from error
    return bytes(found)


def _size(number: int) -> str:
    return f"{number >> 20} MiB" if number >= 1 << 20 else f"{number >> 10} KiB"


def _regular(descriptor: int) -> Iterator[bytes]:
    while chunk := os.read(descriptor, 1 << 20):
        yield chunk


def _pipe(descriptor: int) -> Iterator[bytes]:
    """What a pipe holds up to its end. Raises TimeoutError if it has neither data nor an end."""
    waiting = select.poll()
    waiting.register(descriptor, select.POLLIN)
    while True:
        if not waiting.poll(_PATIENCE * 1000):
            reason = f"a pipe from which nothing came for {_PATIENCE:.0f} s"
            raise TimeoutError(errno.ETIMEDOUT, reason)
        chunk = os.read(descriptor, 1 << 20)
        if not chunk:
            return
        yield chunk


def text(path: str | os.PathLike[str], *, limit: int = LIMIT) -> str:
    """Content of a UTF-8 file. Raises what ``data`` does, Damaged if it is something else."""
    content = data(path, limit=limit)
    try:
        return _decoded(content)
    except Wrong as error:
        raise Damaged(f"cannot read {shown(path)}: {error}") from error


def toml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Content of a TOML file. Raises what ``text`` does, Damaged for other content."""
    content = text(path)
    try:
        return tomllib.loads(content)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise Damaged(f"{shown(path)} is not TOML: {one_line(error)}") from error


def document(path: str | os.PathLike[str], what: str, schema: Schema) -> dict[str, Any]:
    """A JSON document that meets ``schema``; ``what`` it is ("results file of kvmnest run").

    Lone surrogates in its texts, which no stream can be given, are escaped. Raises what ``data``
    does, and Damaged for anything else than such a document.
    """
    return dict(value(data(path), what, schema, shown(path)))


def lines(
    path: str | os.PathLike[str], what: str, schema: Callable[[int], Schema]
) -> tuple[list[Any], int]:
    """Values of a file of JSON lines, and how many of its bytes are whole.

    ``schema`` gives the schema of each line by its number, from 1. A last line that is cut, or is
    no JSON, was being written when the machine went down: it is left out, and the bytes tell.
    Raises what ``data`` does, and Damaged, which names the line, for any other damage.
    """
    content = data(path, pipes=False)
    whole = content.rfind(b"\n") + 1
    every = content[:whole].splitlines(keepends=True)
    found: list[Any] = []
    try:
        if not every:
            raise Wrong("it has no whole line")
        for number, line in enumerate(every, 1):
            try:
                each = parsed(line)
            except Wrong:
                if number == len(every) > 1:
                    return found, whole - len(line)
                raise
            _meet(each, schema(number))
            found.append(each)
    except Wrong as error:
        where = f", line {len(found) + 1}" if found else ""
        raise Damaged(f"{shown(path)}{where} is not {_a(what)}: {error}") from error
    return found, whole


def tell_cut(path: str | os.PathLike[str]) -> None:
    """Say that the last line of a journal was left out, since it was not whole."""
    told = f"{shown(path)}: the last line is damaged, and cut off"
    print(f"kvmnest: {told}", file=sys.stderr, flush=True)


def value(content: bytes, what: str, schema: Schema, where: str) -> Any:
    """The value of a JSON text that meets a schema. Raises Damaged, which begins with ``where``."""
    try:
        found = parsed(content)
        _meet(found, schema)
    except Wrong as error:
        raise Damaged(f"{where} is not {_a(what)}: {error}") from error
    return found


class Wrong(ValueError):
    """Why a content is not what it is to be."""


def _decoded(content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Wrong(f"byte {error.start} is {content[error.start]:#04x}, no UTF-8") from error


def parsed(content: bytes) -> Any:
    """The value of a JSON text. Raises Wrong."""
    text = _decoded(content)
    try:
        found = json.loads(text, parse_constant=_constant, parse_float=_finite, parse_int=_integer)
        if _too_deep(found):
            raise RecursionError
    except RecursionError as error:
        raise Wrong(f"nested deeper than {DEPTH} levels") from error
    except ValueError as error:
        raise Wrong(f"no JSON: {one_line(error)}") from error
    return _escaped(found) if "\\ud" in text.lower() else found


def _constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number of JSON")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"the number {digits[:20]} is out of range")
    return value


def _integer(digits: str) -> int:
    value = int(digits) if len(digits) < 24 else _LARGEST + 1
    if abs(value) > _LARGEST:
        raise ValueError(f"the number {digits[:20]}... is out of range")
    return value


def _too_deep(value: object) -> bool:
    left = [(value, 1)]
    while left:
        each, level = left.pop()
        inner = each.values() if isinstance(each, dict) else each if isinstance(each, list) else ()
        if inner and level > DEPTH:
            return True
        left += [(part, level + 1) for part in inner if isinstance(part, dict | list)]
    return False


def _escaped(value: Any) -> Any:
    if isinstance(value, str):
        return _LONE_SURROGATE.sub(lambda found: f"\\u{ord(found[0]):04x}", value)
    if isinstance(value, list):
        return [_escaped(each) for each in value]
    if isinstance(value, dict):
        return {_escaped(name): _escaped(each) for name, each in value.items()}
    return value


def _meet(found: object, schema: Schema) -> None:
    wanted = schema.get("properties", {}).get("schema", {}).get("const")
    version = found.get("schema") if isinstance(found, dict) else None
    if isinstance(version, int) and wanted is not None and version != wanted:
        raise Wrong(f"it has schema {version}, this kvmnest reads schema {wanted}")
    reason = schemas.problem(found, schema)
    if reason:
        raise Wrong(one_line(reason))


def one_line(reason: object) -> str:
    """A reason in one line that can be shown."""
    words = "".join(char if char.isprintable() else " " for char in str(reason)).strip()
    return words if len(words) <= 200 else f"{words[:200]}..."


def _a(what: str) -> str:
    """With its article: "a results file", but "JSON"."""
    if what == "JSON":
        return what
    return f"an {what}" if what[0] in "aeiou" else f"a {what}"
