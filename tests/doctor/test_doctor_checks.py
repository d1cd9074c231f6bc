"""kvmnest doctor and caps on this machine and in the lab."""

import json

import pytest

from kvmnest.cli.main import main
from kvmnest.doctor import capabilities, checks
from kvmnest.errors import HarnessError
from kvmnest.lab import DEFAULT_KERNEL, tools
from kvmnest.lab.errors import LabSetupError


def test_doctor_names_a_target_and_says_why(capsys):
    code = main(["doctor", "--json"])
    document = json.loads(capsys.readouterr().out)
    assert code == (0 if document["target"] else 3)
    states = {check["name"]: check["state"] for check in document["checks"]}
    assert {"kernel", "VT-x", "kvm_intel", "/dev/kvm"} <= states.keys()
    if states["VT-x"] == "bad":
        assert document["target"] != "kvm"
    assert main(["doctor"]) == code
    assert ("not ready" in capsys.readouterr().out) == (code == 3)


def test_a_missing_tool_is_named_with_its_package(monkeypatch):
    real = tools.find

    def find(name):
        if name == "bochs":
            raise LabSetupError("bochs not found: apt-get install bochs bochs-term")
        return real(name)

    monkeypatch.setattr(tools, "find", find)
    found = {check.name: check for check in checks.examine().checks}
    assert found["lab: bochs"].state == "bad"
    assert found["lab: bochs"].fix == "apt-get install bochs bochs-term"
    assert checks.examine().target != "lab"


def test_a_full_disk_is_bad(monkeypatch):
    monkeypatch.setattr(checks, "DISK_NEEDED", 1 << 62)
    found = {check.name: check for check in checks.examine().checks}
    assert found["lab: disk"].state == "bad"
    assert "XDG_CACHE_HOME" in found["lab: disk"].fix


def test_caps_of_the_lab_and_their_difference(tmp_path, capsys):
    assert main(["caps", "--target", "lab", "--json"]) == 0
    text, told = capsys.readouterr()
    assert f"kvmnest: booting {json.loads(text)['kernel']} in the lab: some seconds\n" in told
    saved = tmp_path / "full.json"
    saved.write_text(text)
    document = json.loads(text)
    assert int(document["msrs"]["0x480"], 16) >> 32 & 0x1FFF == 4096
    # IA32_VMX_MISC bit 6: the HLT activity state.
    document["msrs"]["0x485"] = f"{int(document['msrs']['0x485'], 16) & ~(1 << 6):#x}"
    changed = tmp_path / "less.json"
    changed.write_text(json.dumps(document))
    assert main(["caps", "diff", str(saved), str(changed)]) == 1
    out = capsys.readouterr().out.splitlines()
    assert out[0].split() == ["IA32_VMX_MISC", "ACTIVITY_HLT", "1", "->", "0"]
    assert out[1:] == ["1 differences"]
    assert main(["caps", "diff", str(saved), str(saved)]) == 0


@pytest.mark.parametrize("content", ["", "[]", '{"schema": 7, "msrs": {}}', '{"schema": 1'])
def test_a_file_that_is_none_of_ours(tmp_path, content):
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(HarnessError, match=r"x\.json"):
        capabilities.load(path)


@pytest.mark.parametrize("wrong", ["nosuch", "none.json"])
def test_the_second_of_two_is_looked_at_before_the_first_boots(wrong, prepared, capsys):
    assert main(["caps", "diff", DEFAULT_KERNEL, wrong]) == 2
    told = capsys.readouterr().err
    assert wrong in told
    assert told.count("\n") == 1


def test_wrong_words(capsys):
    assert main(["caps", "diff", "a.json"]) == 2
    assert "diff A B" in capsys.readouterr().err
    assert main(["caps", "diff", "/nonexistent/a.json", "b.json"]) == 2
    assert "a.json" in capsys.readouterr().err
