"""Files and hashes: nothing half-written, equal values give equal bytes."""

import gzip
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from tierline.base.errors import DependencyError, InputError


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces, so that equal values are equal strings."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def content_hash(value: Any) -> str:
    """SHA-256 of the canonical JSON of `value`, in hex."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def read_text(path: Path, *, what: str) -> str:
    """The text of `path`; raises `InputError` that says what could not be read and why."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot read {what} {str(path)!r}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"{what} {str(path)!r} is not UTF-8 text") from None


def write_text(path: Path, text: str) -> None:
    """The file at `path` becomes `text`, whole or not at all; see `whole_file`."""
    with whole_file(path) as file:
        file.write(text.encode())


@contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """Write beside, then rename: a reader sees the old file or the new one, never a part.

    Raises `DependencyError` when the folder cannot be made or written.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            yield file
        partial.replace(path)
    except OSError as error:
        raise DependencyError(
            f"cannot write {str(path)!r}: {error.strerror}",
            hint="choose an output folder that you may write to",
        ) from None
    finally:
        partial.unlink(missing_ok=True) if partial.parent.is_dir() else None


def packed(file: IO[bytes]) -> IO[bytes]:
    """What is written to this ends up in `file` as gzip; equal contents are equal bytes."""
    return cast("IO[bytes]", gzip.GzipFile("", "wb", compresslevel=6, fileobj=file, mtime=0))
