"""Finding assertions in compiled code."""

from kvmnest.plugin.asserts import asserts


def _compiled(source: str, name: str = "f", module: str = "kvmnest.suite.sample"):
    scope = {"__name__": module}
    exec(compile(source, "sample.py", "exec"), scope)
    return scope[name]


def test_plain_assert():
    assert asserts(_compiled("def f(): assert x"))


def test_raise():
    assert asserts(_compiled("def f(): raise AssertionError('no')"))


def test_none():
    assert not asserts(_compiled("def f(): return 1"))


def test_lambda_inside():
    assert asserts(_compiled("def f():\n def g():\n  assert x\n return g"))


def test_helpers_in_turn():
    source = "def check_a(): check_b()\ndef check_b(): assert x\ndef f(): check_a()"
    assert asserts(_compiled(source))


def test_recursive_helpers_end():
    source = "def check_a(): check_b()\ndef check_b(): check_a()\ndef f(): check_a()"
    assert not asserts(_compiled(source))


def test_helper_of_another_package_does_not_count():
    function = _compiled("def f(): check_it()")
    function.__globals__["check_it"] = _compiled("def check_it(): assert x", "check_it", "other.m")
    assert not asserts(function)


def test_helper_in_a_module():
    import types

    function = _compiled("def f(): helpers.check_it()")
    function.__globals__["helpers"] = helpers = types.ModuleType("kvmnest.suite.helpers")
    helpers.check_it = _compiled("def check_it(): assert x", "check_it")
    assert asserts(function)
