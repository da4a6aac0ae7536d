"""The header of a safetensors file, checked before anything is allocated.

The format: eight bytes with the length of a JSON header, the header (a name for every tensor
with its type, shape and the byte range it takes), then the data without holes. Read here
rather than through the `safetensors` package, which does not say where a tensor lies, and
`checkpoint` maps the file once for all readers. A test holds both to the same answers.
"""

import json
import math
from typing import Any

import torch

from tierline.base.errors import SpecError
from tierline.engine.mapped import MappedFile, Stored

HEADER_BYTES_MAX = 100_000_000  # the format's own limit

TORCH_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def read_safetensors(file: MappedFile, *, number: int) -> dict[str, Stored]:
    """Where every tensor of `file`, the checkpoint's file `number`, lies.

    Raises `SpecError` that says what was expected and what was found.
    """
    header, start = _header(file)
    header.pop("__metadata__", None)
    data_bytes = file.size_bytes - start
    found = {
        name: _stored(file, name, entry, start=start, data_bytes=data_bytes, number=number)
        for name, entry in header.items()
    }
    at = start
    for name, stored in sorted(found.items(), key=lambda item: (item[1].offset, item[0])):
        if stored.offset != at:
            raise _damaged(file, f"tensor {name!r} starts at byte {stored.offset}, expected {at}")
        at += stored.size_bytes
    if at != file.size_bytes:
        raise _damaged(file, f"{file.size_bytes} bytes long, its header accounts for {at}")
    return found


def _header(file: MappedFile) -> tuple[dict[str, Any], int]:
    """The JSON header, and where the data starts."""
    if file.size_bytes < 8:
        raise _damaged(file, f"only {file.size_bytes} bytes long")
    size = int.from_bytes(file.map()[:8], "little")
    if size > min(HEADER_BYTES_MAX, file.size_bytes - 8):
        raise _damaged(
            file, f"its header should take {size} bytes, the file has {file.size_bytes - 8}"
        )
    try:
        header = json.loads(file.map()[8 : 8 + size].decode(), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise _damaged(file, f"its header is not JSON ({error})") from None
    if not isinstance(header, dict):
        raise _damaged(file, "its header is not a JSON object")
    return header, 8 + size


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object in which no key comes twice."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name comes twice")
    return found


def _stored(
    file: MappedFile, name: str, entry: Any, *, start: int, data_bytes: int, number: int
) -> Stored:
    """One entry of the header, checked."""
    match entry:
        case {"dtype": str(kind), "shape": list(shape), "data_offsets": [int(begin), int(end)]}:
            pass
        case _:
            raise _damaged(file, f"the header's entry for {name!r} is not a tensor")
    if kind not in TORCH_TYPES:
        raise SpecError(
            f"{str(file.path)!r}: tensor {name!r} has type {kind!r}",
            hint=f"types read: {', '.join(TORCH_TYPES)}",
        )
    if not all(type(n) is int and 0 <= n < 1 << 40 for n in shape):
        raise _damaged(file, f"tensor {name!r} has shape {shape}")
    if not 0 <= begin <= end <= data_bytes:
        raise _damaged(
            file, f"tensor {name!r} takes bytes {begin} to {end} of {data_bytes} bytes of data"
        )
    needed = math.prod(shape) * TORCH_TYPES[kind].itemsize
    if end - begin != needed:
        raise _damaged(
            file, f"tensor {name!r}, {kind} {shape}, takes {needed} bytes, found {end - begin}"
        )
    return Stored(
        file=number, offset=start + begin, size_bytes=needed, shape=tuple(shape), type=kind
    )


def _damaged(file: MappedFile, what: str) -> SpecError:
    return SpecError(
        f"{str(file.path)!r} is not a whole safetensors file: {what}",
        hint="download or copy it again",
    )
