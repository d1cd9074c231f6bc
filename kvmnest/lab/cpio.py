"""Writer of initramfs archives (the "newc" cpio format of the kernel's initramfs buffer)."""

import stat


class Cpio:
    """An archive built in memory: add entries, then take ``finish()``.

    Parent directories are added on demand. Entries belong to root; modification times are kept
    (whole seconds), because Python compares them with what a .pyc records.
    """

    def __init__(self) -> None:
        """Start empty."""
        self._parts: list[bytes] = []
        self._seen: set[str] = set()
        self._inode = 0

    def _add(self, name: str, mode: int, data: bytes, mtime: int, rdev: tuple[int, int]) -> None:
        self._inode += 1
        encoded = name.encode() + b"\0"
        fields = (self._inode, mode, 0, 0, 1, mtime, len(data), 0, 0, *rdev, len(encoded), 0)
        header = b"070701" + b"".join(b"%08X" % field for field in fields)
        head = header + encoded
        self._parts += [head, bytes(-len(head) % 4), data, bytes(-len(data) % 4)]

    def _parents(self, name: str) -> None:
        parent = name.rpartition("/")[0]
        if parent and parent not in self._seen:
            self.directory(parent)

    def directory(self, name: str, mode: int = 0o755) -> None:
        """Add directory ``name`` (no leading slash) and its parents, once."""
        if name in self._seen:
            return
        self._parents(name)
        self._seen.add(name)
        self._add(name, stat.S_IFDIR | mode, b"", 0, (0, 0))

    def file(self, name: str, data: bytes, mode: int = 0o644, mtime: int = 0) -> None:
        """Add a regular file."""
        self._parents(name)
        self._add(name, stat.S_IFREG | mode, data, mtime, (0, 0))

    def symlink(self, name: str, target: str) -> None:
        """Add a symbolic link."""
        self._parents(name)
        self._add(name, stat.S_IFLNK | 0o777, target.encode(), 0, (0, 0))

    def device(self, name: str, major: int, minor: int) -> None:
        """Add a character device."""
        self._parents(name)
        self._add(name, stat.S_IFCHR | 0o600, b"", 0, (major, minor))

    def finish(self) -> bytes:
        """Return the archive with its trailer."""
        self._add("TRAILER!!!", 0, b"", 0, (0, 0))
        data = b"".join(self._parts)
        return data + bytes(-len(data) % 512)


def names(archive: bytes) -> dict[str, tuple[int, bytes]]:
    """Parse an uncompressed archive: path -> (mode, content). Raises ValueError if malformed."""
    found: dict[str, tuple[int, bytes]] = {}
    at = 0
    while at < len(archive):
        if archive[at : at + 6] != b"070701":
            raise ValueError(f"no newc header at offset {at}")
        fields = [int(archive[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
        size, name_size = fields[6], fields[11]
        name = archive[at + 110 : at + 110 + name_size - 1].decode()
        body = at + (110 + name_size + 3) // 4 * 4
        if name == "TRAILER!!!":
            at = -(-body // 512) * 512
            continue
        found[name] = (fields[1], archive[body : body + size])
        at = body + (size + 3) // 4 * 4
    return found
