"""Randomness, as an argument: named streams that all come from one seed.

A stream depends on the seed and its own name only, so adding a consumer does not
shift the numbers of another, and the hash seed of the process plays no part.
"""

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


def stream_seed(seed: int, name: str) -> int:
    """A 64-bit seed for the stream `name` of the run `seed`."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big")


def stream(seed: int, name: str) -> "np.random.Generator":
    """A numpy generator for the stream `name` of the run `seed`."""
    import numpy as np  # numpy stays off the import path of `tierline --help`

    return np.random.Generator(np.random.PCG64(stream_seed(seed, name)))
