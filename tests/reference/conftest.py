"""The reference target's own Bochs."""

from collections.abc import Iterator

import pytest

from kvmnest.lab import bochs_build
from kvmnest.reference.kvm import ReferenceKvm


@pytest.fixture(scope="session")
def built() -> str:
    """The program; ci/test has made it where there is no VT-x."""
    program = bochs_build.built()
    if program is None:
        pytest.skip("needs Bochs: kvmnest lab build")
    return str(program)


@pytest.fixture(scope="module")
def bare(built: str) -> Iterator[ReferenceKvm]:
    with ReferenceKvm() as kvm:
        yield kvm
