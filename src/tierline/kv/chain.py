"""Names of blocks: equal names mean equal tokens, an equal prefix before them, and one salt.

KV of the same tokens differs between model revisions and adapters, and must not be shared
between tenants.  So a chain starts from its salt and every block's name hashes the name
before it: no name under one salt occurs under another (INV-KV-25), and equality of one
block implies equality of all before it.
"""

import hashlib
import struct
from collections.abc import Sequence as Seq

NAME_BITS = 128  # a collision would serve one prompt with another's KV


def salt(*, model_revision: str, tenant: str = "", adapter: str = "") -> bytes:
    """The start of every chain that may share KV. `adapter` is name@digest, never a bare name.

    Raises AssertionError for an adapter without a digest: that is our bug, not the caller's.
    """
    assert not adapter or "@" in adapter, f"adapter {adapter!r} carries no digest"
    digest = hashlib.blake2b(digest_size=NAME_BITS // 8)
    for part in (model_revision, tenant, adapter):
        digest.update(len(part).to_bytes(4, "little"))
        digest.update(part.encode())
    return digest.digest()


def chain_of(tokens: Seq[int], *, block_tokens: int, start: bytes) -> list[int]:
    """Names of the full blocks of a prompt; `start` comes from `salt`."""
    names: list[int] = []
    pack = struct.Struct(f"<{len(start)}s{block_tokens}I").pack
    before = start
    for first in range(0, len(tokens) - block_tokens + 1, block_tokens):
        block = pack(before, *tokens[first : first + block_tokens])
        before = hashlib.blake2b(block, digest_size=NAME_BITS // 8).digest()
        names.append(int.from_bytes(before, "little"))
    return names


class TraceChain:
    """Names from a trace's block ids (chained already), subdivided and salted, as a view.

    A trace may tell prefixes in blocks of 512 tokens while memory is kept in blocks of 16:
    each id then names 32 blocks. Nothing is stored a block.
    """

    __slots__ = ("_ids", "_low", "_salt", "_shift")

    def __init__(self, ids: Seq[int], *, parts: int = 1, salt_number: int = 0) -> None:
        """Every id becomes `parts` blocks, a power of two; chains of one salt share a number."""
        self._ids = ids
        self._shift = parts.bit_length() - 1
        assert parts == 1 << self._shift
        self._low = parts - 1
        self._salt = salt_number << 64

    def __getitem__(self, i: int) -> int:
        return (self._ids[i >> self._shift] << self._shift) + (i & self._low) + self._salt

    def __len__(self) -> int:
        return len(self._ids) << self._shift


class GroupedChain:
    """Names of blocks that are larger than the trace's: the last name of each group."""

    __slots__ = ("_group", "_ids", "_salt")

    def __init__(self, ids: Seq[int], *, group: int, salt_number: int = 0) -> None:
        self._ids = ids
        self._group = group
        self._salt = salt_number << 64

    def __getitem__(self, i: int) -> int:
        return self._ids[(i + 1) * self._group - 1] + self._salt

    def __len__(self) -> int:
        return len(self._ids) // self._group
