"""Guest memory: pages of this process that any VM can map."""

import errno
import fcntl
import mmap
import os

from kvmnest.kvm.native import CData, ffi

PAGE_SIZE = 4096
#: linux/fcntl.h
_F_ADD_SEALS, _F_SEAL_WRITE = 1033, 0x8

# Where it begins, a window of the memory as it is, what is to be there.
_Part = tuple[int, CData, memoryview]


class Memory:
    """``size`` bytes of zeroed memory, a multiple of the page size (4096).

    It lives independently of VMs: several can map it, one after another or at once, and it may
    outlive them. A VM that maps it keeps it alive. ``view`` is a writable memoryview of all of it.
    Raises ValueError for a bad size and OSError (ENOMEM).
    """

    def __init__(self, size: int) -> None:
        self._check_size(size)
        self.size = size
        self._map = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.view = memoryview(self._map)

    def __repr__(self) -> str:
        return f"<Memory of {self.size:#x} bytes>"

    @property
    def address(self) -> int:
        """Address in this process, for KVM. Raises ValueError after close()."""
        return int(ffi.cast("uintptr_t", ffi.from_buffer(self._map)))

    def read(self, offset: int, length: int) -> bytes:
        """Return ``length`` bytes at ``offset``. Raises IndexError beyond the end."""
        self._check(offset, length)
        return self._map[offset : offset + length]

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Store ``data`` at ``offset``. Raises IndexError beyond the end."""
        self._check(offset, len(data))
        self._map[offset : offset + len(data)] = data

    @property
    def map(self) -> mmap.mmap:
        """The pages themselves: slices are bytes, and there is no check of any bound."""
        return self._map

    def discard(self, offset: int) -> None:
        """Zero everything from ``offset`` (page-aligned) on by giving the pages back."""
        self._map.madvise(mmap.MADV_DONTNEED, offset, self.size - offset)

    @staticmethod
    def _check_size(size: int) -> None:
        if size <= 0 or size % PAGE_SIZE:
            raise ValueError(f"memory size {size:#x} is not a positive multiple of {PAGE_SIZE:#x}")

    def _check(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self.size:
            raise IndexError(
                f"bytes {offset:#x}..{offset + length:#x} are outside memory of {self.size:#x}"
            )

    def close(self) -> None:
        """Give the pages back. A slot that still maps them then faults (EFAULT in KVM_RUN).

        Slices of ``view`` that somebody keeps stay valid: the pages go when the last one does.
        """
        self.view.release()
        try:
            self._map.close()
        except BufferError:
            self._map = _closed_map()


class SealedMemory(Memory):
    """Guest memory that tells whether the kernel still refers to its pages.

    It is in a memfd, which the kernel lets be sealed only once nobody refers to it:
    memfd_create(2), fcntl(2) "F_SEAL_WRITE": EBUSY while there is a writable mapping, or while
    the kernel holds references to pages, as a KVM does that forgot to give a page back.
    """

    def __init__(self, size: int) -> None:
        self._check_size(size)
        self.size = size
        self._fd = os.memfd_create("kvmnest", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
        os.ftruncate(self._fd, size)
        self._map = mmap.mmap(self._fd, size, flags=mmap.MAP_SHARED)
        self.view = memoryview(self._map)

    def leaked(self) -> bool:
        """Unmap it and tell whether the kernel still refers to its pages.

        VMs that map it have to be closed before. It can be asked once. Raises OSError.
        """
        self.close()
        try:
            fcntl.fcntl(self._fd, _F_ADD_SEALS, _F_SEAL_WRITE)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            return True
        finally:
            os.close(self._fd)
        return False


class Image:
    """What the beginning of a ``Memory`` is to hold again later: ``content``, whole pages.

    It keeps the pages of that memory, also when the memory is closed.
    """

    #: Pages compared at once, since most groups are as they were.
    _GROUP = 8

    def __init__(self, memory: Memory, content: bytes) -> None:
        if len(content) % PAGE_SIZE or len(content) > memory.size:
            raise ValueError(f"{len(content):#x} bytes are not whole pages of {memory.size:#x}")
        self._map = memory.map
        self._base, self._content = ffi.from_buffer(memory.map), memoryview(content)
        self._groups = self._parts(0, len(content), self._GROUP * PAGE_SIZE)
        #: Group -> its pages, once it differed.
        self._pages: dict[int, list[_Part]] = {}

    def _parts(self, start: int, end: int, size: int) -> list[_Part]:
        cuts = [(at, min(size, end - at)) for at in range(start, end, size)]
        return [(at, ffi.buffer(self._base + at, n), self._content[at : at + n]) for at, n in cuts]

    def restore(self) -> None:
        """Write the pages that differ."""
        for start, present, wanted in self._groups:
            if present != wanted:
                pages = self._pages.get(start)
                if pages is None:
                    pages = self._parts(start, start + len(wanted), PAGE_SIZE)
                    self._pages[start] = pages
                for at, now, then in pages:
                    if now != then:
                        self._map[at : at + PAGE_SIZE] = then


def _closed_map() -> mmap.mmap:
    # A slice of the real map is alive and owns it from now on; every use of this one raises
    # the "mmap closed or invalid" that a plain close would give.
    stand_in = mmap.mmap(-1, PAGE_SIZE)
    stand_in.close()
    return stand_in
