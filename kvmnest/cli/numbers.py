"""Numbers on the command line: types for argparse, which names the option in its message."""

from __future__ import annotations

import argparse
import math


def seconds(text: str) -> float:
    """A time in seconds, above 0 and finite ("nan" and "1e400" are Python floats too)."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (0 < value < math.inf):
        raise argparse.ArgumentTypeError(f"must be a number of seconds above 0, not {text}")
    return value
