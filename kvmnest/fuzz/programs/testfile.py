"""A finding as a test: a file that pytest with kvmnest's fixtures runs as it is."""

from __future__ import annotations

import json
import pprint

from kvmnest.fuzz.programs.campaign import Finding


def write(finding: Finding, where: str) -> str:
    """Source of the test: it wants what the other machine gave. Only for a difference."""
    difference = finding.verdict.new
    assert difference is not None
    steps = pprint.pformat(json.loads(json.dumps(finding.program.to_json()["steps"])), width=96)
    name = difference.what
    return f'''"""Found by `kvmnest fuzz programs {where}`, program {finding.number}.

{difference}: KVM, and what it was compared with.
"""

from kvmnest.fuzz.programs.replay import replay
from kvmnest.l1 import L1

STEPS = {steps}


def test_program(l1: L1) -> None:
    """The last thing that is seen of step {difference.step} is what the other machine gave."""
    seen = replay(l1, STEPS)
    assert seen[{difference.step}][{difference.part}][{name!r}] == {difference.other!r}
'''
