"""A decoder on the native kernels: the whole step is one call.

`build` asks `supports` and makes a `NativeNetwork`, which stands where `network.Network` does.
Weights are packed one matrix after another, each freed before the next is read, so loading
needs one copy of them and little more.  GGUF's blocks stay as they are where a kernel exists;
a tied embedding is read back from the packed head.

Activations are float32 between products and attention; a product rounds its input to bfloat16
unless its weights are float32.  The structures below are those of step.h.

Invariants
    INV-ENG-8   a row's logits are the same, bit for bit, whatever else is in the batch and
                however its prompt was cut into chunks
    INV-ENG-41  the same of a pooled prompt's mean
"""

import ctypes
from collections.abc import Callable

import numpy as np
import torch

from tierline.engine import native
from tierline.engine.arena import Arena, geometry
from tierline.engine.batch import Batch
from tierline.engine.decoder import Attention, Decoder, Dense, Experts, Layer, Rope
from tierline.engine.native import Kernels, Packed, Stored
from tierline.engine.native_attention import Sequences, Shape, flat, shape_of, why_not

Weights = Callable[[str], torch.Tensor]  # our name -> the tensor, on the CPU
Compact = Callable[[str], tuple[str, torch.Tensor] | None]  # our name -> type and uint8 rows

ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}
PANEL = 32  # of types.h: outputs that lie together
_MATRIX = native._Matrix


class _Rope(ctypes.Structure):
    _fields_ = (
        ("inverse_frequencies", ctypes.c_void_p),
        ("count", ctypes.c_int32),
        ("interleaved", ctypes.c_int32),
        ("scale", ctypes.c_float),
    )


class _Experts(ctypes.Structure):
    _fields_ = (
        ("count", ctypes.c_int32),
        ("active", ctypes.c_int32),
        ("normalised", ctypes.c_int32),
        ("scale", ctypes.c_float),
        ("router", _MATRIX),
        ("gate_up", ctypes.POINTER(_MATRIX)),
        ("down", ctypes.POINTER(_MATRIX)),
    )


_NORMS = ("norm", "post_attention_norm", "ffn_norm", "post_ffn_norm", "q_norm", "k_norm")


class _Layer(ctypes.Structure):
    _fields_ = (
        ("qkv", _MATRIX),
        ("o", _MATRIX),
        ("gate_up", _MATRIX),
        ("down", _MATRIX),
        ("experts", ctypes.POINTER(_Experts)),
        *((name, ctypes.c_void_p) for name in _NORMS),
        ("attention", Shape),
        ("rope", ctypes.c_int32),
        ("intermediate", ctypes.c_int32),
        ("activation", ctypes.c_int32),
        ("group", ctypes.c_int32),
        ("parts", ctypes.c_int32),
        ("part", ctypes.c_int32),
        ("slot", ctypes.c_int32),
    )


class _Model(ctypes.Structure):
    _fields_ = (
        ("hidden", ctypes.c_int32),
        ("vocabulary", ctypes.c_int32),
        ("layer_count", ctypes.c_int32),
        ("rope_count", ctypes.c_int32),
        ("norm_eps", ctypes.c_float),
        ("embedding_scale", ctypes.c_float),
        ("logit_softcap", ctypes.c_float),
        ("head", _MATRIX),
        ("embed", _MATRIX),
        ("norm", ctypes.c_void_p),
        ("layers", ctypes.POINTER(_Layer)),
        ("ropes", ctypes.POINTER(_Rope)),
    )


class _Batch(ctypes.Structure):
    _fields_ = (
        ("sequences", Sequences),
        ("tokens", ctypes.c_void_p),
        ("wanted", ctypes.c_void_p),
        ("wanted_count", ctypes.c_int32),
        ("element_bytes", ctypes.c_int32),
        ("pages", ctypes.c_void_p),
        ("page_bytes", ctypes.c_int64),
        ("block_tokens", ctypes.c_int32),
        ("tables", ctypes.POINTER(ctypes.c_void_p)),
        ("strides", ctypes.POINTER(ctypes.c_int32)),
        ("pooled", ctypes.c_void_p),
        ("sums", ctypes.c_void_p),
        ("pooled_count", ctypes.c_int32),
    )


_SIGNATURES: dict[str, tuple[type | None, tuple[type, ...]]] = {
    "tl_stepper": (ctypes.c_void_p, (ctypes.c_void_p,)),
    "tl_stepper_free": (None, (ctypes.c_void_p,)),
    "tl_stepper_bytes": (ctypes.c_size_t, (ctypes.c_void_p,)),
    "tl_step": (ctypes.c_int, (ctypes.c_void_p,) * 3),
    "tl_pack_pairs": (
        None,
        (
            *(ctypes.c_void_p, *(ctypes.c_int,) * 4, ctypes.c_void_p, ctypes.c_void_p),
            *(ctypes.c_size_t, ctypes.c_size_t),
        ),
    ),
}


