"""What the kernel says during a case: reports of defects fail it, other messages do not."""

import contextlib
import os

import file_runs
import pytest

from kvmnest import kmsg, known
from kvmnest.kernel_reports import reports, told
from kvmnest.known import Deviation, Known
from kvmnest.reports.model import Run
from kvmnest.run.judge import CRASHED, Judge

_WARN = "WARNING: CPU: 0 PID: 7 at arch/x86/kvm/vmx/nested.c:35 nested_vmx_run+0x1/0x2 [kvm_intel]"


@pytest.mark.parametrize(
    "text",
    [
        _WARN,
        "WARNING: arch/x86/kvm/vmx/nested.c:35 at nested_vmx_run+0x1/0x2 [kvm_intel], CPU#0: py/7",
        "BUG: kernel NULL pointer dereference, address: 0000000000000008",
        "BUG: unable to handle page fault for address: ffffc90000000000",
        "BUG: KASAN: slab-use-after-free in kvm_vcpu_ioctl+0x1/0x2",
        "BUG: sleeping function called from invalid context at mm/slab.h:1",
        "watchdog: BUG: soft lockup - CPU#0 stuck for 22s! [python3:7]",
        "kernel BUG at arch/x86/kvm/x86.c:100!",
        "Oops: 0000 [#1] PREEMPT SMP NOPTI",
        "general protection fault, probably for non-canonical address 0xdead: 0000 [#1]",
        "invalid opcode: 0000 [#1] PREEMPT SMP NOPTI",
        "INFO: task python3:7 blocked for more than 120 seconds.",
        "rcu: INFO: rcu_preempt detected stalls on CPUs/tasks:",
        "rcu: INFO: rcu_sched self-detected stall on CPU",
        "UBSAN: shift-out-of-bounds in arch/x86/kvm/x86.c:1:2",
        "WARNING: possible circular locking dependency detected",
        "WARNING: possible recursive locking detected",
        "WARNING: inconsistent lock state",
        "WARNING: suspicious RCU usage",
        "WARNING: bad unlock balance detected!",
        "kvm [7]: vcpu0, guest rIP: 0xfff0 unhandled exit 0x1",
        "kvm_intel: kvm [7]: vcpu0, guest rIP: 0xfff0 vmx: unexpected exit reason 0x4c",
    ],
)
def test_reports(text):
    assert reports(f"[    1.000000] harmless\n[   12.345678] {text}\n") == [text]


@pytest.mark.parametrize(
    "text",
    [
        "------------[ cut here ]------------",
        "Call Trace:",
        "i915 0000:00:02.0: [drm] *ERROR* CPU pipe A FIFO underrun",
        "nvme nvme0: WARNING: the device asks for more",
        "WARNING! power/level is deprecated; use power/control instead",
        "usb 1-1: device descriptor read/64, error -71",
        "kvm: SMP vm created on host with unstable TSC",
        "kvm [7]: vcpu0, guest rIP: 0xfff0 unhandled rdmsr: 0x1",
        "kvm_intel: kvm [88]: vcpu0, guest rIP: 0x0 Unhandled WRMSR(0x1d9) = 0x2",
        "audit: type=1400 msg='BUG: not one'",
        "python3[7]: segfault at 0 ip 0 sp 0 error 4",
    ],
)
def test_other_messages_are_no_reports(text):
    assert reports(f"[   12.345678] {text}\n") == []


def test_the_trace_of_a_report_is_told():
    log = f"other\n[ 1.0] ------------[ cut here ]------------\n[ 1.0] {_WARN}\n[ 1.0] RIP: x\n"
    assert told(log).splitlines()[0].endswith("[ cut here ]------------")
    assert told(log).splitlines()[-1] == "[ 1.0] RIP: x"
    assert told(f"{_WARN}\n" + "line\n" * 99).endswith("(60 more lines in kernel_log)")


def test_the_text_of_a_warning_is_told():
    cut = "------------[ cut here ]------------\n"
    log = f"other\n{cut}earlier\n{cut}nVMX: the text of\nthe warning\n{_WARN}\n"
    assert told(log) == f"{cut}nVMX: the text of\nthe warning\n{_WARN}"
    assert told(f"{cut}" + "other\n" * 9 + _WARN) == _WARN


