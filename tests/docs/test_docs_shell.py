"""Completion scripts and the manual page name every verb, and their readers accept them."""

import shutil
import subprocess
import sys

import pytest

from kvmnest.cli.main import verbs


def kvmnest(*argv):
    return subprocess.run(
        [sys.executable, "-m", "kvmnest", *argv],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_bash_completes_verbs_and_options():
    script = kvmnest("completion", "bash").stdout
    ask = (
        "COMP_WORDS=({words}); COMP_CWORD={n};"
        ' _shtab_kvmnest kvmnest "{last}" x; printf "%s\\n" "${{COMPREPLY[@]}}"'
    )
    for words, wanted in ((("mut",), "mutants"), (("run", "--nested"), "--nested-roundtrip")):
        text = ask.format(words=" ".join(("kvmnest", *words)), n=len(words), last=words[-1])
        done = subprocess.run(
            ["bash", "-c", f"{script}\n{text}"], capture_output=True, text=True, check=False
        )
        assert wanted in done.stdout.split(), done.stderr


@pytest.mark.parametrize("shell", ["zsh", "fish", "tcsh"])
def test_other_shells_get_every_verb(shell):
    done = kvmnest("completion", shell)
    assert done.returncode == 0
    assert [verb for verb in verbs() if verb not in done.stdout] == []


def test_the_manual_page_names_every_verb_and_troff_accepts_it():
    done = kvmnest("man")
    assert done.returncode == 0
    assert [verb for verb in verbs() if f"kvmnest {verb}" not in done.stdout] == []
    if shutil.which("groff"):
        shown = subprocess.run(
            ["groff", "-man", "-Tutf8", "-P-c", "-P-b", "-P-u", "-ww"],
            input=done.stdout, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert shown.returncode == 0
        assert "EXIT STATUS" in shown.stdout


@pytest.mark.parametrize(
    ("verb", "package"), [("completion", "shtab"), ("man", "argparse_manpage")]
)
def test_a_missing_package_is_one_line(verb, package):
    argv = ["bash"] if verb == "completion" else []
    code = (
        f"import sys; sys.modules[{package!r}] = None;"
        f" from kvmnest.cli.main import main; sys.exit(main({[verb, *argv]!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert done.stderr.splitlines()[1:] == []
    assert "pip install 'kvmnest[completion]'" in done.stderr