def supports(decoder: Decoder, dtype: torch.dtype) -> str | None:
    """Why the native step cannot run this network in this type, or None when it can."""
    if dtype not in (torch.float32, torch.bfloat16):
        return f"no native kernel computes in {str(dtype).removeprefix('torch.')}"
    if decoder.hidden % 16:
        return f"hidden size {decoder.hidden} is not a multiple of 16"
    for layer in decoder.layers:
        if (reason := why_not(layer.attention, dtype)) is not None:
            return reason
        if isinstance(layer.ffn, Experts) and (
            layer.ffn.groups > 1 or layer.ffn.shared_intermediate
        ):
            return "groups of experts and shared ones have no native kernel"
        if layer.ffn.intermediate % 16:
            return f"intermediate size {layer.ffn.intermediate} is not a multiple of 16"
    return None


class NativeNetwork:
    """One decoder with its weights, packed for the kernels; `supports` has said that it may.

    `weights` gives a tensor by our name, `compact` the blocks of one that a GGUF file holds
    in a type of `native.GGUF_TYPES` (None: it does not).  Raises MemoryError when the
    weights do not fit.
    """

    def __init__(
        self,
        decoder: Decoder,
        weights: Weights,
        *,
        dtype: torch.dtype,
        kernels: Kernels,
        compact: Compact | None = None,
    ) -> None:
        assert supports(decoder, dtype) is None
        self.decoder, self.dtype, self.kernels = decoder, dtype, kernels
        self._library = kernels.library
        self._logits = torch.empty((0, decoder.vocabulary))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(self._library, name)
            function.restype, function.argtypes = result, arguments
        loader = _Loader(decoder, weights, dtype=dtype, kernels=kernels, compact=compact)
        self._model = loader.model()
        self._kept = loader.kept  # what the structures point to
        self.weight_bytes = loader.bytes
        self._stepper: int | None = self._library.tl_stepper(ctypes.addressof(self._model))

    def __del__(self) -> None:
        if getattr(self, "_stepper", None) is not None:
            self._library.tl_stepper_free(self._stepper)

    def _room(self, rows: int) -> torch.Tensor:
        if rows > len(self._logits):
            self._logits = torch.empty((rows, self.decoder.vocabulary))
        return self._logits[:rows]

    @property
    def scratch_bytes(self) -> int:
        """Memory for activations, as much as the largest step so far needed."""
        return int(self._library.tl_stepper_bytes(self._stepper))

    def logits(self, batch: Batch, arena: Arena) -> torch.Tensor:
        """Run the step, write its keys and values, add to its sums; float32 logits [R, vocabulary].

        Logits are good until the next call, which writes into the same memory: fresh pages of
        64 rows would cost a tenth of a step.  Wanted rows and pooled sequences ascend.  Raises
        MemoryError when there is no room for the activations.
        """
        assert arena.dtype == self.dtype
        wanted, pooled, sums = flat(batch.wanted), flat(batch.pooled), batch.sums
        assert (np.diff(wanted) > 0).all(), "wanted rows ascend"
        assert (np.diff(pooled) > 0).all(), "pooled sequences ascend"
        assert sums is None or sums.is_contiguous()
        tokens, starts, lengths = flat(batch.tokens), flat(batch.starts), flat(batch.lengths)
        tables = [flat(table) for table in batch.tables]
        out = self._room(len(wanted))
        if not len(tokens):
            return out
        layout = arena.geometry.layout
        filled = _Batch(
            Sequences(len(lengths), starts.ctypes.data, lengths.ctypes.data),
            *(tokens.ctypes.data, wanted.ctypes.data, len(wanted), arena.dtype.itemsize),
            *(arena.data.data_ptr(), layout.page_bytes, layout.block_tokens),
            (ctypes.c_void_p * len(tables))(*(table.ctypes.data for table in tables)),
            (ctypes.c_int32 * len(tables))(*(table.shape[1] for table in tables)),
            *(pooled.ctypes.data, None if sums is None else sums.data_ptr(), len(pooled)),
        )
        if not self._library.tl_step(self._stepper, ctypes.byref(filled), out.data_ptr()):
            raise MemoryError(f"no memory for the activations of {len(tokens)} rows")
        return out


