"""A trained model on disk: its config, its weights by name, and checks before any allocation.

`network` asks for tensors by the names of a Hugging Face checkpoint, whatever the file is:
a folder with `config.json` and safetensors files, or one GGUF file. Opening reads headers
only. A tensor shares the pages of the mapped file where the file holds plain numbers; GGUF's
quantised blocks become numbers on demand, or are handed out as they are (`compact`).

Pickled weights (`.bin`, `.pt`) are refused: unpickling runs whatever program is inside.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from tierline.base.errors import DoesNotFitError, SpecError
from tierline.base.files import read_text
from tierline.engine.gguf_blocks import BLOCKS, dequantise
from tierline.engine.mapped import MappedFile, Stored
from tierline.engine.safetensors_file import TORCH_TYPES, read_safetensors

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
COMPACT = ("Q8_0", "Q4_0", "Q4_1")  # what native kernels multiply without unpacking
SHOWN_MAX = 8  # names in a message


class Checkpoint:
    """One model on disk, open. Make one with `open_checkpoint`."""

    def __init__(
        self,
        path: Path,
        *,
        config: Mapping[str, Any],
        metadata: Mapping[str, Any],
        files: list[MappedFile],
        stored: Mapping[str, Stored],
    ) -> None:
        self.path = path
        self.name = path.stem if path.is_file() else path.resolve().name
        self.config = config
        self.metadata = metadata  # a GGUF file's own values; empty for a folder
        self.shapes: Mapping[str, tuple[int, ...]] = {n: s.shape for n, s in stored.items()}
        self.weight_bytes = sum(s.size_bytes for s in stored.values())
        self._files, self._stored = files, stored

    @cached_property
    def dtype(self) -> torch.dtype | str:
        """What most of the weights are stored as: a torch type, or the name of a GGUF block."""
        sizes: Counter[str] = Counter()
        for stored in self._stored.values():
            sizes[stored.type] += math.prod(stored.shape)
        kind = max(sorted(sizes), key=lambda kind: sizes[kind])
        return TORCH_TYPES.get(kind, kind)

    @cached_property
    def revision(self) -> str:
        """Sixteen hex digits that tell this model from others: a salt for its KV cache.

        Over the name, the config, all headers and 64 bytes from the middle of every tensor, so
        that two fine-tunes of one shape differ without reading all weights.
        """
        config = json.dumps(dict(self.config), sort_keys=True)
        digest = hashlib.sha256(f"{self.name}\n{config}".encode())
        for name, stored in sorted(self._stored.items()):
            middle = stored.offset + stored.size_bytes // 2
            end = min(middle + 64, stored.offset + stored.size_bytes)
            digest.update(f"{name} {stored.type} {stored.shape} {stored.offset}".encode())
            digest.update(self._files[stored.file].map()[middle:end])
        return digest.hexdigest()[:16]

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The tensor `name` on the CPU, in `dtype` or as the file has it (blocks: float32).

        Shares the file's pages when nothing has to be computed. Never write into it.
        """
        stored = self._at(name)
        raw = self._files[stored.file].bytes_of(stored)
        if stored.type in BLOCKS:
            plain = dequantise(stored.type, raw, dtype=dtype or torch.float32)
        else:
            kind = TORCH_TYPES[stored.type]
            if stored.offset % kind.itemsize:  # torch may assume that numbers are aligned
                raw = raw.clone()
            plain = raw.view(kind)
        plain = _half_split(plain.view(stored.shape), stored.interleaved_heads)
        if stored.added:
            plain = plain - stored.added
        return plain if dtype is None else plain.to(dtype)

    def compact(self, name: str) -> tuple[str, torch.Tensor] | None:
        """The quantised blocks of a matrix, or None when it is not stored as `COMPACT` ones.

        The type's name and uint8 [rows, bytes of a row], rows in the order of `tensor`.
        """
        stored = self._at(name)
        if stored.type not in COMPACT or len(stored.shape) != 2:
            return None
        raw = self._files[stored.file].bytes_of(stored).view(stored.shape[0], -1)
        return stored.type, _half_split(raw, stored.interleaved_heads)

    def require(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """Raise `SpecError` unless every expected tensor is there in its shape."""
        wrong = [
            f"{name}: expected {list(shape)}, found {_found(self.shapes.get(name))}"
            for name, shape in expected.items()
            if self.shapes.get(name) != tuple(shape)
        ]
        if wrong:
            shown = "; ".join(wrong[:SHOWN_MAX])
            more = f"; and {len(wrong) - SHOWN_MAX} more" if len(wrong) > SHOWN_MAX else ""
            raise SpecError(
                f"checkpoint {self.name!r} does not hold the weights its config describes: "
                f"{shown}{more}",
                hint="config.json and the weights must be of the same model, and complete",
            )

    def require_fits(self, available_bytes: int, *, dtype: torch.dtype | None = None) -> None:
        """Raise `DoesNotFitError` when the weights, held as `dtype` (None: as stored), are more."""
        elements = sum(math.prod(shape) for shape in self.shapes.values())
        needed = self.weight_bytes if dtype is None else elements * dtype.itemsize
        if needed <= available_bytes:
            return
        hint = f"at most {available_bytes / 2e9:.1f} billion weights fit in bfloat16"
        if dtype is not None and dtype.itemsize > 2 and elements * 2 <= available_bytes:
            hint = f"bfloat16 would fit: it needs {elements * 2 / 1e9:.1f} GB"
        elif self.weight_bytes <= available_bytes:
            hint = f"it would fit as stored ({self.weight_bytes / 1e9:.1f} GB)"
        raise DoesNotFitError(
            f"checkpoint {self.name!r}, {elements / 1e9:.2f} billion weights as "
            f"{str(dtype or self.dtype).removeprefix('torch.')},",
            needed_bytes=needed,
            available_bytes=available_bytes,
            hint=f"{hint}; choose a smaller model or a smaller type of weights",
        )

    def release(self) -> None:
        """Drop the maps, so that their pages no longer count as this process's memory.

        Call it once the weights are packed. Tensors handed out before stay valid.
        """
        for file in self._files:
            file.release()

    def _at(self, name: str) -> Stored:
        assert name in self._stored, f"no tensor {name!r}; call require() first"
        return self._stored[name]


def _half_split(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of `heads` heads from interleaved rotary order (x0 y0 x1 y1 ..) to x0 x1 .. y0 y1 .."""
    if not heads:
        return tensor
    pairs = tensor.view(heads, tensor.shape[0] // heads // 2, 2, *tensor.shape[1:])
    return pairs.transpose(1, 2).reshape(tensor.shape)


def _found(shape: tuple[int, ...] | None) -> str:
    return "nothing" if shape is None else str(list(shape))


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a folder with `config.json` and safetensors files, or one `.gguf` file.

    Reads headers only. Raises `SpecError` for anything damaged, missing or not readable.
    """
    path = Path(path)
    if path.suffix in PICKLES:
        raise _pickled(path)
    if path.is_dir():
        return _open_folder(path)
    if path.is_file() and path.suffix == ".safetensors":
        raise SpecError(
            f"{str(path)!r} is one file of a checkpoint", hint="pass the folder it lies in"
        )
    return _open_gguf(path)


def _open_gguf(path: Path) -> Checkpoint:
    from tierline.engine.gguf_file import config_of, read_header, renamed

    file = MappedFile(path)
    header = read_header(file)
    config = config_of(header, where=str(path))
    stored = renamed(header, config, where=str(path))
    return Checkpoint(path, config=config, metadata=header.metadata, files=[file], stored=stored)


def _open_folder(path: Path) -> Checkpoint:
    config = read_object(path / "config.json", what="model config")
    files = [MappedFile(file) for file in _weight_files(path)]
    stored: dict[str, Stored] = {}
    for number, file in enumerate(files):
        tensors = read_safetensors(file, number=number)
        twice = sorted(stored.keys() & tensors.keys())
        if twice:
            raise SpecError(f"{str(file.path)!r}: tensor {twice[0]!r} lies in another file, too")
        stored |= tensors
    _check_index(path, files, stored)
    if not stored:
        raise SpecError(f"checkpoint {str(path)!r} holds no tensors")
    return Checkpoint(path, config=config, metadata={}, files=files, stored=stored)


def _weight_files(path: Path) -> list[Path]:
    """The safetensors files of a folder, all of those that its index names."""
    index = path / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(_weight_map(index).values()))
        missing = [name for name in names if not (path / name).is_file()]
        if missing:
            raise SpecError(
                f"checkpoint {str(path)!r} lacks {len(missing)} of {len(names)} files: "
                f"{', '.join(missing[:SHOWN_MAX])}",
                hint="download the missing files into the folder",
            )
        return [path / name for name in names]
    found = sorted(path.glob("*.safetensors"))
    if not found:
        pickles = sorted(p for p in path.iterdir() if p.suffix in PICKLES)
        if pickles:
            raise _pickled(pickles[0])
        raise SpecError(
            f"no .safetensors files in {str(path)!r}",
            hint="a checkpoint is a folder with config.json and *.safetensors, or a .gguf file",
        )
    return found


def _weight_map(index: Path) -> Mapping[str, str]:
    """Which file holds which tensor."""
    found = read_object(index, what="checkpoint index").get("weight_map")
    if not isinstance(found, dict) or not all(
        isinstance(name, str) and Path(name).name == name for name in found.values()
    ):
        raise SpecError(f"{str(index)!r}: weight_map is not an object of file names")
    return found


def _check_index(path: Path, files: list[MappedFile], stored: Mapping[str, Stored]) -> None:
    """Every tensor lies in the file that the index names."""
    index = path / "model.safetensors.index.json"
    if not index.is_file():
        return
    for name, file in _weight_map(index).items():
        if name not in stored or files[stored[name].file].path.name != file:
            raise SpecError(
                f"{str(path)!r}: the index says that {file!r} holds {name!r}, it does not",
                hint="download the folder again: its files are of different models",
            )


def read_object(path: Path, *, what: str) -> dict[str, Any]:
    """The JSON object in `path`. Raises `InputError` or `SpecError` that says what is wrong."""
    try:
        value = json.loads(read_text(path, what=what))
    except (ValueError, RecursionError) as error:
        raise SpecError(f"{what} {str(path)!r} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise SpecError(f"{what} {str(path)!r} is not a JSON object")
    return value


def _pickled(path: Path) -> SpecError:
    return SpecError(
        f"{str(path)!r} holds pickled weights, which are never loaded: a pickle is a program",
        hint="convert them to safetensors (transformers: save_pretrained), or use a GGUF file",
    )
