"""The pairs that a plan can use, without entries too large to matter and pairs that forbidden ones make useless."""

from __future__ import annotations

import numpy as np
import torch
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from mbot.numerics import running_sum
from mbot.problem import Live
from mbot.solvers.matching import match
from mbot.solvers.simplex import simplex

_NOTHING = 1e-9  # share of the mass that may be left over by rounding


def large_entries(
    cost: Tensor, a: Tensor, b: Tensor, floor: float, wanted: Tensor, above: Tensor | None = None
) -> Tensor:
    """The cost beyond which entries are so large that an optimal plan uses them only where it must, ``(B,)``.

    An unused entry would have to be at most the sum of the used ones on a cycle through it, which has at most
    ``2 min(n, m)`` entries. So the limit is the first cost that is followed by one more than ``4 min(n, m)`` times as
    large, among those that leave pairs to enough points; ``inf`` if there is none, ``-inf`` if no limit does.

    Args:
        cost: ``(B, n, m)`` costs whose least is 0; ``+inf`` for forbidden pairs.
        a: ``(B, n)`` weights of the rows.
        b: ``(B, m)`` weights of the columns.
        floor: a cost that is negligible, some regularisations.
        wanted: ``(B,)`` mass that must move.
        above: ``(B,)`` limits that turned out too low.
    """
    ordered = cost.flatten(1).double().sort(-1).values
    value, following = ordered[:, :-1], ordered[:, 1:]
    need = torch.maximum(_enough(cost.amin(2), a, wanted), _enough(cost.amin(1), b, wanted))
    found = (following < torch.inf) & (following > 4 * min(cost.shape[1:]) * value.clamp_min(floor))
    found &= value >= need[:, None]
    if above is not None:
        found &= value > above[:, None]
    first = value.gather(1, found.int().argmax(1, keepdim=True))[:, 0] if value.shape[1] else need
    limit = torch.where(found.any(1), first, torch.inf)
    return torch.where((need < torch.inf) | (wanted == 0), limit, -torch.inf)


def _enough(best: Tensor, weight: Tensor, wanted: Tensor) -> Tensor:
    """The least cost at which points of enough weight have a pair, ``(B,)``, from each point's cheapest."""
    best, order = best.double().sort(-1)
    reached = running_sum(weight.gather(-1, order), -1)
    index = (reached < (wanted * (1 - _NOTHING))[:, None]).sum(-1, keepdim=True)
    return best.gather(-1, index.clamp_max(best.shape[-1] - 1))[:, 0]


def usable_pairs(allowed: Tensor, a: Tensor, b: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs that carry mass in some plan on the allowed pairs.

    Sinkhorn's iterations converge linearly on such a support, and like 1/k where a pair is allowed and can have no
    mass. With any plan at hand, a pair can be used if mass can go round a cycle through it: strongly connected
    components of the graph of possible changes.

    Args:
        allowed: ``(B, n, m)`` bool.
        a: ``(B, n)`` weights of the rows; they may be left partly unused if their total is more than ``wanted``.
        b: ``(B, m)`` weights of the columns.
        wanted: ``(B,)`` mass that must move.

    Returns:
        ``(B, n, m)`` bool, and ``(B,)`` the share of the mass for which there is no way on allowed pairs.
    """
    problems, n, m = allowed.shape
    device = allowed.device
    # What stays goes to a dummy point, as in partial transport; the two dummies are a forbidden pair.
    spare_a, spare_b = ((w.sum(-1) - wanted).clamp_min(0)[:, None] for w in (b, a))
    if bool((spare_a <= _NOTHING).all() & (spare_b <= _NOTHING).all()):
        graph = allowed
    else:
        graph = torch.nn.functional.pad(allowed, (0, 1, 0, 1), value=True)
        graph[:, n, m] = False
        a, b = torch.cat((a, spare_a), 1), torch.cat((b, spare_b), 1)
    b = b * (a.sum(-1, keepdim=True) / b.sum(-1, keepdim=True))
    plan = _plan(graph, a, b)
    missing = torch.where(graph, 0, plan).sum((1, 2)) / wanted
    height, width = graph.shape[1:]
    base = (height + width) * torch.arange(problems, device=device)[:, None]
    row = base + torch.arange(height, device=device)
    col = base + height + torch.arange(width, device=device)
    tail, head = row[:, :, None].expand_as(graph), col[:, None, :].expand_as(graph)
    moved = graph & (plan > _NOTHING * wanted[:, None, None] / (n + m))
    edges = torch.cat((torch.stack((tail[graph], head[graph])), torch.stack((head[moved], tail[moved]))), 1).cpu()
    nodes = problems * (height + width)
    matrix = csr_array((torch.ones(edges.shape[1]).numpy(), tuple(edges.numpy())), shape=(nodes, nodes))
    label = torch.from_numpy(connected_components(matrix, connection="strong")[1]).to(device)
    same = label[row][:, :, None] == label[col][:, None, :]
    return (same & graph)[:, :n, :m], missing


def _plan(graph: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """A plan ``(B, n, m)`` with as little mass as possible on pairs that are not in the graph."""
    live = Live.of(a.cpu(), b.cpu())
    square, other = (np.flatnonzero(which) for which in (live.square, ~live.square))
    found = live.solve((~graph).double().cpu(), {match: square, simplex: other})
    plan = torch.zeros(graph.shape, dtype=torch.float64)
    plan.index_put_((torch.arange(len(plan))[:, None], found.rows, found.col), found.mass, accumulate=True)
    return plan.to(graph.device)
