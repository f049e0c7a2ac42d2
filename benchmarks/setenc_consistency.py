"""Consistency errors: every way to cut, order and merge a set against the whole set; the official clamp beside it."""

import torch
from harness import write
from setenc_time import Official, extractor

import setenc

ACTIVATIONS = ("sigmoid", "softmax", "slot-sigmoid", "slot-softmax", "slot-exp")


def passes(enc, absorb):
    """The output after every pass of the pooling, each from what ``absorb`` makes of an empty state."""
    state = absorb(enc.init_state(2))
    for _ in range(enc.pooling.num_passes - 1):
        state = absorb(enc.next_pass(state))
    return enc.readout(state)


def pooled(enc, parts, masks=None):
    def absorb(state):
        for part, mask in zip(parts, masks or [None] * len(parts), strict=True):
            state = enc.update(state, part, mask)
        return state

    return passes(enc, absorb)


def tree(enc, parts):
    def absorb(start):
        states = [enc.update(start, part) for part in parts]
        while len(states) > 1:
            states = [a.merge(b) for a, b in zip(states[::2], states[1::2], strict=False)] + (
                states[-1:] if len(states) % 2 else []
            )
        return states[0]

    return passes(enc, absorb)


def encoder(make, dtype, mass=False):
    torch.manual_seed(0)
    return setenc.UMBC(extractor(), make(), setenc.SetTransformerDecoder(128), mass_feature=mass).to(dtype).eval()


@torch.no_grad()
def errors(name, make, dtype, n=1000):
    enc = encoder(make, dtype, "mass" in name)
    x = 2 * torch.randn(2, n, 128, generator=torch.Generator().manual_seed(1)).to(dtype)
    mask = torch.rand(2, n, generator=torch.Generator().manual_seed(2)) < 0.6
    order = torch.randperm(n, generator=torch.Generator().manual_seed(3))
    whole = enc(x)
    masked = pooled(enc, torch.where(mask[..., None], x, torch.nan).split(64, 1), mask.split(64, 1))
    kept = torch.cat([enc(x[b : b + 1, mask[b]]) for b in range(2)])
    cases = {
        "chunks of 1": pooled(enc, x.split(1, 1)),
        "chunks of 64": pooled(enc, x.split(64, 1)),
        "1, 2, 4, … elements": pooled(enc, x.split([2**i for i in range(9)] + [n - 511], 1)),
        "another order, chunks of 7": pooled(enc, x[:, order].split(7, 1)),
        "merge tree of 37": tree(enc, x.split(28, 1)),
        "ragged": enc(list(x)),
    }
    scale = float(whole.abs().max())
    row = {"pooling": name, "dtype": str(dtype).removeprefix("torch.")}
    row |= {case: float((out - whole).abs().max()) / scale for case, out in cases.items()}
    return row | {"mask, NaN in padding": float((masked - kept).abs().max()) / float(kept.abs().max())}


@torch.no_grad()
def clamp(largest, dtype=torch.float32):
    """Softmax attention of both poolers against the softmax of float64, at logits up to ``largest``."""
    torch.manual_seed(0)
    pooling = setenc.SlotPooling(128, 128, 64, slots="learned", residual=False, output_norm=False)
    enc = setenc.UMBC(None, pooling, None)
    x = torch.randn(1, 1000, 128, generator=torch.Generator().manual_seed(1))
    q = pooling.query(pooling.slot_mean).unflatten(1, (4, 32)).transpose(0, 1)
    k = pooling.key_value(x)[0, :, :128].unflatten(1, (4, 32)).permute(1, 2, 0)
    scale = largest / float((q @ k / 32**0.5).max())
    pooling.query.weight *= scale
    pooling.query.bias *= scale
    enc.double()
    exact = enc(x.double())
    enc.to(dtype)
    x = x.to(dtype)
    size = float(exact.abs().max())

    def error(out):
        return float((out.double() - exact).abs().max()) / size

    return {
        "largest logit": largest,
        "official, clamp at 10": error(Official(enc)(x)),
        "setenc, chunks of 64": error(pooling.readout(stream(pooling, x))),
        "setenc, whole": error(enc(x)),
    }


def stream(pooling, x):
    state = pooling.init_state(len(x))
    for part in x.split(64, 1):
        state = pooling.update(state, part)
    return state


if __name__ == "__main__":
    poolings = {
        f"SlotPooling {activation}": (
            lambda activation=activation: setenc.SlotPooling(128, 128, 64, activation=activation)
        )
        for activation in ACTIVATIONS
    }
    for reduce in ("mean", "sum", "max"):
        poolings[f"DeepSetsPooling {reduce}"] = lambda reduce=reduce: setenc.DeepSetsPooling(
            128, 128, reduce, norm=reduce == "sum"
        )
    poolings["GatedAttentionPooling"] = lambda: setenc.GatedAttentionPooling(128, 128)
    poolings["SlotPooling softmax, mass read-out"] = lambda: setenc.SlotPooling(128, 128, 64)
    poolings["InstancePooling"] = lambda: setenc.InstancePooling(128, 128, 8)
    poolings["JointPooling of slots and instances"] = lambda: setenc.JointPooling(
        setenc.SlotPooling(128, 128, 64), setenc.InstancePooling(128, 128)
    )
    poolings["DSMILPooling, two passes"] = lambda: setenc.DSMILPooling(128, 128)
    write(
        "setenc_consistency",
        "Consistency errors",
        {
            "Largest error relative to the largest output (≤ 1e-12 in float64, ≤ 1e-5 in float32)": [
                errors(name, make, dtype) for dtype in (torch.float64, torch.float32) for name, make in poolings.items()
            ],
            "Softmax at large logits, float32, against float64": [clamp(v) for v in (5.0, 10.0, 15.0, 47.0, 1000.0)],
        },
        """Two sets of 1000 elements of 128 features, a perceptron, 64 slots of 4 heads, two self-attention blocks: the
output of the whole model in one call against every other way to give it the same elements.""",
    )
