"""For all tests of the harness."""

import signal


def pytest_configure() -> None:
    # A background job of a script starts with SIGINT ignored, and so would all that tests start
    # and interrupt.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
