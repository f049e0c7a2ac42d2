"""What the newer read-outs and poolings cost: mass of slots, targets that ask slots, instances beside slots."""

import time

import torch
from harness import medians, write
from setenc_time import CHUNK, D, K, backward, encoder, extractor, forward, our_stream

import setenc


def rows_of(seconds, before):
    return [{"what": name, "CPU s": value, f"/ {before}": value / seconds[before]} for name, value in seconds.items()]


def ours(enc, x, mode="exact"):
    return backward(enc, lambda: setenc.encode(enc, x, gradient=mode, chunk_size=CHUNK))


def masses(n, heads, repeats):
    """With and without the mass read-out; the clock counts this process alone."""
    x = torch.randn(1, n, D, generator=torch.Generator().manual_seed(1))
    plain = encoder(heads)
    telling = setenc.UMBC(plain.extractor, plain.pooling, None, mass_feature=True)
    found = []
    for name, make in (
        ("exact gradient", lambda enc: ours(enc, x)),
        ("sampled gradient", lambda enc: ours(enc, x, "sampled")),
        ("streamed forward", lambda enc: forward(lambda: our_stream(enc, x, CHUNK))),
        ("forward in one call", lambda enc: forward(lambda: enc(x))),
    ):
        seconds = medians({"without": make(plain), "with": make(telling)}, repeats, clock=time.process_time)
        found.append(
            {
                "N": f"{n:.0e}",
                "heads": heads,
                "what": name,
                **seconds,
                "with / without (≤ 1.05)": seconds["with"] / seconds["without"],
            }
        )
    return found


def poolings(n, repeats):
    """An exact gradient through each pooling."""
    torch.manual_seed(0)
    x = torch.randn(1, n, D, generator=torch.Generator().manual_seed(1))
    slots = setenc.SlotPooling(D, D, K)
    candidates = {
        "SlotPooling": slots,
        "InstancePooling": setenc.InstancePooling(D, D),
        "JointPooling of both": setenc.JointPooling(slots, setenc.InstancePooling(D, D)),
        "DSMILPooling, two passes": setenc.DSMILPooling(D, D),
        "GatedAttentionPooling": setenc.GatedAttentionPooling(D, D),
    }
    seconds = medians(
        {name: ours(setenc.UMBC(extractor(), pooling, None), x) for name, pooling in candidates.items()},
        repeats, clock=time.process_time,
    )  # fmt: skip
    return rows_of(seconds, "SlotPooling")


def targets(count, repeats):
    """Forward and backward of ``count`` targets that ask 64 decoded slots, and of attention with its own weights."""
    torch.manual_seed(0)
    pooling = setenc.SlotPooling(D, D, K, num_heads=4)
    query, attend = setenc.SlotQuery(pooling), torch.nn.MultiheadAttention(D, 4, batch_first=True)
    slots, asked = torch.randn(1, K, D), torch.randn(1, count, D)
    seconds = medians(
        {
            "torch.nn.MultiheadAttention": backward(attend, lambda: attend(asked, slots, slots, need_weights=False)[0]),
            "SlotQuery": backward(query, lambda: query(slots, asked)),
        },
        repeats, clock=time.process_time,
    )  # fmt: skip
    return [{"targets": f"{count:,}", **row} for row in rows_of(seconds, "torch.nn.MultiheadAttention")]


if __name__ == "__main__":
    write(
        "setenc_readouts",
        "What the read-outs cost",
        {
            "Mass read-out": [row for heads in (4, 1) for row in masses(30_000, heads, 11)],
            "Poolings, exact gradient of a set of 30,000": poolings(30_000, 5),
            "Targets that ask 64 slots, forward and backward": targets(30_000, 5),
        },
        f"""One set of N elements, d = {D}, {K} slots, float32, a perceptron of two layers of {D} before the pooling, in
chunks of {CHUNK}. Medians of processor time, the candidates alternating. *Forward in one call* without the mass is
torch's fused attention, which does not give the weights' sum.""",
    )
