"""Compiled short cuts give what the general solvers give: values, plans, certificates, gradients, warnings, errors."""

import warnings

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mbot import BoMbOT, EntropicOT, ExactOT, MiniBatchOT, PartialOT, UnbalancedOT
from mbot.testing import without_fast_paths

DTYPES = st.sampled_from([torch.float32, torch.float64])
SEEDS = st.integers(0, 2**31)
LAYOUTS = st.sampled_from(["contiguous", "transposed", "strided", "expanded"])


def laid_out(x, layout):
    """The same numbers in another layout; the first mini-batch for all if expanded."""
    if layout == "transposed":
        return x.mT.contiguous().mT
    if layout == "strided":
        return torch.stack((x, x), -1)[..., 0]
    return x[:1].expand_as(x) if layout == "expanded" else x


def told(function):
    """What a call returns or raises, and the warnings that it writes."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result = function()
        except (ValueError, RuntimeError) as error:
            result = type(error)
    return result, sorted({str(warning.message).partition(":")[0] for warning in caught})


def agree(function, close):
    """Compare a call with and without the short cuts."""
    found, expected = told(function), []
    with without_fast_paths():
        expected = told(function)
    assert found[1] == expected[1]
    if isinstance(expected[0], type) or isinstance(found[0], type):
        assert found[0] == expected[0]
        return
    close(found[0], expected[0])


@settings(max_examples=150, deadline=None)
@given(
    k=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    m=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    equal=st.booleans(),
    d=st.sampled_from([1, 3, 4, 5, 16]),
    dtype=DTYPES,
    inner=st.sampled_from([ExactOT(), PartialOT(0.6), PartialOT(0.3), EntropicOT(0.5), UnbalancedOT(0.5, 2.0)]),
    outer=st.sampled_from(["grid", "aligned", "bomb", "e-bomb"]),
    scale=st.sampled_from([1e-20, 1e-6, 1.0, 1e6, 1e20]),
    offset=st.sampled_from([0.0, 1.0, 1e6]),
    kind=st.sampled_from(["normal", "duplicates", "one place"]),
    layouts=st.tuples(LAYOUTS, LAYOUTS),
    needed=st.sampled_from([(True, True), (True, False), (False, True), (False, False)]),
    seed=SEEDS,
)
def test_losses(k, m, equal, d, dtype, inner, outer, scale, offset, kind, layouts, needed, seed):
    g = torch.Generator().manual_seed(seed)
    k2 = k[0] if outer == "aligned" else k[1]
    m2 = m[0] if equal else m[1]
    x, y = torch.randn(k[0], m[0], d, generator=g).double(), torch.randn(k2, m2, d, generator=g).double()
    if kind == "duplicates":
        y[:] = x[0, torch.randint(m[0], (m2,), generator=g)]
    elif kind == "one place":
        x[:], y[:] = x[:1, :1], x[:1, :1]
    x, y = (laid_out(((part + offset) * scale).to(dtype), layout) for part, layout in zip((x, y), layouts, strict=True))
    if isinstance(inner, EntropicOT | UnbalancedOT):  # in units of the costs
        inner = type(inner)(*(setting * scale**2 for setting in (0.5, 2.0)[: 1 + isinstance(inner, UnbalancedOT)]))
    sizes = {"num_batches": (k[0], k2), "batch_size": (m[0], m2)}
    loss = {
        "grid": lambda: MiniBatchOT(inner, **sizes),
        "aligned": lambda: MiniBatchOT(inner, pairing="aligned", **sizes),
        "bomb": lambda: BoMbOT(inner, **sizes),
        "e-bomb": lambda: BoMbOT(inner, reg=0.1 * scale**2, **sizes),
    }[outer]()

    def step():
        left, right = (part.detach().requires_grad_(wanted) for part, wanted in zip((x, y), needed, strict=True))
        value = loss.from_batches(left, right)
        sides = [part for part in (left, right) if part.requires_grad]
        return value.detach(), list(torch.autograd.grad(value, sides)) if sides else []

    # Several plans may be the best, with gradients of their own; far points are rounded to few places.
    unique = kind == "normal" and "expanded" not in layouts and (offset < 1e6 or dtype == torch.float64)
    precise = 1e-4 if dtype == torch.float32 else 1e-7
    rounding = 10 * torch.finfo(dtype).eps * offset  # of a point, relative to the scale

    def close(found, expected):
        off = (precise + rounding) * scale**2 * d
        torch.testing.assert_close(found[0], expected[0], rtol=precise, atol=off)
        if unique:
            for ours, theirs in zip(found[1], expected[1], strict=True):
                torch.testing.assert_close(ours, theirs, rtol=10 * precise, atol=10 * off / scale)

    agree(step, close)
