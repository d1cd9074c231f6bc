"""The compiled declarations (``ffi``) and the C library (``libc``)."""

from typing import Any, TypeAlias

from kvmnest.errors import HarnessError
from kvmnest.kvm import cdef

try:
    from kvmnest.kvm import _abi
except ImportError as error:
    raise HarnessError(
        "kvmnest/kvm/_abi.py is missing or unusable "
        f"({error}); generate it with: python -m kvmnest.kvm.cdef"
    ) from error

if getattr(_abi, "FINGERPRINT", None) != cdef.FINGERPRINT:
    raise HarnessError(
        "kvmnest/kvm/_abi.py does not match kvmnest/kvm/cdef.py; "
        "generate it again with: python -m kvmnest.kvm.cdef"
    )

# A C object of cffi. Its fields exist only at run time, so no narrower type is possible.
CData: TypeAlias = Any

ffi: Any = _abi.ffi
libc: Any = ffi.dlopen(None)
NULL: CData = ffi.NULL