@pytest.mark.parametrize(
    ("before", "stamp", "belongs"),
    [
        ("[    9.000100] kvmnest: planted", "[    9.000120] ", True),
        ("[    8.000100] another message", "[    9.000120] ", False),
        ("a message without its time", "[    9.000120] ", False),
        ("[    9.000100] a message", "", False),
    ],
)
def test_the_text_of_a_warning_without_a_line_to_cut_at(before, stamp, belongs):
    report = "WARNING: vmx/nested.c:3799 at nested_vmx_run+0x1/0x2 [kvm_intel], CPU#0: x/8"
    expected = [before] * belongs + [stamp + report]
    assert told(f"[    1.000000] boot\n{before}\n{stamp}{report}").splitlines() == expected


def _judge(deviations=(), *, readable=True):
    judge = Judge(Run("lab"))
    facts = {"kernel": "6.1.0-56", "kvm_params": {}, "kernel_log": readable}
    judge.event({"e": "session", **facts})
    judge._known = Known(deviations)
    cases = [["a", 3], ["b", 3]]
    judge.event({"e": "collected", "count": 2, "first": 0, "cases": cases})
    return judge


def _case(judge, name, outcome="passed", kernel="", lab="", detail="", summary=""):
    judge.event({"e": "start", "id": name, "series": 3, "sdm": None})
    if lab:
        judge.event({"e": "kernel", "text": lab, "from_lab": True})
    if kernel:
        judge.event({"e": "kernel", "text": kernel})
    more = {"seconds": 0.1, "detail": detail, "summary": summary}
    result = {"e": "result", "id": name, "series": 3, "sdm": None, "outcome": outcome, **more}
    judge.event(result)
    return judge.run.cases[-1]


@pytest.mark.parametrize("outcome", ["passed", "skipped"])
def test_a_report_fails_a_case_that_did_not(outcome):
    judge = _judge()
    case = _case(judge, "a", outcome, f"[    1.000000] {_WARN}\n[    1.000000] RIP: here\n")
    assert case.outcome == "failed"
    assert case.summary == f"the kernel reported: {_WARN}"
    assert "RIP: here" in case.detail
    assert case.kernel_log.count("WARNING") == 1
    assert _case(judge, "b").outcome == "passed"


def test_a_failure_keeps_its_own_summary():
    case = _case(_judge(), "a", "failed", _WARN, detail="why", summary="got 1, expected 2")
    assert (case.outcome, case.summary) == ("failed", "got 1, expected 2")
    assert "WARNING" in case.detail
    assert case.detail.endswith("why")


def test_other_messages_are_kept_and_fail_nothing():
    case = _case(_judge(), "a", kernel="[    1.0] usb 1-1: new device\n")
    assert (case.outcome, case.kernel_log) == ("passed", "[    1.0] usb 1-1: new device\n")


def test_known_reports():
    entry = Deviation("a*", "KVM warns", kernel_message="WARNING: * at arch/x86/kvm/vmx/nested.c*")
    judge = _judge([entry])
    case = _case(judge, "a", kernel=_WARN)
    assert (case.outcome, case.summary) == ("known", "KVM warns")
    assert _case(judge, "b", kernel=_WARN).outcome == "failed"
    both = _case(_judge([entry]), "a", kernel=f"{_WARN}\nBUG: soft lockup - CPU#0\n")
    assert (both.outcome, both.summary) == (
        "failed",
        "the kernel reported: BUG: soft lockup - CPU#0",
    )


def test_a_known_report_excuses_no_assertion_and_the_other_way_round():
    message = Deviation("a", "KVM warns", kernel_message="WARNING*")
    assert _case(_judge([message]), "a", "failed", _WARN).outcome == "failed"
    other = Deviation("a", "KVM is wrong")
    assert _case(_judge([other]), "a", "failed").outcome == "known"
    assert _case(_judge([other]), "a", "failed", _WARN).outcome == "failed"


def test_a_warning_once_may_stay_away():
    judge = _judge([Deviation("a", "KVM warns", kernel_message="WARNING*")])
    assert _case(judge, "a").outcome == "passed"
    assert judge.run.no_longer == []


