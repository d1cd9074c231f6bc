"""What the command line makes of errors that no verb expects, and of odd streams."""

import errno
import os
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest

from kvmnest.cli import list as list_verb
from kvmnest.cli.main import main, parser, verbs

KVMNEST = [sys.executable, "-m", "kvmnest"]


@pytest.fixture
def broken(monkeypatch):
    """``kvmnest list`` that raises; returns how to say what."""

    def set_error(error):
        def run(options):
            raise error

        monkeypatch.setattr(list_verb, "run", run)

    return set_error


@pytest.mark.parametrize("error", [ValueError("bad \ud800\nnews"), KeyError("x"), RecursionError()])
def test_a_defect_is_never_the_failure_of_a_case(broken, capsys, error):
    """Exit code 1 would be a verdict; the traceback is in a private file."""
    broken(error)
    assert main(["list"]) == 3
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert told.startswith(f"kvmnest: a defect of kvmnest: {type(error).__name__}")
    path = Path(told.rpartition("traceback in ")[2].strip().rstrip(")"))
    assert "Traceback" in path.read_text()
    assert path.stat().st_mode & 0o077 == 0
    path.unlink()


def test_a_name_that_cannot_be(broken, capsys):
    broken(OSError(errno.ENAMETOOLONG, "File name too long", "x" * 300))
    assert main(["list"]) == 2
    told = capsys.readouterr().err
    assert "(300 characters): File name too long" in told
    assert told.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        (["run", "--kernel", "x" * 300], 2),
        (["run", "--kvm-modules", "/" + "x/" * 3000, "--kernel", "6.1"], 2),
        (["run", "x" * 300], 2),
        (["run", "--json", "x" * 300, "--target", "lab"], 3),
        (["diff", "x" * 300, "y"], 3),
        (["report", "x" * 300], 3),
        (["repro", "show", "x" * 300 + ".py"], 2),
        (["run", "--html", "/tmp"], 2),
        (["run", "--kvm-param", "ept=0,nested=0"], 2),
        *(
            ([verb, option, number, *rest], 2)
            for verb, option, *rest in (
                ("run", "--budget"),
                ("fuzz", "--seconds"),
                ("bisect", "--build-limit"),
            )
            for number in ("nan", "inf", "1e400", "-1", "0", "x")
        ),
    ],
)
def test_bad_arguments_are_one_line(argv, code, own_cache, tmp_path):
    done = subprocess.run(
        [*KVMNEST, *argv], capture_output=True, text=True, cwd=tmp_path, check=False, timeout=60
    )
    assert "Traceback" not in done.stderr
    assert "a defect of kvmnest" not in done.stderr
    assert done.returncode in (code, 2, 3)
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("kvmnest"), done.stderr
    assert not (own_cache / "archive").exists()  # nothing was fetched before that was seen


def test_options_may_stand_between_ids(capsys):
    """As whoever adds an id to a line that ends in options types it."""
    assert main(["repro", "show", "vmx-cpl", "vpid-zero"]) == 0
    expected = capsys.readouterr().out
    for words in (["--json", "vmx-cpl", "vpid-zero"], ["vmx-cpl", "--json", "vpid-zero"]):
        assert main(["repro", "show", *words]) == 0
        assert capsys.readouterr().out == expected
    assert main(["repro", "show", "vmx-cpl", "--jsn", "vpid-zero"]) == 2
    assert "unrecognized arguments: --jsn" in capsys.readouterr().err


def test_a_loop_of_links(own_cache, tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    for argv in (["run", "loop"], ["run", "--kernel", "./loop"], ["diff", "loop", "loop"]):
        done = subprocess.run(
            [*KVMNEST, *argv], capture_output=True, text=True, cwd=tmp_path, check=False
        )
        assert done.returncode in (2, 3)
        assert done.stderr.count("\n") == 1, done.stderr


def test_showing_a_file_does_not_execute_it(tmp_path, capsys):
    script = tmp_path / "my_bug.py"
    script.write_text("raise SystemExit('executed')\n")
    assert main(["repro", "show", str(script)]) == 0
    assert "raise SystemExit('executed')" in capsys.readouterr().out
    assert main(["repro", "show", str(tmp_path / "none.py")]) == 2


HELP = [*KVMNEST, "repro", "list"]


def test_a_full_disk_as_output():
    with open("/dev/full", "w") as full:
        done = subprocess.run(HELP, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 3
    assert done.stderr == "kvmnest: cannot write the output: No space left on device\n"


def test_a_closed_output():
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" >&-', "sh", *HELP], stderr=subprocess.PIPE, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_an_output_that_knows_ascii_only(tmp_path):
    script = tmp_path / "bug.py"
    script.write_text("# \N{SNOWMAN}\n", encoding="utf-8")
    environment = {**os.environ, "LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [*KVMNEST, "repro", "show", str(script)], capture_output=True, env=environment, check=False
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"\\u2603" in done.stdout


START = "print(flush=True); from kvmnest.__main__ import main; main()"


@pytest.mark.parametrize("after", [0.03, 0.06, 0.1, 0.2])
def test_an_interrupt_at_the_start(after):
    """From when Python's own start is over, which handles no signal of ours."""
    process = subprocess.Popen(
        [sys.executable, "-c", START, "list"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    process.stdout.readline()
    time.sleep(after)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert told in ("kvmnest: interrupted\n", ""), told


@pytest.mark.parametrize("address", ["", " ", "nowhere", "tcp://nowhere", "tcp://:1", "a b:1"])
def test_an_address_that_cannot_be(address, tmp_path, capsys):
    """Dask would start a cluster of its own, or wait."""
    pytest.importorskip("distributed")
    words = ["--scheduler", address, "--kernels", "6.1", "--state", str(tmp_path)]
    assert main(["matrix", *words, "test_vmxon.py"]) == 2
    assert "an address looks like tcp://HOST:8786" in capsys.readouterr().err


def test_every_verb_can_be_run() -> None:
    """A helper among the modules of the verbs is not a verb."""
    for verb in verbs():
        module = import_module(f"kvmnest.cli.{verb}")
        assert callable(module.add_parser), verb
        assert callable(module.run), verb


@pytest.mark.parametrize(
    "words", [["lab", "run", "--cpus", "2"], ["coverage", "command", "--kernel", "6.1"]]
)
def test_a_command_behind_two_dashes_keeps_its_options(words):
    command = ["python3", "-c", "print(1)", "--kernel", "x"]
    options = parser(words).parse_args([*words, "--", *command])
    assert options.command[-len(command) :] == command
