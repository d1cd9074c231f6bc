"""Files that are there as a whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvmnest.errors import HarnessError


def write_json(path: Path, document: Mapping[str, Any] | Sequence[Any]) -> None:
    """Replace a JSON file as a whole; write into what is a device or a pipe.

    Raises HarnessError if that is impossible.
    """
    if path.exists() and not path.is_file():
        try:
            path.write_text(f"{json.dumps(document, indent=1)}\n", encoding="utf-8")
        except OSError as error:
            raise HarnessError(f"cannot write {path}: {error.strerror or error}") from error
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(document, file, indent=1)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise HarnessError(f"cannot write {path}: {error.strerror or error}") from error
