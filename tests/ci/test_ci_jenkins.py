"""ci/Jenkinsfile: it is Groovy, its shell is checked, and no parameter becomes code."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from groovy_parser.parser import parse_groovy_content

JENKINSFILE = Path(__file__).resolve().parents[2] / "ci" / "Jenkinsfile"
TEXT = JENKINSFILE.read_text()
SHELL = re.findall(r"^\s*sh '(.*)'$", TEXT, re.MULTILINE)


def test_it_is_groovy():
    assert parse_groovy_content(TEXT) is not None
    with pytest.raises(Exception, match=r"(?i)unexpected|token|terminal"):
        parse_groovy_content(TEXT.replace("stages {", "stages {{{ (", 1))


def test_shell_steps(tmp_path):
    assert len(SHELL) == TEXT.count("sh '") == 4
    assert 'sh "' not in TEXT, "in double quotes Groovy would put parameters into the command"
    assert shutil.which("shellcheck"), "ci/test installs it"
    for number, text in enumerate(SHELL):
        path = tmp_path / f"{number}.sh"
        path.write_text(f'#!/bin/sh\nKERNEL=6.1\n: "$KERNEL"\n{text}\n')
        done = subprocess.run(
            ["shellcheck", str(path)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout


def test_what_it_calls_exists():
    for name in re.findall(r"ci/\w+", TEXT):
        if name != "ci/Jenkinsfile":
            assert (JENKINSFILE.parents[1] / name).is_file(), name
    assert "'reports/junit.xml'" in TEXT
