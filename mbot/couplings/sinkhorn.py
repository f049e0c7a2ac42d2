"""Entropic couplings of large batches (Zhang et al. 2025, large Sinkhorn couplings, arXiv 2506.05526)."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mbot import checks, convergence
from mbot.cost import Cost, at_least_float32, check_cost, paired, pairwise
from mbot.couplings.base import Coupling, Labels, Pairs, squared_reg
from mbot.geometry import Dense, Geometry, Points, Shard
from mbot.numerics import running_sum
from mbot.random import draw
from mbot.solvers.sinkhorn import solve_one
from mbot.solvers.support import large_entries

_PROBE = 1024  # samples a side that the spread of the costs is measured on


@dataclass(frozen=True, eq=False)
class SinkhornPotentials:
    """The result of a call of `SinkhornCoupling`, from which its source potential is evaluated at new samples.

    Attributes:
        points: ``(m, d)`` target samples, as the cost saw them.
        psi: ``(m,)`` their potentials in units of eps.
        eps: regularisation, in units of the cost.
        centres: ``(2, d)`` what the two sides were shifted by.
    """

    points: Tensor
    psi: Tensor
    eps: float
    centres: Tensor


@dataclass(frozen=True)
class SinkhornCoupling(Coupling):
    """Pairs along the entropic plan of a batch too large for its cost matrix; every x1 once, class-agnostic.

    The plan has a source for each x1 drawn from its column. Costs are held in memory as long as they have at most
    ``cells`` entries, and made in tiles of at most that many otherwise (smaller ones on a CPU, that stay in its cache).
    65,536 samples a side in the plane took 67 MB beside the samples, and a pass over 4.3 · 10^9 pairs (6 s of one core)
    for each half-iteration.

    ``relative=True`` measures ``reg`` in standard deviations of the costs, as the paper does (it uses 0.001 to 1; an
    entropy ``info["plan_entropy"]`` of about 0.1 is its advice: lower ``reg`` if there is more). The dot-product cost
    gives the plans of the squared distance at twice its ``reg``, without the norms that no coupling can change; it is
    taken about the two means.

    **Warm start**: ``coupling.resume(pairs.info)`` is the same coupling that starts from the potentials of a previous
    call, evaluated at the new samples. Where the next batch comes from the same distributions it saves a quarter of
    the iterations at a moderate ``reg`` (0.1), and little at a small one, where the samples' own fluctuations decide.

    ``info`` holds ``plan_entropy`` (0 for a matching, 1 for the independent coupling), ``reg`` (in units of the cost),
    ``error`` (L1, of the marginals), ``iterations``, ``converged``, ``transport_cost`` (mean cost of the pairs) and
    ``potentials``.

    Args:
        reg: regularisation.
        relative: whether in standard deviations of the costs.
        cost: ground cost, see `mbot.pairwise_cost`; anything but ``"dot"`` is not shifted.
        max_iter: iterations before a `mbot.ConvergenceWarning`.
        tol: L1 error of the marginals to stop at.
        cells: entries of the largest matrix that is made.
        start: where to start from; set by `resume`.

    >>> x0, x1 = torch.randn(512, 2), torch.randn(512, 2) + 5
    >>> pairs = SinkhornCoupling(reg=0.1)(x0, x1)
    >>> 0.5 < pairs.info["plan_entropy"] < 0.9, len(pairs)
    (True, 512)
    >>> again = SinkhornCoupling(reg=0.1).resume(pairs.info)(torch.randn(512, 2), x1)
    >>> again.info["iterations"] <= pairs.info["iterations"]
    True
    """

    ignores_conditions = True

    reg: float
    relative: bool = True
    cost: Cost = "dot"
    max_iter: int = 2000
    tol: float = 1e-3
    cells: int = 1 << 24
    start: SinkhornPotentials | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        checks.store(
            self,
            reg=checks.positive(self.reg, "reg"),
            relative=checks.flag(self.relative, "relative"),
            max_iter=checks.count(self.max_iter, "max_iter"),
            tol=checks.positive(self.tol, "tol"),
            cells=checks.count(self.cells, "cells"),
        )
        check_cost(self.cost)
        if self.start is not None and not isinstance(self.start, SinkhornPotentials):
            raise TypeError(f"start must be the potentials of a previous call; got {type(self.start).__name__}")

    def resume(self, info: dict[str, Any]) -> SinkhornCoupling:
        """This coupling, starting from where the call that returned ``info`` ended."""
        if "potentials" not in info:
            raise ValueError(f"info must come from a SinkhornCoupling; it holds {list(info)}")
        return dataclasses.replace(self, start=info["potentials"])

    @property
    def entropic_reg(self) -> float | None:
        """See `Coupling`; None if ``reg`` is relative to the costs."""
        return None if self.relative else squared_reg(self.reg, self.cost)

    def _pair(
        self,
        x0: Tensor,
        x1: Tensor,
        y0: Labels | None,
        y1: Labels | None,
        generator: torch.Generator | None,
    ) -> Pairs:
        return self.couple(x0, x1, Shard(), generator)

    def couple(self, x0: Tensor, x1: Tensor, shard: Shard, generator: torch.Generator | None) -> Pairs:
        """Pair all of ``x1`` with sources of which ``x0`` may be this process's shard (see `mbot.distributed`)."""
        x, y = at_least_float32(x0), at_least_float32(x1)
        centres = x.new_zeros(2, x.shape[1])
        if self.start is not None:
            if self.start.points.shape[1] != x.shape[1]:
                raise ValueError(
                    f"the potentials to start from are for {self.start.points.shape[1]} features; got {x.shape[1]}"
                )
            centres = self.start.centres.to(x)
        elif self.cost == "dot":
            centres = torch.stack((shard.mean(x), y.mean(0)))
        x, y = x - centres[0], y - centres[1]

        probe = pairwise(shard.thinned(x, _PROBE), y[:: -(-len(y) // _PROBE)], self.cost).double()
        limit = torch.inf if isinstance(self.cost, str) else _limit(probe)
        probe = probe[probe <= limit] if limit < torch.inf else probe.flatten()
        deviation = float(probe.std()) if probe.numel() > 1 else 0.0
        eps = self.reg * (deviation or 1.0) if self.relative else self.reg
        inner: Geometry = Points(x, y, self.cost, self.cells, limit=limit)
        if len(x) * len(y) <= self.cells:
            costs = pairwise(x, y, self.cost)
            costs = costs if limit == torch.inf else torch.where(costs > limit, torch.inf, costs)
            inner = Dense(costs[None], forbidden=limit < torch.inf)
        geometry = shard.geometry(inner)
        start = None
        if self.start is not None:
            old = Points(x, self.start.points.to(x), self.cost, self.cells, self.start.eps)
            start = shard.gather(-self.start.eps * old.row_sums(self.start.psi.to(x.device)[None])[0])[None] / eps
        _, n, m = geometry.shape
        log_a, log_b = (torch.full((1, size), -math.log(size), dtype=torch.float64, device=x.device) for size in (n, m))
        found, eps = solve_one(
            geometry, log_a, log_b, reg=eps, spread=float(probe.amax() - probe.amin()), max_iter=self.max_iter,
            tol=self.tol, start=start,
        )  # fmt: skip
        iterations = int(found.iterations)
        source, held, entropy, apart = _draw(shard, geometry, found.phi[0], self.cells, generator)
        error = max(float(found.error), apart if apart > 32 * torch.finfo(x.dtype).eps else 0.0)
        if not error <= self.tol:
            convergence.warn(
                f"SinkhornCoupling: not converged after {iterations} iterations (error {error:.3g}). Raise "
                f"max_iter (now {self.max_iter}), raise reg (now {self.reg:g}), or loosen tol (now {self.tol:g})"
            )
        total = _total_cost(x[source[held] - shard.first], y[held], self.cost, self.cells)
        info = {
            "plan_entropy": entropy, "reg": eps, "error": error, "iterations": iterations,
            "converged": error <= self.tol, "transport_cost": float(shard.sum(total)) / len(y),
            "potentials": SinkhornPotentials(y, found.psi[0], eps, centres),
        }  # fmt: skip
        return Pairs(source, torch.arange(len(y), device=y.device), info=info)


def _limit(costs: Tensor) -> float:
    """The cost of a callable beyond which pairs count as forbidden, from a sample ``(n, m)``; ``inf`` if none does."""
    checks.cost_matrix(costs)
    a, b = (torch.full((1, size), 1 / size, dtype=torch.float64, device=costs.device) for size in costs.shape)
    low = costs.amin()
    if not bool(low < torch.inf):
        raise ValueError("the cost forbids every pair of a sample of the batch (it is +inf)")
    # A pair is forbidden if it costs far more than the pairs that half of the sample's points have.
    half = torch.full((1,), 0.5, dtype=torch.float64, device=costs.device)
    limit = float(large_entries((costs - low)[None], a, b, 0.0, half) + low)
    return limit if math.isfinite(limit) or not bool((costs == torch.inf).any()) else torch.finfo(costs.dtype).max


def _draw(
    shard: Shard, geometry: Geometry, phi: Tensor, cells: int, generator: torch.Generator | None
) -> tuple[Tensor, Tensor, float, float]:
    """A source for each column and whether it is in this shard; of the plan, entropy and L1 error of the row masses.

    See `mbot.plan_entropy`.
    """
    _, n, m = geometry.shape
    uniform = shard.broadcast(draw(torch.rand, m, generator=generator, device=phi.device, dtype=torch.float64))
    held, uniform, share = shard.split(geometry, uniform)
    phi = shard.own(phi)
    source = torch.empty(m, dtype=torch.int64, device=phi.device)
    reached = torch.zeros(len(phi), dtype=torch.float64, device=phi.device)
    inside = torch.zeros((), dtype=torch.float64, device=phi.device)
    for cols, tile in geometry.col_tiles(max(1, cells // 2)):  # sums of the probabilities are in float64
        tile = tile.add_(phi.to(tile.dtype))
        tile = tile.sub_(tile.amax(1, keepdim=True))
        mass = tile.exp()
        cumulative = running_sum(mass, 1, dtype=torch.float64)
        total = cumulative[:, -1:]
        wanted = uniform[cols, None] * total
        source[cols] = torch.searchsorted(cumulative, wanted, right=True)[:, 0].clamp_max(len(phi) - 1)
        tile = tile.clamp_min_(torch.finfo(tile.dtype).min)  # forbidden pairs: 0 log 0 = 0
        inside += (share[cols] * (total[:, 0].log() - tile.mul_(mass).sum(1) / total[:, 0])).sum()
        reached += (share[cols] / total[:, 0]).to(mass.dtype) @ mass
    source = shard.sum(torch.where(held, source + shard.first, 0))
    reached = shard.gather(reached)
    reached = reached / reached.sum()
    apart = float((reached - 1 / n).abs().sum())
    if min(n, m) == 1:
        return source, held, 0.0, apart
    inside = shard.sum(inside - torch.xlogy(share, share).sum())
    of_rows, of_cols = -torch.xlogy(reached, reached).sum(), torch.log(reached.new_tensor(float(m)))
    whole = of_cols + inside / m
    entropy = (whole - torch.maximum(of_rows, of_cols)) / torch.minimum(of_rows, of_cols).clamp_min(1e-9)
    return source, held, float(entropy.clamp(0, 1)), apart


def _total_cost(x: Tensor, y: Tensor, cost: Cost, cells: int) -> Tensor:
    """Summed cost of matched points; of a callable from blocks of pairs, as it has no other form."""
    if isinstance(cost, str):
        return paired(x, y, cost).sum(dtype=torch.float64)
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    for p, q in zip(x.split(cells), y.split(cells), strict=True):
        total += cost(p[:, None], q[:, None])[:, 0, 0].sum(dtype=torch.float64)
    return total
