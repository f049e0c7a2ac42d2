"""Indices of pairs, drawn from transport plans: sparse or dense, of full or partial mass.

A pair takes one random number and a search in the cumulative mass of one column of the plan. Random numbers come from
the generator alone; how many, and in which order, depends on sizes alone.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from mbot.numerics import running_sum
from mbot.plan import Plan
from mbot.random import draw
from mbot.solvers import drawing
from mbot.solvers.drawing import first_beyond, rounded, rows_of_columns
from mbot.transport import ExactOT

_NOTHING = 1e-9  # share of a permutation that rounding may leave


def _uniform(count: int, generator: torch.Generator | None, like: Tensor) -> Tensor:
    return draw(torch.rand, count, generator=generator, device=like.device, dtype=torch.float64)


def sources_of(plan: Plan, target: Tensor, generator: torch.Generator | None) -> Tensor:
    """A source for each of the targets ``(k,)``, drawn from the target's column of one plan; columns must have mass."""
    uniform = _uniform(len(target), generator, plan.mass)
    if plan.is_sparse:
        row, col, mass = plan.entries()
        col, order = col.sort(stable=True)
        mass = mass[order].double()
        ends = running_sum(mass, 0)
        column = torch.arange(plan.size[1], device=target.device)
        last = torch.searchsorted(col, column, right=True) - 1
        first = torch.searchsorted(col, column)
        before = ends[first.clamp_max(len(ends) - 1)] - mass[first.clamp_max(len(ends) - 1)]
        wanted = before[target] + uniform * (ends[last.clamp_min(0)] - before)[target]
        cell = torch.searchsorted(ends, wanted, right=True).clamp(first[target], last[target])
        return row[order][_to_mass(cell, mass)]
    return rows_of_columns(plan.mass, target, uniform)


def _to_mass(cell: Tensor, mass: Tensor) -> Tensor:
    """Cells, moved to the last cell with mass at or before them (rounding may point at padding)."""
    index = torch.arange(len(mass), device=mass.device)
    return torch.where(mass > 0, index, 0).cummax(0).values[cell]


def every_target(plan: Plan, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Every target with mass once, in order: with its match if the plan is a matching, else a source of its column."""
    source = plan.matching()
    if source is not None:
        return source, torch.arange(len(source), device=source.device)
    target = torch.nonzero(plan.col_mass() > 0)[:, 0]
    return sources_of(plan, target, generator), target


def systematic(share: Tensor, generator: torch.Generator | None) -> Tensor:
    """Indices by systematic sampling (one random number): i comes ``share_i`` times, rounded up or down; ``(k,)``."""
    return rounded(share, _uniform(1, generator, share))


def kept_targets(plan: Plan, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Pairs of a plan that leaves mass behind: a target takes part with probability ``m ·`` its mass, at most once.

    The number of pairs is the plan's mass in units of ``1/m``, rounded up or down, and at least one.
    """
    target = systematic((plan.col_mass().double() * plan.size[1]).clamp(0, 1), generator)
    if len(target) == 0:
        return with_replacement(plan, 1, generator)
    return sources_of(plan, target, generator), target


def stratified(plan: Plan | Tensor, count: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """``count`` pairs, in proportion to mass: each cell in expectation, each target up to rounding.

    Args:
        plan: one plan, or the masses ``(n, m)`` of a dense one.
        count: number of pairs.
        generator: source of randomness.
    """
    if isinstance(plan, Tensor) or not plan.is_sparse:
        mass = plan if isinstance(plan, Tensor) else plan.mass
        return drawing.stratified(mass, count, partial(_uniform, generator=generator, like=mass))
    mass = plan.col_mass().double()
    target = systematic(mass * (count / mass.sum()), generator)
    return sources_of(plan, target, generator), target


def with_replacement(plan: Plan, count: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Independent pairs with probability proportional to their mass: a target by its mass, a source of its column."""
    mass = plan.col_mass().double()
    ends = running_sum(mass, 0)
    target = first_beyond(ends, mass, _uniform(count, generator, mass) * ends[-1])
    return sources_of(plan, target, generator), target


def refilled(
    source: Tensor, target: Tensor, n: int, m: int, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """All ``m`` targets in order: those without a pair get sources that no pair uses, at random."""
    full = torch.full((m,), -1, dtype=torch.int64, device=target.device)
    full[target] = source
    missing = torch.nonzero(full < 0)[:, 0]
    unused = torch.ones(n, dtype=torch.bool, device=target.device)
    unused[source] = False
    pool = torch.nonzero(unused)[:, 0]
    if len(pool) == 0:
        pool = torch.arange(n, device=target.device)
    rounds = -(-len(missing) // len(pool))
    shuffles = [draw(torch.randperm, len(pool), generator=generator, device=target.device) for _ in range(rounds)]
    if rounds:
        full[missing] = pool[torch.cat(shuffles)[: len(missing)]]
    return full, torch.arange(m, device=target.device)


def permutations(plan: Plan, generator: torch.Generator | None) -> Tensor:
    """One random permutation a plan ``(…, n, n)``: the source of each target, ``(…, n)``.

    Pair (i, j) is drawn with probability ``n P_ij``, exactly, if the plan has uniform marginals: permutations are
    split off the plan (Birkhoff, von Neumann) and one is taken with probability its mass. Mass that a partial or
    unbalanced plan does not move is spread over the points that it left, as an independent coupling of them.
    """
    matched = plan.matching()
    if matched is not None:
        return matched
    n = plan.size[0]
    rest = _doubly_stochastic(plan.to_dense().double().reshape(-1, n, n) * n)
    problems = len(rest)
    left = torch.ones(problems, dtype=torch.float64, device=rest.device)
    chosen = torch.zeros(problems, n, dtype=torch.int64, device=rest.device)
    active = torch.arange(problems, device=rest.device)
    while len(active):
        # The most likely permutation of what is left; a cell without mass costs more than any cell with mass.
        cost = -rest.clamp_min(_NOTHING / n).log()
        source = ExactOT().plan(cost).matching()
        assert source is not None
        share = rest.gather(1, source[:, None])[:, 0].amin(-1)
        chance = _uniform(len(active), generator, rest) * left
        done = (chance < share) | (left - share < _NOTHING) | (share < _NOTHING)
        chosen[active[done]] = source[done]
        rest = rest.scatter_add(1, source[:, None], -share[:, None, None].expand(-1, 1, n)).clamp_min(0)[~done]
        left, active = (left - share)[~done], active[~done]
    return chosen.reshape(*plan.batch_shape, n)


def _doubly_stochastic(matrix: Tensor) -> Tensor:
    """Matrices ``(B, n, n)`` scaled down to row and column sums of at most 1, and filled up to sums of 1."""
    matrix = matrix / matrix.sum(-1, keepdim=True).clamp_min(1)
    matrix = matrix / matrix.sum(-2, keepdim=True).clamp_min(1)
    rows, cols = (1 - matrix.sum(-1)).clamp_min(0), (1 - matrix.sum(-2)).clamp_min(0)
    missing = rows.sum(-1).clamp_min(torch.finfo(matrix.dtype).tiny)
    return matrix + rows[:, :, None] * cols[:, None, :] / missing[:, None, None]
