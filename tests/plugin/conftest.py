import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def module(tmp_path):
    """Writes a test module, of the suite or of a user, and returns its folder."""

    def write(text, suite=True, name="test_sample.py"):
        from plugin_helpers import SUITE_HEADER

        (tmp_path / name).write_text((SUITE_HEADER if suite else "import pytest\n") + text)
        return tmp_path

    return write
