"""A probe of extractors: the features of an element must not depend on the other elements of the chunk."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from setenc.random import seeded

_ELEMENTS = 8  # of each of two sets: enough to see a mixture, and never more than the chunk itself


@torch.no_grad()
def probe(extractor: nn.Module, x: Tensor) -> bool:
    """Whether ``x`` ``(B, n, …)`` could tell anything: two elements that differ.

    The first elements go through the extractor at once, and again in parts. With dropout, whose noise depends on the
    shape, they go through it again at once, with the other elements replaced. Running statistics and random numbers
    are left as they were.

    Raises:
        ValueError: features of an element change with the rest of the chunk.
    """
    x = x.detach()[:2, :_ELEMENTS]
    sets, size = x.shape[:2]
    if sets * size < 2 or bool((x.flatten(0, 1)[1:] == x[0, 0]).all()):
        return False
    # Buffers are copies: a call may write to them. The extractor as it is before compilation compiles no new shapes.
    plain = getattr(extractor, "_orig_mod", extractor)
    if any(isinstance(module, torch.jit.ScriptModule) for module in plain.modules()):
        return False
    call = partial(_features, plain, device=x.device)
    features = call(x, seed=0)
    if not isinstance(features, Tensor) or features.shape[:2] != x.shape[:2] or not bool(features.isfinite().all()):
        return False  # the caller's checks raise a clearer error
    if bool((call(x, seed=1) == features).all()):
        how = "when the chunk is cut in parts"
        cut = max(size // 2, 1)
        pieces = [(b, part) for b in range(sets) for part in (slice(0, cut), slice(cut, size)) if size > part.start]
        found = torch.cat([call(x[b : b + 1, part], seed=0, cut=True)[0] for b, part in pieces])
        features = features.flatten(0, 1)
    else:
        how = "when other elements of the chunk are replaced"
        kept = slice(size // 2, size // 2 + 1)  # others come before and after it
        other = x[:1, :1].expand_as(x).clone()
        other[0, kept] = x[0, kept]
        found, features = call(other, seed=0)[0, kept], features[0, kept]
    if found.shape == features.shape:
        change = float((found - features).abs().max()) / max(float(features.abs().max()), 1e-30)
        half = torch.is_autocast_enabled(x.device.type) or features.dtype in (torch.float16, torch.bfloat16)
        if change <= (5e-2 if half else {torch.float64: 1e-7}.get(features.dtype, 5e-3)):
            return True
        how = f"by {change:.2g} of the largest one, {how}"
    raise ValueError(
        f"the extractor mixes the elements of a chunk: its features change {how}. The encoding would depend on how the "
        "set is cut. Every element must be treated by itself: normalise and attend inside an element "
        "(setenc.PerElement hands a module single elements). UMBC(..., probe=False) switches this test off"
    )


def _features(extractor: nn.Module, x: Tensor, *, seed: int, device: torch.device, cut: bool = False) -> Any:
    buffers = {name: buffer.clone() for name, buffer in extractor.named_buffers()}
    with seeded(seed, device):
        try:
            return torch.func.functional_call(extractor, buffers, (x,))
        except Exception as error:
            if cut:
                error.add_note("The extractor must take chunks of any size; it failed on a part of one.")
            raise
