import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

ROOT = str(Path(__file__).resolve().parents[2])


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a test file into the folder where the test then stands; returns its name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", ROOT)

    def writer(text, name="test_sample.py"):
        (tmp_path / name).write_text("import os, signal, time\nimport pytest\n" + text)
        return name

    return writer
