"""The device tier: one allocation per device that holds every KV page.

The scheduler counts pages and `kv.names` names them; here they are bytes.  A page holds the
same `slots` layers of one group for one block of tokens.  How the elements of a layer lie
inside is the attention kernel's business: `plain` is what torch and CUDA kernels read,
`tiled` what the native CPU kernels read.  Copies move whole pages and never look inside.
"""

import math
from collections import defaultdict
from dataclasses import dataclass

import torch

from tierline.engine.decoder import Attention, Decoder
from tierline.kv.groups import CacheGroup, CacheLayout
from tierline.kv.table import Copy


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where one layer's share of a block lies."""

    group: int  # whose block table names the block
    part: int  # which of the block's pages
    slot: int  # which layer of that page


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """How a decoder's cache is cut into pages."""

    layout: CacheLayout
    places: tuple[Place, ...]  # of every layer
    slots: int  # layers in one page


def geometry(decoder: Decoder, *, block_tokens: int, element_bytes: int) -> Geometry:
    """Pages for a decoder: one group for each window, as `kv.groups.cache_layout` counts them."""
    layer_elements = {layer.attention.kv_elements_per_token for layer in decoder.layers}
    assert len(layer_elements) == 1, "layers with caches of different sizes"
    members: defaultdict[int | None, list[int]] = defaultdict(list)
    for number, layer in enumerate(decoder.layers):
        members[layer.attention.window_tokens].append(number)
    windows = sorted(members, key=lambda w: -1 if w is None else w)
    slots = math.gcd(*(len(layers) for layers in members.values()))
    places: dict[int, Place] = {}
    for group, window in enumerate(windows):
        for at, number in enumerate(members[window]):
            places[number] = Place(group=group, part=at // slots, slot=at % slots)
    layout = CacheLayout(
        groups=tuple(
            CacheGroup(pages_per_block=len(members[w]) // slots, window_tokens=w) for w in windows
        ),
        block_tokens=block_tokens,
        page_bytes=slots * layer_elements.pop() * block_tokens * element_bytes,
    )
    return Geometry(
        layout=layout, places=tuple(places[n] for n in range(len(decoder.layers))), slots=slots
    )


class Arena:
    """The pages of one device."""

    __slots__ = ("_views", "data", "dtype", "geometry")

    def __init__(
        self,
        decoder: Decoder,
        geometry: Geometry,
        *,
        pages: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Raises torch's out-of-memory error when the device has no room for so many pages."""
        self.geometry, self.dtype = geometry, dtype
        size = geometry.layout.page_bytes
        self.data = torch.empty((pages, size), dtype=torch.uint8, device=device)
        # Never written slots are masked, but 0 x NaN would not be: nothing may start as NaN.
        if device.type != "cpu":
            self.data.zero_()
        block = geometry.layout.block_tokens
        typed = self.data.view(dtype)
        self._views: list[torch.Tensor] = []
        for layer, place in zip(decoder.layers, geometry.places, strict=True):
            attention = layer.attention
            if isinstance(attention, Attention):
                shape = (2, block, attention.kv_heads, attention.head_dim)
            else:
                shape = (1, block, 1, attention.kv_elements_per_token)
            elements = math.prod(shape)
            first = place.slot * elements
            self._views.append(typed[:, first : first + elements].view(-1, *shape))

    def layer(self, number: int) -> torch.Tensor:
        """[pages, 2 (K, V), block tokens, KV heads, head dim] of one layer, in plain order.

        MLA: [pages, 1, block tokens, 1, latent + rope].  Page p of the group's tables is row p.
        """
        return self._views[number]

    def copy(self, copies: list[Copy]) -> None:
        """Copy whole pages: a fork's shared last block, before somebody writes into it."""
        if copies:
            sources, targets = zip(*copies, strict=True)
            self.data[list(targets)] = self.data[list(sources)]
