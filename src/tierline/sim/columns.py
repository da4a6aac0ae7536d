"""A column of a run as numbers that can be computed with."""

from typing import TYPE_CHECKING, TypeAlias

from tierline.sim.record import Requests, Steps

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

Column: TypeAlias = "npt.NDArray[np.int64]"


def column(columns: Requests | Steps, name: str) -> Column:
    """One column; a narrow one is widened, a wide one is not copied."""
    import numpy as np

    stored = getattr(columns, name)
    return np.frombuffer(stored, dtype=stored.typecode).astype(np.int64, copy=False)