def test_what_the_lab_says_too_is_taken_once():
    judge = _judge()
    case = _case(judge, "a", kernel=_WARN + "\n", lab=_WARN + "\n")
    assert case.kernel_log == _WARN + "\n"
    # It may come after the result, or before the cases' process has told: no matter.
    assert _case(judge, "b", lab="BUG: late\n").outcome == "passed"


def test_where_the_process_cannot_read_the_log_the_lab_is_believed():
    assert _case(_judge(readable=False), "a", lab=_WARN).outcome == "failed"


def test_last_words_of_a_kernel_belong_to_the_case_that_ran():
    judge = _judge()
    judge.event({"e": "start", "id": "a", "series": 3, "sdm": None})
    judge.event({"e": "kernel", "text": "kernel BUG at x.c:1!\n", "from_lab": True})
    judge.lost("the kernel panicked")
    case = judge.run.cases[0]
    assert (case.outcome, case.kernel_log) == ("error", "kernel BUG at x.c:1!\n")
    assert case.summary == f"{CRASHED}the kernel panicked"


@pytest.fixture
def records():
    """A pipe that keeps records apart, as /dev/kmsg does: (read end, write)."""
    end, to = os.pipe2(os.O_DIRECT | os.O_NONBLOCK)
    yield end, lambda text: os.write(to, text.encode())
    for fd in (end, to):
        with contextlib.suppress(OSError):
            os.close(fd)


def test_levels_and_facilities(records):
    end, write = records
    for level in range(8):
        write(f"{level},{level},{level}000000,-;level {level}\n SUBSYSTEM=x\n")
    write("12,9,9000000,-;of a program, warning\n")
    said = kmsg.read(end, 4).decode()
    assert [line.partition("] ")[2] for line in said.splitlines()] == [
        f"level {n}" for n in range(5)
    ]
    assert said.startswith("[    0.000000] level 0\n")
    assert kmsg.read(end) == b""
    write("6,1,1000000,-;information\n")
    assert b"information" in kmsg.read(end, 6)


def test_a_log_that_cannot_be_read_says_nothing(tmp_path):
    log = kmsg.KernelLog(path=str(tmp_path / "none"))
    assert (log.readable, log.drain()) == (False, "")


def test_the_pattern_of_a_message_is_read_from_the_record(tmp_path):
    path = tmp_path / "known.toml"
    path.write_text('[[deviation]]\ncase = "a"\nreason = "r"\nkernel_message = "WARNING: [x]*"\n')
    found = known.load("kvm", "6.1", {}, path)
    assert found.match("a") is None
    assert found.match_message("a", "WARNING: [x] y").reason == "r"
    assert found.match_message("a", "WARNING: x y") is None


def test_messages_reach_the_case_in_which_they_came(tmp_path):
    file = tmp_path / "test_log.py"
    file.write_text(
        f"""
import os
import pytest

@pytest.fixture(scope="session")
def say(pytestconfig):
    log = pytestconfig.pluginmanager.get_plugin("kvmnest-events")._kernel_log
    log.close()
    log._fd, to = os.pipe2(os.O_DIRECT | os.O_NONBLOCK)
    return lambda level, text: os.write(to, f"{{level}},1,1000000,-;{{text}}\\n".encode())

@pytest.fixture
def late(say):
    yield
    say(4, "{_WARN}")

def test_quiet(say): assert say
def test_other(say): assert say(4, "usb: trouble")
def test_warns(say): assert say(4, "{_WARN}")
def test_after(say): assert say
def test_teardown(late): assert 1
def test_last(say): assert say
"""
    )
    code, run = file_runs.run(tmp_path / "out", str(file))
    assert code == 1
    assert {case.id.rpartition("::")[2]: case.outcome for case in run.cases} == {
        "test_quiet": "passed",
        "test_other": "passed",
        "test_warns": "failed",
        "test_after": "passed",
        "test_teardown": "failed",
        "test_last": "passed",
    }
    assert "usb: trouble" in run.cases[1].kernel_log
    assert _WARN in run.cases[2].detail
