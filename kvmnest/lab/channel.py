"""Frames that carry everything out of the guest, over a byte channel that others may write to.

A frame is MAGIC, kind (1 byte), length (4 bytes, little endian), CRC-32 of kind, length and
payload (4 bytes), payload. Bytes between frames (the emulator's own messages) are skipped and
kept aside; a frame that is damaged is an error, since its content would be lost silently.
"""

import binascii
import struct
from collections.abc import Iterator

MAGIC = b"\x1e\x02KN"
MAX_PAYLOAD = 1 << 16
_HEAD = struct.Struct("<BII")

READY = 1  # marshalled dict: the guest is up, modules are loaded
STDOUT = 2
STDERR = 3
EVENT = 4  # bytes of the command's event stream
KLOG = 5  # a kernel message of level warning or worse
MODULE_ERROR = 6  # marshalled (module, errno, kernel messages)
EXIT = 7  # marshalled wait status
SNAPSHOT = 9  # mark of the mailbox: everything is loaded, the guest waits for its job
FAILED = 8  # text: the guest's own start code failed


class ChannelError(ValueError):
    """A damaged frame."""


def frame(kind: int, payload: bytes) -> bytes:
    """Wrap ``payload`` (at most MAX_PAYLOAD bytes)."""
    crc = binascii.crc32(payload, binascii.crc32(struct.pack("<BI", kind, len(payload))))
    return MAGIC + _HEAD.pack(kind, len(payload), crc) + payload


class Decoder:
    """Incremental decoder: feed bytes, get whole frames; ``noise`` keeps the tail of the rest."""

    def __init__(self) -> None:
        """Start with nothing pending."""
        self._pending = bytearray()  # QEMU brings single bytes: to add one must cost no copy
        self.noise = b""

    def _skip(self, count: int) -> None:
        self.noise = (self.noise + self._pending[:count])[-8192:]
        del self._pending[:count]

    def feed(self, data: bytes) -> Iterator[tuple[int, bytes]]:
        """Yield (kind, payload) of each complete frame. Raises ChannelError on a damaged one."""
        self._pending += data
        head = len(MAGIC) + _HEAD.size
        while True:
            at = self._pending.find(MAGIC)
            if at < 0:
                # the last bytes may be the start of a magic
                self._skip(max(0, len(self._pending) - len(MAGIC) + 1))
                return
            if at:
                self._skip(at)
            if len(self._pending) < head:
                return
            kind, size, crc = _HEAD.unpack_from(self._pending, len(MAGIC))
            if size > MAX_PAYLOAD:
                raise ChannelError(f"frame of kind {kind} claims {size} bytes")
            if len(self._pending) < head + size:
                return
            payload = bytes(self._pending[head : head + size])
            whole = frame(kind, payload)
            if self._pending[: len(whole)] != whole:
                raise ChannelError(f"frame of kind {kind}, {size} bytes: checksum {crc:#x} differs")
            del self._pending[: head + size]
            yield kind, payload
