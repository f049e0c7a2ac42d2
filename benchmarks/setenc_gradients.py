"""Bias, error and direction of full-set gradient estimates on amortised clustering."""

import argparse

import torch
from harness import write

import setenc
import setenc.pooling.slots
from setenc import tasks

SETS, POINTS = 10, 512


def clustering(residual, fold=1.0):
    """The model; the official correction needs keys and values projected element by element (``fold=0``)."""
    setenc.pooling.slots._FOLD, default = fold, setenc.pooling.slots._FOLD
    torch.manual_seed(0)
    model = tasks.MixtureClustering(pooling=setenc.SlotPooling(128, 128, 4, slots="learned", residual=residual))
    setenc.pooling.slots._FOLD = default
    return model


def trained(steps):
    generator = torch.Generator().manual_seed(0)
    model = clustering(residual=True)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(steps):
        optimiser.zero_grad()
        model.loss(tasks.mixture_sets(SETS, POINTS, generator=generator).x).backward()
        optimiser.step()
    return model


def partial_loss(model, x, picks):
    """The loss of the full state, with gradients through the picked points only."""
    rest = torch.ones(x.shape[1], dtype=torch.bool)
    rest[picks] = False
    start = model.enc.init_state(len(x))
    with torch.no_grad():
        others = model.enc.update(start, x[:, rest])
    state = others.merge(model.enc.contribution(start, x[:, picks]))
    return -tasks.clustering.mixture_log_likelihood(x, *model.mixture(model.enc.readout(state))).mean()


def gradient(model, loss, only=("extractor", "pooling"), without="output_norm"):
    """Of the parameters with one of these names, as one vector."""
    model.zero_grad()
    loss.backward()
    named = [(n, p) for n, p in model.enc.named_parameters() if p.grad is not None and without not in n]
    return torch.cat([p.grad.flatten() for n, p in named if any(o in n for o in only)])


def statistics(stage, n, name, full, draws):
    draws, full = torch.stack(draws).double(), full.double()
    size = full.norm()
    error = float((draws - full).square().sum(1).mean().sqrt() / size)
    return {
        "stage": stage,
        "n": n,
        "estimate": name,
        "bias / norm": float((draws.mean(0) - full).norm() / size),
        "noise of the bias": error / len(draws) ** 0.5,
        "relative RMSE": error,
        "mean cosine": float(torch.nn.functional.cosine_similarity(draws, full[None]).mean()),
        "norm ratio": float((draws.norm(dim=1) / size).mean()),
    }


def table(model, stage, n, repeats):
    x = tasks.mixture_sets(SETS, POINTS, generator=torch.Generator().manual_seed(9)).x
    plain = clustering(residual=True, fold=0)
    plain.load_state_dict(model.state_dict())
    full = gradient(model, model.loss(x))
    decoder = gradient(model, model.loss(x), ("decoder",))
    found = {"subset only": [], "full state, no correction": [], "full state, official correction": [], "sampled": []}
    apart = 0.0
    for draw in range(repeats):
        generator = torch.Generator().manual_seed(draw)
        order = torch.randperm(POINTS, generator=generator)
        picks = order[:n]
        found["subset only"].append(gradient(plain, plain.loss(x[:, picks])))
        found["full state, no correction"].append(gradient(plain, partial_loss(plain, x, picks)))
        found["full state, official correction"].append(found["full state, no correction"][-1] * POINTS / n)
        options = {"gradient": "sampled", "chunk_size": n, "generator": generator}
        found["sampled"].append(gradient(model, model.loss(x[:, order], x, **options)))
        loss = model.loss(x[:, order], x, **options)
        apart = max(apart, float((gradient(model, loss, ("decoder",)) - decoder).norm() / decoder.norm()))
    return [statistics(stage, n, name, full, draws) for name, draws in found.items()], apart


def all_choices(residual):
    """The mean over every chunk there is, in float64: what remains is bias."""
    x = tasks.mixture_sets(SETS, 30, generator=torch.Generator().manual_seed(9)).x.double()
    chunks = [torch.arange(i, min(i + 8, 30)) for i in range(0, 30, 8)]
    model, plain = clustering(residual).double(), clustering(residual, fold=0).double()
    rows = []
    for group in (("pooling.slot_mean",), ("pooling.query",), ("pooling.key_value",), ("extractor",)):
        full = gradient(model, model.loss(x), group)
        # Every chunk is drawn by some seed; a chunk's estimate is known by its norm.
        draws = {}
        for seed in range(100):
            options = {"gradient": "sampled", "chunk_size": 8, "generator": torch.Generator().manual_seed(seed)}
            draw = gradient(model, model.loss(x, **options), group)
            draws[f"{float(draw.norm()):.9e}"] = draw
        if len(draws) != len(chunks):
            raise RuntimeError(f"{len(draws)} distinct draws of {len(chunks)} chunks")
        ours = sum(draws.values()) / len(chunks)
        # Official: each chunk's gradient times the number of chunks.
        theirs = sum(gradient(plain, partial_loss(plain, x, picks), group) for picks in chunks)
        rows.append(
            {
                "residual": "on" if residual else "off",
                "parameters": group[0],
                "setenc, relative bias": float((ours - full).norm() / full.norm()),
                "official correction, relative bias": float((theirs - full).norm() / full.norm()),
            }
        )
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--draws", type=int, default=60)
    parser.add_argument("--steps", type=int, default=600)
    args = parser.parse_args()
    rows, apart = [], 0.0
    for stage, steps in (("initial", 0), (f"{args.steps} steps", args.steps)):
        model = trained(steps)
        for n in (8, 64):
            part, most = table(model, stage, n, args.draws)
            rows, apart = rows + part, max(apart, most)
    write(
        "setenc_gradients",
        "Full-set gradient estimates",
        {
            "Encoder gradients, residual on": rows,
            "Mean over all choices of a chunk, 30 points in chunks of 8, 8, 8 and 6, float64": [
                *all_choices(True),
                *all_choices(False),
            ],
        },
        f"""Amortised clustering (softmax, learned slots, 4 heads), {SETS} sets of {POINTS} points, {args.draws} random
subsets of n points. *Encoder*: extractor, slots, query, key, value. *Noise of the bias* is RMSE / √draws: an unbiased
estimate has a bias of about that size. The decoder's gradient under `sampled` is the full one to {apart:.0e}
(float32). The official correction multiplies the gradients of all encoder parameters by N/n, which is right without
the residual path of the slots only; setenc scales the gradient of the state.""",
    )
