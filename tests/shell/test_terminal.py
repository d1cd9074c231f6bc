"""kvmnest shell on a terminal: Ctrl-C, Ctrl-D, completion, history, the end of a pipe."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from terminal import HERE, IN_LAB, PROMPT, Terminal, alive

LOOP = r"b'\xeb\xfe'"


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Terminal]:
    """One session in the lab for all tests that leave it at its prompt."""
    terminal = Terminal(tmp_path_factory.mktemp("state"), IN_LAB)
    booting = terminal.wait()
    assert "booting " in booting
    assert booting.rstrip().endswith("in the lab; type help")
    yield terminal
    terminal.kill()


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Terminal]:
    terminal = Terminal(tmp_path, HERE, sigint_ignored=True)
    terminal.wait()
    yield terminal
    terminal.kill()


def test_interrupt_at_the_prompt(lab: Terminal) -> None:
    lab.type("l1.vmxo")
    assert "KeyboardInterrupt" in lab.drop_line("vmxo")
    assert lab.run("1 + 1") == "2"


def test_interrupt_of_python(lab: Terminal) -> None:
    """What the statements before it made is still there."""
    lab.run("kept = 41")
    lab.start("exec('while True: pass')")
    assert lab.interrupt().strip().endswith("KeyboardInterrupt")
    assert lab.run("kept + 1") == "42"


@pytest.mark.parametrize("rflags", [0x2, 0x202], ids=["IF=0", "IF=1"])
def test_interrupt_of_a_looping_l2(lab: Terminal, rflags: int) -> None:
    """L1 continues, in VMX operation, with L2's registers in the VMCS."""
    lab.run("_ = new()")
    lab.run(f"v = l1.launchable(l2=code.NOP + {LOOP}); vmcs[Field.GUEST_RFLAGS] = {rflags}")
    assert lab.stop("l1.vmlaunch()", "KeyboardInterrupt\nL2 is stopped at RIP 0x")
    assert lab.run("vmcs[Field.GUEST_RIP] == l1.sym('l2_code') + 1") == "True"
    # The VMCS is launched: VMLAUNCH fails, VMRESUME enters, at the code that was put there.
    assert "VMfailValid(4: " in lab.run("l1.vmlaunch()")
    assert lab.run("l1.write(vmcs[Field.GUEST_RIP], code.CPUID)") == ""
    assert lab.run("l1.vmresume() == Exit(ExitReason.CPUID)") == "True"


def test_a_hanging_l2_is_given_up(lab: Terminal) -> None:
    """Nobody presses Ctrl-C: the budget ends it, and L1 continues."""
    lab.run("_ = new()")
    lab.run(f"v = l1.launchable(l2={LOOP})")
    shown = lab.run("l1.vmlaunch()")
    assert "VmLost: hang in vmlaunch" in shown
    assert "L2 is stopped at RIP 0x" in shown
    assert lab.run("l1.vmxoff()") == "Succeed()"


def test_completion_in_the_lab(lab: Terminal) -> None:
    """Of the prompt's names, of L1, of fields, and of what the user made."""
    lab.run("mine = l1")
    for typed, becomes in (
        ("l1.vmptrl", "l1.vmptrld("),
        ("mine.vmptrl", "mine.vmptrld("),
        ("Field.VMCS_LINK", "Field.VMCS_LINK_POINTER"),
        ("vmcs.flus", "vmcs.flush("),
        ("rul", "rules("),
    ):
        lab.type(typed + "\t")
        lab.drop_line(becomes)


def test_unknown_names(lab: Terminal) -> None:
    assert "Did you mean: dump?" in lab.run("dmp()")
    assert "Did you mean: vmlaunch?" in lab.run("l1.vmlanch()")
    assert "GUEST_RIP" in lab.run("Field.GUEST_RPI").partition("Did you mean: ")[2]


def test_end_of_input_ends_the_lab(lab: Terminal) -> None:
    """Last in this file's session: Ctrl-D is exit code 0, and the emulator is gone."""
    emulators = lab.children()
    assert len(emulators) == 1
    _, status = lab.end("d")
    assert status == 0
    assert not any(map(alive, emulators))


def test_second_interrupt_ends_the_lab(tmp_path: Path) -> None:
    """A loop of L1 itself with IF = 0 stops the emulated machine's clocks: see shell/tick.py."""
    terminal = Terminal(tmp_path, IN_LAB)
    try:
        terminal.wait()
        emulators = terminal.children()
        assert len(emulators) == 1
        terminal.start(f"l1.call({LOOP}, rflags=2)")
        terminal.type("\x03")
        terminal.wait("^C", 60)
        text, status = terminal.end("c")
        assert status == 130
        assert text.strip().splitlines()[-1] == "kvmnest: interrupted"
        assert not any(map(alive, emulators))
    finally:
        terminal.kill()


def test_interrupt_while_the_lab_boots(tmp_path: Path) -> None:
    terminal = Terminal(tmp_path, IN_LAB)
    try:
        terminal.wait("in the lab")
        while not (emulators := terminal.children()):
            pass
        text, status = terminal.end("c")
        assert status == 130
        assert text.strip().splitlines() == ["^C", "kvmnest: interrupted"]
        assert not any(map(alive, emulators))
    finally:
        terminal.kill()


def test_interrupts_here(here: Terminal) -> None:
    """On /dev/kvm, with or without VMX, in a shell that was started with SIGINT ignored."""
    here.type("l1.vmxo")
    assert "KeyboardInterrupt" in here.drop_line("vmxo")
    here.start("exec('while True: pass')")
    assert "KeyboardInterrupt" in here.interrupt()
    assert here.stop(f"l1.call({LOOP})", "KeyboardInterrupt\nL1's code is stopped at RIP 0x")
    assert here.run("type(l1.rdtsc()).__name__") == "'Succeed'"
    _, status = here.end("d")
    assert status == 0


def test_a_lost_l1_is_replaced_here(here: Terminal) -> None:
    """A triple fault leaves nothing to go on with."""
    here.run("l1.write(l1.sym('l1_idt'), bytes(4096))")
    shown = here.run("l1.call(code.UD2)")
    assert "VmLost: triple fault in code 0f0b" in shown
    assert "l1 is a new one" in shown
    assert here.run("type(l1.rdtsc()).__name__") == "'Succeed'"


def test_history_is_kept(tmp_path: Path) -> None:
    """From one session to the next, for its owner alone; a wrong statement can be mended."""
    for expected in ("", "'remembered'"):
        terminal = Terminal(tmp_path, HERE)
        try:
            terminal.wait()
            if expected:
                terminal.type("\x10\r")  # Ctrl-P: the line before
                assert expected in terminal.wait(seconds=60)
            else:
                terminal.run("'remem' + 'bered'")
            assert terminal.end("d")[1] == 0
        finally:
            terminal.kill()
    file = tmp_path / "kvmnest" / "shell-history"
    assert file.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("arguments", [HERE, IN_LAB], ids=["here", "lab"])
def test_reader_of_the_output_that_leaves(arguments: list[str]) -> None:
    """``kvmnest shell < statements | head -1``: no traceback."""
    source = "for i in range(20000): print('line', i)\n\n" * 3
    with subprocess.Popen(
        [sys.executable, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin
        assert process.stdout
        assert process.stderr
        process.stdin.write(source)
        process.stdin.close()
        assert process.stdout.readline() == "line 0\n"
        process.stdout.close()
        errors = process.stderr.read()
    assert "Traceback" not in errors
    assert PROMPT not in errors
