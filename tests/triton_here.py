"""The Triton kernels on this machine: compiled where there is a GPU, else interpreted on CPU.

Triton decides while it is imported, and transformers may have imported it already: then it is
imported once more.  So tests take kernels from here and from nowhere else.
"""

import os
import sys

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # and so it stays: Triton looks again now and then
    for name in [n for n in sys.modules if n.partition(".")[0] == "triton"]:
        if not name.startswith("triton._C"):  # an extension is loaded once
            del sys.modules[name]
pytest.importorskip("triton", reason="triton is not installed")

from triton import language as tl  # noqa: E402
from triton.runtime.interpreter import InterpreterBuilder  # noqa: E402

from tierline.engine import attention_cuda  # noqa: E402

if DEVICE == "cpu":
    integer_dot = InterpreterBuilder.create_dot

    def float_dot(self, a, b, d, *how):  # type: ignore[no-untyped-def]
        """The interpreter keeps bfloat16 as integers, and would multiply those."""
        a, b = (self.create_fp_ext(x, tl.float32) if x.dtype == tl.bfloat16 else x for x in (a, b))
        return integer_dot(self, a, b, d, *how)

    InterpreterBuilder.create_dot = float_dot

__all__ = ["DEVICE", "attention_cuda"]
