"""Time of a full-set gradient and of streaming: fused attention in one shot, the official pooler, and setenc."""

import argparse

import torch
from harness import medians, write
from torch import nn
from torch.nn import functional as F

import setenc

D, K = 128, 64
CHUNK = 2048
TIMED = (
    "one shot, fused attention",
    "official pooler, full backprop",
    "setenc full",
    "setenc exact",
    "setenc sampled, N/64",
    "one shot, forward",
    "setenc, forward in chunks",
    "setenc, forward in one call",
)


def extractor():
    return nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, D))


def encoder(heads, extract=True, slots=K):
    torch.manual_seed(0)
    pooling = setenc.SlotPooling(D, D, slots, num_heads=heads, slots="learned", output_norm=False, residual=False)
    return setenc.UMBC(extractor() if extract else None, pooling, None)


class OneShot(nn.Module):
    """Whole-set fused attention with the same parameters, nothing of setenc in it."""

    def __init__(self, enc):
        super().__init__()
        self.extract, self.pool, self.heads = enc.extractor, enc.pooling, enc.pooling.num_heads

    def forward(self, x):
        """Pooled slots of whole sets."""
        keys, values = self.pool.key_value(self.extract(x)).chunk(2, -1)
        queries = self.pool.query(self.pool.slot_mean).expand(len(x), -1, -1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (queries, keys, values))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Official(nn.Module):
    """The published pooler's algorithm, from its description: clamped exponentials, weights in memory, no maximum.

    Heads folded into the batch by concatenation, projections of query, key and value apart, numerator and
    denominator added to the previous chunk's.
    """

    def __init__(self, enc):
        super().__init__()
        self.extract, pool, self.heads = enc.extractor, enc.pooling, enc.pooling.num_heads
        self.slots, self.query, self.key, self.value = pool.slot_mean, pool.query, nn.Linear(D, D), nn.Linear(D, D)
        for layer, part in ((self.key, slice(0, D)), (self.value, slice(D, 2 * D))):
            layer.weight.data, layer.bias.data = pool.key_value.weight.data[part], pool.key_value.bias.data[part]

    def fold(self, x):
        """Heads to the batch."""
        return torch.cat(x.split(D // self.heads, 2), 0)

    def chunk(self, x, state=None):
        """Numerator and denominator with a chunk added."""
        x = self.extract(x)
        q = self.fold(self.query(self.slots.repeat(len(x), 1, 1)))
        k, v = self.fold(self.key(x)), self.fold(self.value(x))
        weights = (q @ k.transpose(1, 2) / (D // self.heads) ** 0.5).clamp(max=10).exp()
        parts = weights @ v, weights.sum(2, keepdim=True)
        return parts if state is None else tuple(a + b for a, b in zip(state, parts, strict=True))

    def read(self, state):
        """Pooled slots of a state."""
        return torch.cat((state[0] / (state[1] + 1e-20)).chunk(self.heads, 0), 2)

    def forward(self, x):
        """One shot."""
        return self.read(self.chunk(x))


def backward(module, call):
    def run():
        module.zero_grad()
        call().square().sum().backward()

    return run


def forward(call):
    def run():
        with torch.no_grad():
            return call()

    return run


def official_stream(module, x, size):
    state = None
    for chunk in x.split(size, 1):
        state = module.chunk(chunk, state)
    return module.read(state)


def our_stream(enc, x, size):
    state = enc.init_state(len(x))
    for chunk in x.split(size, 1):
        state = enc.update(state, chunk)
    return enc.readout(state)


def gradients(n, heads, repeats, large=False):
    enc = encoder(heads)
    x = torch.randn(1, n, D, generator=torch.Generator().manual_seed(1))
    one, official = OneShot(enc), Official(enc)
    torch.testing.assert_close(setenc.encode(enc, x, chunk_size=CHUNK, gradient="none"), one(x), atol=1e-5, rtol=1e-4)

    def ours(mode, **options):
        return backward(enc, lambda: setenc.encode(enc, x, gradient=mode, **{"chunk_size": CHUNK, **options}))

    candidates = {
        "one shot, fused attention": backward(one, lambda: one(x)),
        "setenc full": ours("full"),
        "setenc exact": ours("exact"),
        "setenc sampled, N/64": ours("sampled", chunk_size=max(n // 64, 1)),
        "one shot, forward": forward(lambda: one(x)),
        "setenc, forward in chunks": forward(lambda: setenc.encode(enc, x, chunk_size=CHUNK, gradient="none")),
        "setenc, forward in one call": forward(lambda: enc(x)),
    }
    candidates["official pooler, full backprop"] = backward(official, lambda: official(x))
    if large:  # the peers need 8 GB and minutes
        candidates = {name: candidates[name] for name in ("one shot, fused attention", "setenc exact")}
    seconds = medians(candidates, repeats)

    def ratio(ours, theirs):
        return seconds[ours] / seconds[theirs] if ours in seconds and theirs in seconds else "-"

    what = {"N": f"{n:.0e}", "heads": heads}
    return {**what, **dict.fromkeys(TIMED, "-"), **seconds}, {
        **what,
        "exact / one shot (≤ 1.45)": ratio("setenc exact", "one shot, fused attention"),
        "exact / official (≤ 0.7)": ratio("setenc exact", "official pooler, full backprop"),
        "sampled / our full (≤ 0.6)": ratio("setenc sampled, N/64", "setenc full"),
        "sampled / one shot": ratio("setenc sampled, N/64", "one shot, fused attention"),
        "chunked forward / one-shot forward (≤ 1.15)": ratio("setenc, forward in chunks", "one shot, forward"),
    }


def streaming(name, slots, heads, chunk, repeats):
    enc = encoder(heads, False, slots)
    n = min(32_768, chunk * 256)
    x = torch.randn(1, n, D, generator=torch.Generator().manual_seed(1))
    official = Official(enc)
    ours, theirs = (f() for f in (forward(lambda: our_stream(enc, x, chunk)), forward(lambda: official(x))))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)
    seconds = medians(
        {
            "official": forward(lambda: official_stream(official, x, chunk)),
            "setenc": forward(lambda: our_stream(enc, x, chunk)),
        },
        repeats,
    )
    return {
        "slots and heads of": name,
        "slots": slots,
        "heads": heads,
        "chunk": chunk,
        "official, elements/s": n / seconds["official"],
        "setenc, elements/s": n / seconds["setenc"],
        "setenc / official (≥ 1.5)": seconds["official"] / seconds["setenc"],
    }


CONFIGURATIONS = (("clustering", 4, 4), ("Camelyon16", 64, 1), ("CelebA", 128, 1), ("this benchmark", 64, 4))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--small", action="store_true", help="leave the largest set away")
    parser.add_argument("--peers", action="store_true", help="all candidates at the largest set too: 8 GB, minutes")
    args = parser.parse_args()
    pairs = [gradients(100_000, heads, 5) for heads in (4, 1)]
    if not args.small:
        pairs.append(gradients(1_000_000, 4, 5, large=not args.peers))
    rows, ratios = zip(*pairs, strict=True)
    write(
        "setenc_time",
        "Time of a full-set gradient",
        {
            "Ratios": ratios,
            "Seconds": rows,
            "Streaming, forward": [
                streaming(*configuration, chunk, 5) for configuration in CONFIGURATIONS for chunk in (1, 64, 1024, 8192)
            ],
        },
        f"""One set of N elements, d = {D}, {K} slots, float32, and a perceptron of two layers of {D} before the
pooling (none in the streaming table). setenc in chunks of {CHUNK}. *One shot* is `scaled_dot_product_attention` over
the whole set, written here from torch alone with the same parameters. *Official* is the published pooler's algorithm
as its code describes it (clamped exponentials, all weights in memory), in our words, one shot with backprop and
streamed without. Medians, the candidates alternating. Targets are in the headings; sampled draws one chunk of N/64.
Where it is less work (few slots, or one head) setenc lets slots meet elements before the maps to keys and values;
with {K} slots of 4 heads it is not, and both do the same matrix products, about 98,000 operations an element: of the
time of setenc's update of 512 elements (1.1 µs an element on one thread at 160 GFLOP/s) the projection to keys and
values is .43 µs, logits and weighted values .24, maximum, exponentials and sums .13, so that little remains to be won.
In chunks of a few elements the time is that of the calls themselves: setenc's update is one call of a kernel compiled
with numba there, for projections, logits, weights and the running state, and the checks around it take longer.""",
    )
