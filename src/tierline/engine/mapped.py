"""Weight files as memory maps, and where in them a tensor lies.

`safetensors_file` and `gguf_file` read headers and answer with `Stored` values; `checkpoint`
turns those into tensors that share the file's pages, so that a weight is in memory once.

A map is private (copy on write): torch wants writable memory, and nobody's write may reach
the file. Maps open at first use and can be dropped at any time; see `MappedFile.release`.
"""

import mmap
from dataclasses import dataclass
from pathlib import Path

import torch

from tierline.base.errors import DependencyError, SpecError


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """One tensor of a checkpoint, as a file holds it."""

    file: int  # which of the checkpoint's files
    offset: int  # bytes from the start of that file
    size_bytes: int
    shape: tuple[int, ...]
    type: str  # "F32", "BF16", ..., or a GGUF block type such as "Q4_1"
    interleaved_heads: int = 0  # rows of so many heads are in interleaved rotary order; 0: not
    added: float = 0.0  # what the file's writer added to every element (Gemma's norms in GGUF)


class MappedFile:
    """One file, mapped as a whole while somebody reads it."""

    __slots__ = ("_map", "path", "size_bytes")

    def __init__(self, path: Path) -> None:
        """Raises `SpecError` when there is no such file, or an empty one."""
        try:
            self.size_bytes = path.stat().st_size
        except OSError as error:
            raise SpecError(f"cannot read {str(path)!r}: {error.strerror}") from None
        if not path.is_file() or self.size_bytes == 0:
            raise SpecError(f"{str(path)!r} is {'empty' if path.is_file() else 'not a file'}")
        self.path = path
        self._map: mmap.mmap | None = None

    def map(self) -> mmap.mmap:
        """The bytes of the file. Raises when the file has changed size since it was opened."""
        if self._map is None:
            try:
                with self.path.open("rb") as file:
                    self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            except (OSError, ValueError) as error:
                raise DependencyError(f"cannot map {str(self.path)!r}: {error}") from None
            if len(self._map) != self.size_bytes:
                self._map = None
                raise DependencyError(
                    f"{str(self.path)!r} changed while it was being read",
                    hint="wait until the download or copy is done, then load it again",
                )
        return self._map

    def bytes_of(self, stored: Stored) -> torch.Tensor:
        """The bytes of one tensor, uint8 [size], sharing the map's memory."""
        assert stored.offset + stored.size_bytes <= self.size_bytes
        if stored.size_bytes == 0:
            return torch.empty(0, dtype=torch.uint8)
        return torch.frombuffer(
            self.map(), dtype=torch.uint8, count=stored.size_bytes, offset=stored.offset
        )

    def release(self) -> None:
        """Hand the pages back to the system; the next read maps them again.

        Tensors that still share the map stay valid: their pages come back from the file when
        touched, and the map closes with the last of them.
        """
        if self._map is not None:
            self._map.madvise(mmap.MADV_DONTNEED)
            self._map = None
