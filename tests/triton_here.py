"""The Triton kernels on this machine: compiled where there is a GPU, else interpreted on CPU.

Triton decides when it is first imported, so tests import kernels from here and nowhere else.
Interpreted, `tl.dot` would multiply the bits of bfloat16 as integers; it is given floats.
"""

import os

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # and so it stays: Triton looks again now and then
pytest.importorskip("triton", reason="triton is not installed")

from triton import language as tl  # noqa: E402
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder  # noqa: E402

from tierline.engine import attention_cuda, attention_triton  # noqa: E402

if DEVICE == "cpu":
    if not isinstance(attention_triton.attend, InterpretedFunction):
        pytest.skip("triton was imported before TRITON_INTERPRET was set", allow_module_level=True)
    integer_dot = InterpreterBuilder.create_dot

    def float_dot(self, a, b, d, *how):  # type: ignore[no-untyped-def]
        a, b = (self.create_fp_ext(x, tl.float32) if x.dtype == tl.bfloat16 else x for x in (a, b))
        return integer_dot(self, a, b, d, *how)

    InterpreterBuilder.create_dot = float_dot

__all__ = ["DEVICE", "attention_cuda"]
