"""Named settings of KVM."""

import pytest

from kvmnest import settings
from kvmnest.errors import UsageError


def test_every_setting_is_whole():
    names = [setting.name for setting in settings.every()]
    assert len(names) == len(set(names)) >= 10
    assert len({tuple(s.params.items()) for s in settings.every()}) == len(names)
    for setting in settings.every():
        assert setting.why
        assert setting.params


def test_chosen():
    assert settings.choose(["all"]) == settings.every()
    assert [s.name for s in settings.choose(["no-vpid", "no-ept"])] == ["no-vpid", "no-ept"]
    assert settings.choose([]) == ()


@pytest.mark.parametrize("names", [["no-such"], ["all", "no-ept"], ["ept=0"]])
def test_no_such_setting(names):
    with pytest.raises(UsageError, match=r"no setting is called .*no-shadow-vmcs"):
        settings.choose(names)


@pytest.mark.parametrize(
    ("name", "release", "expected"),
    [
        ("early-check", "6.1.0-56-cloud-amd64", True),
        ("early-check", "7.3.4+deb13-cloud-amd64", False),
        ("no-mbec", "6.18.15+deb13-cloud-amd64", False),
        ("no-mbec", "7.3.4+deb13-cloud-amd64", True),
        ("no-ept", "5.10.0-1-amd64", True),
    ],
)
def test_kernels_that_have_the_parameters(name, release, expected):
    (setting,) = settings.choose([name])
    assert setting.exists_on(release) is expected


@pytest.mark.parametrize(
    ("name", "release", "cpu_flags", "expected"),
    [
        (
            "early-check",
            "6.1.0-56-cloud-amd64",
            "vmx ept tsc_scaling",
            "on a CPU with tsc_scaling: ",
        ),
        ("early-check", "6.1.0-56-cloud-amd64", "vmx ept", ""),
        ("early-check", "7.3.4+deb13-cloud-amd64", "vmx ept", "has no such parameter"),
        ("no-ept", "6.1.0-56-cloud-amd64", "vmx ept tsc_scaling", ""),
    ],
)
def test_why_a_setting_is_left_out(name, release, cpu_flags, expected):
    (setting,) = settings.choose([name])
    why = setting.why_left_out(release, cpu_flags)
    assert expected in why
    assert bool(why) is bool(expected)