class _Loader:
    """Packs the weights of a decoder, one matrix after another."""

    def __init__(
        self,
        decoder: Decoder,
        weights: Weights,
        *,
        dtype: torch.dtype,
        kernels: Kernels,
        compact: Compact | None,
    ) -> None:
        self.decoder, self.weights, self.dtype = decoder, weights, dtype
        self.kernels, self.compact = kernels, compact
        self.kept: list[object] = []
        self.bytes = 0
        # Slots do not depend on how many tokens a block has.
        self.geometry = geometry(decoder, block_tokens=16, element_bytes=dtype.itemsize)
        self.ropes: list[Rope] = []

    def model(self) -> _Model:
        """The whole network."""
        decoder = self.decoder
        layers = (_Layer * len(decoder.layers))()
        for number, layer in enumerate(decoder.layers):
            self.layer(layers[number], number, layer)
        head = self.matrix(["embed" if decoder.tied else "head"])
        embed = head if decoder.tied else self.matrix(["embed"])
        scale = torch.tensor(decoder.embedding_scale, dtype=self.dtype)
        ropes = (_Rope * len(self.ropes))(*map(self.rope, self.ropes))
        self.kept += [layers, ropes]
        return _Model(
            *(decoder.hidden, decoder.vocabulary, len(layers), len(ropes)),
            *(decoder.norm_eps, scale.item(), decoder.logit_softcap or 0.0),
            *(head, embed, self.norm("norm"), layers, ropes),
        )

    def layer(self, into: _Layer, number: int, layer: Layer) -> None:
        """Fill one layer's structure."""
        attention, ffn = layer.attention, layer.ffn
        assert isinstance(attention, Attention)
        prefix = f"layers.{number}."
        into.qkv = self.matrix([prefix + name for name in "qkv"], bias=attention.bias)
        into.o = self.matrix([prefix + "o"], bias=attention.out_bias)
        if isinstance(ffn, Dense):
            into.gate_up = self.pairs(prefix + "gate", prefix + "up")
            into.down = self.matrix([prefix + "down"])
            into.activation = ACTIVATIONS[ffn.activation]
        else:
            self.experts(into, ffn, prefix)
        norms = ["norm", "ffn_norm"]
        norms += ["post_attention_norm", "post_ffn_norm"] if layer.post_norms else []
        norms += ["q_norm", "k_norm"] if attention.qk_norm else []
        for name in norms:
            setattr(into, name, self.norm(prefix + name))
        into.attention = shape_of(attention)
        if attention.rope not in self.ropes:
            self.ropes.append(attention.rope)
        into.rope = self.ropes.index(attention.rope)
        into.intermediate = ffn.intermediate
        place = self.geometry.places[number]
        into.group, into.part, into.slot = place.group, place.part, place.slot
        into.parts = self.geometry.layout.groups[place.group].pages_per_block

    def experts(self, into: _Layer, experts: Experts, prefix: str) -> None:
        """Fill the part of a layer's structure that is about experts."""
        count = experts.experts
        gate_up, down = (_MATRIX * count)(), (_MATRIX * count)()
        names = [f"{prefix}experts.{number}." for number in range(count)]
        for number, name in enumerate(names):
            gate_up[number] = self.pairs(name + "gate", name + "up")
            down[number] = self.matrix([name + "down"])
        assert len({m.type for m in gate_up}) == len({m.type for m in down}) == 1, "mixed experts"
        router = self.keep(self.kernels.pack([self.weights(prefix + "router").float()]))
        scale, normalised = experts.scale, experts.normalised
        filled = _Experts(
            *(count, experts.experts_active, normalised, scale, router, gate_up, down)
        )
        self.kept += [gate_up, down, filled]
        into.gate_up, into.down = gate_up[0], down[0]
        into.experts = ctypes.pointer(filled)
        into.activation = ACTIVATIONS["silu"]

    def rope(self, rope: Rope) -> _Rope:
        """One rotation."""
        frequencies = np.array(rope.inverse_frequencies, dtype=np.float32)
        self.kept.append(frequencies)
        return _Rope(frequencies.ctypes.data, len(frequencies), rope.interleaved, rope.scale)

    def norm(self, name: str) -> int:
        """A norm's weights in float32, the network's offset added: their address."""
        weight = (self.weights(name).float() + self.decoder.norm_offset).contiguous()
        self.kept.append(weight)
        self.bytes += weight.nbytes
        return weight.data_ptr()

    def sources(self, names: list[str]) -> list[torch.Tensor | Stored]:
        """Matrices that are stacked: as blocks when all are of one kind, else in `dtype`."""
        found = [self.compact(name) if self.compact else None for name in names]
        kinds = {each[0] if each else None for each in found}
        if len(kinds) == 1 and kinds <= native.GGUF_TYPES.keys():
            return [Stored(*each) for each in found if each]
        return [self.weights(name).to(self.dtype) for name in names]

    def matrix(self, names: list[str], *, bias: bool = False) -> native._Matrix:
        """Matrices under one another, packed."""
        joined = torch.cat([self.weights(f"{n}.bias") for n in names]) if bias else None
        return self.keep(self.kernels.pack(self.sources(names), joined))

    def pairs(self, gate_name: str, up_name: str) -> native._Matrix:
        """Gate and up in alternating panels, so that whoever computes one has the other."""
        both = self.sources([gate_name, up_name])
        n, k = both[0].shape
        gate, up = (x.blocks if isinstance(x, Stored) else x for x in both)
        kind = native._kind(both[0])
        rows = -(-n // PANEL) * 2 * PANEL
        packed = Packed(self.kernels.library, n=rows, k=k, kind=kind)
        assert gate.stride(1) == up.stride(1) == 1
        self.kernels.library.tl_pack_pairs(
            *(packed.matrix.data, kind, n, k, kind, gate.data_ptr(), up.data_ptr()),
            *(x.stride(0) * x.element_size() for x in (gate, up)),
        )
        return self.keep(packed)

    def keep(self, packed: Packed) -> native._Matrix:
        """Hold on to a matrix that a structure points to."""
        self.kept.append(packed)
        self.bytes += packed.bytes + (packed.bias.nbytes if packed.bias is not None else 0)
        return packed.matrix
