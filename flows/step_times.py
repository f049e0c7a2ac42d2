"""Step times for few Euler steps: BOSS (Nguyen et al., ICLR 2024, arXiv 2312.16414).

One Euler jump of a trained field from grid time ``t_j`` to ``t_k`` misses the fine trajectory by
``c_jk = E |x_k - x_j - (t_k - t_j) v(x_j, t_j)|²``. Stage 1 finds the path from 0 to 1 with a given number of jumps of
least total ``c`` by dynamic programming. Stage 2 fine-tunes the field so that those jumps meet the trajectory.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from flows.integrate import start_points, trajectory
from flows.interrupt import NonFiniteLoss
from flows.matching import VelocityModel
from mbot import checks
from mbot import conditions as labels


def jump_costs(model: VelocityModel, x0: Tensor, *, grid: int = 100, y: Any = None) -> Tensor:
    """Mean squared errors ``c[j, k]`` of one Euler jump from grid time j/grid to k/grid, per feature.

    Args:
        model: ``model(t, x, y) -> velocity``.
        x0: ``(B, d…)`` noise to roll out; the paper takes 100.
        grid: Euler steps of the fine trajectory.
        y: conditions.

    Returns:
        ``(grid + 1, grid + 1)`` float64; ``+inf`` where k <= j. The neighbours' are 0: the fine trajectory is Euler's.
    """
    x = trajectory(model, x0, y=y, method="euler", steps=checks.count(grid, "grid")).x.flatten(2).double()
    t = torch.linspace(0, 1, grid + 1, dtype=torch.float64, device=x.device)
    slope = x.diff(dim=0) * grid  # the fine trajectory's own velocities
    cost = torch.full((grid + 1, grid + 1), torch.inf, dtype=torch.float64, device=x.device)
    for j in range(grid):
        miss = x[j + 1 :] - x[j] - (t[j + 1 :] - t[j])[:, None, None] * slope[j]
        cost[j, j + 1 :] = miss.square().mean((1, 2))
        cost[j, j + 1] = 0
    return cost.cpu()


def best_path(cost: Tensor, steps: int) -> tuple[Tensor, float]:
    """The cheapest path from the first to the last node with exactly ``steps`` edges, by dynamic programming.

    Args:
        cost: ``(n, n)`` edge costs, ``+inf`` where there is no edge.
        steps: number of edges.

    Returns:
        ``(steps + 1,)`` int64 nodes, and the total cost.

    >>> cost = torch.full((4, 4), torch.inf)
    >>> cost[0, 1], cost[0, 2], cost[1, 3], cost[2, 3] = 5.0, 1.0, 1.0, 1.0
    >>> best_path(cost, 2)
    (tensor([0, 2, 3]), 2.0)
    """
    if cost.ndim != 2 or cost.shape[0] != cost.shape[1]:
        raise ValueError(f"cost must be square; got shape {tuple(cost.shape)}")
    checks.count(steps, "steps")
    value = torch.full((len(cost),), torch.inf, dtype=torch.float64)
    value[0] = 0
    origins = []
    for _ in range(steps):
        value, origin = (value[:, None] + cost.double()).min(0)
        origins.append(origin)
    if not bool(value[-1].isfinite()):
        raise ValueError(f"no path from the first to the last of {len(cost)} nodes has {steps} edges")
    nodes = [len(cost) - 1]
    for origin in reversed(origins):
        nodes.append(int(origin[nodes[-1]]))
    return torch.tensor(nodes[::-1]), float(value[-1])


def path_cost(cost: Tensor, times: Tensor) -> float:
    """Total cost of the jumps between ``times`` ``(K + 1,)``, moved to the grid of `jump_costs`: the objective."""
    nodes = (times.cpu() * (len(cost) - 1)).round().long()
    return float(cost[nodes[:-1], nodes[1:]].sum())


def bellman_schedule(model: VelocityModel, x0: Tensor, *, steps: int, grid: int = 100, y: Any = None) -> Tensor:
    """The best ``steps`` Euler step times of a trained field (BOSS, stage 1).

    By its own objective (`flows.step_times.path_cost`) never worse than equal steps. The paper finds large gains on
    faces and scenes and small ones on CIFAR-10; a schedule belongs to the field it was found for.

    Args:
        model: ``model(t, x, y) -> velocity``, in eval mode.
        x0: ``(B, d…)`` noise; 100 rows suffice.
        steps: number of steps, at most ``grid``.
        grid: candidate times.
        y: conditions of the rows.

    Returns:
        ``(steps + 1,)`` times increasing from 0 to 1, for ``flows.integrate(…, method="euler", times=times)``.
    """
    if checks.count(steps, "steps") > checks.count(grid, "grid"):
        raise ValueError(f"steps must be at most grid={grid}; got {steps}")
    nodes, _ = best_path(jump_costs(model, x0, grid=grid, y=y), steps)
    return nodes / grid


def straighten(
    model: nn.Module,
    source: Callable[[int, torch.Generator], Tensor] | Tensor,
    times: Tensor,
    *,
    iterations: int = 1000,
    batch_size: int = 64,
    grid: int = 100,
    rank: int | None = None,
    lr: float = 1e-4,
    conditions: Any = None,
    pool: int = 1024,
    generator: torch.Generator | None = None,
) -> list[float]:
    """Fine-tune a field, in place, so that its Euler jumps between given times meet its fine trajectory (stage 2).

    Data-free: trajectories of ``pool`` noises are rolled out once with the given model; then ``v(x_τk, τ_k)`` is
    regressed to the chord ``(x_τk+1 - x_τk) / (τ_k+1 - τ_k)`` of its own trajectory.

    Args:
        model: ``model(t, x, y) -> velocity``; keep a copy if the original is needed.
        source: noise, as a callable ``source(n, generator)`` or a tensor ``(N, d…)`` of at least ``pool`` rows.
        times: ``(K + 1,)`` step times, such as those of `bellman_schedule`.
        iterations: gradient steps (paper: 12,000).
        batch_size: trajectories a step; each gives K regression targets.
        grid: Euler steps of the fine trajectory.
        rank: train low-rank updates (LoRA; Hu et al. 2021, arXiv 2106.09685) of this rank on all linear and
            convolution weights, and merge them at the end; None trains all weights. The paper uses 4.
        lr: Adam's learning rate.
        conditions: conditions of the pool's rows.
        pool: noises (paper: 5,000).
        generator: source of noise and order.

    Returns:
        The loss of each iteration.

    Raises:
        NonFiniteLoss: NaN or infinity in the loss or gradient.
    """
    times = checks.finite(checks.floating(times, "times"), "times")
    if times.ndim != 1 or len(times) < 2 or not bool((times.diff() > 0).all()):
        raise ValueError("times must be a strictly increasing vector of at least two times")
    pool, batch_size = checks.count(pool, "pool"), checks.count(batch_size, "batch_size")
    labels.check(conditions, pool, "conditions", f"the pool={pool} noises")
    device = next(model.parameters()).device
    if isinstance(source, Tensor):
        if len(source) < pool:
            raise ValueError(f"source must hold at least pool={pool} rows; got {len(source)}")
        x0 = source[:pool].to(device)
    else:
        x0 = start_points(source(pool, generator or torch.default_generator), "source").to(device)
        if len(x0) != pool:
            raise ValueError(f"source must give the pool={pool} noises that it is asked for; got {len(x0)}")
    knots = _knots(model, x0, times.to(device), grid, conditions)
    chords = knots.diff(dim=0) / times.diff().to(device).reshape(-1, *([1] * x0.ndim))
    at = times[:-1].to(device, x0.dtype)

    lora = None if rank is None else _LowRank(model, checks.count(rank, "rank"), generator)
    trained = list(model.parameters()) if lora is None else lora.parameters()
    optimizer = torch.optim.Adam(trained, lr=checks.positive(lr, "lr"))
    losses = []
    for _ in range(checks.count(iterations, "iterations")):
        where = "cpu" if generator is None else generator.device
        rows = torch.randint(pool, (batch_size,), generator=generator, device=where).to(device)
        x, target = knots[:-1, rows].flatten(0, 1).to(x0.dtype), chords[:, rows].flatten(0, 1)
        y = labels.select(conditions, rows.repeat(len(at)))
        run = model if lora is None else lora
        loss = (run(at.repeat_interleave(batch_size), x, y) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        losses.append(float(loss.detach()))
        norm = float(nn.utils.clip_grad_norm_(trained, math.inf))
        if not math.isfinite(losses[-1] + norm):
            raise NonFiniteLoss(
                f"iteration {len(losses)}: the loss is {losses[-1]:g}, the gradient norm {norm:g}, at lr={lr:g}; the "
                "model's weights are those of the iteration before. Lower lr"
            )
        optimizer.step()
    if lora is not None:
        lora.merge()
    return losses


def _knots(model: nn.Module, x0: Tensor, times: Tensor, grid: int, y: Any) -> Tensor:
    """The fine trajectory at the step times, ``(K + 1, B, d…)``."""
    fine = torch.cat((torch.linspace(float(times[0]), float(times[-1]), grid + 1, device=times.device), times)).unique()
    keep = fine.diff(prepend=fine[:1] - 1) > 1e-6  # times that are grid points up to rounding
    fine = fine[keep]
    x = trajectory(model, x0, y=y, method="euler", times=fine.to(x0.dtype)).x
    return x[(fine[:, None] - times).abs().argmin(0)]


class _LowRank(nn.Module):
    """A model whose linear and convolution weights carry trained updates ``A B`` of low rank."""

    def __init__(self, model: nn.Module, rank: int, generator: torch.Generator | None) -> None:
        super().__init__()
        self.model = [model]  # not registered: its own weights stay as they are
        self.pairs: dict[str, tuple[nn.Parameter, nn.Parameter]] = {}
        for name, module in model.named_modules():
            if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)):
                weight = module.weight.detach()
                down = torch.randn(rank, weight[0].numel(), generator=generator).to(weight) / weight[0].numel() ** 0.5
                self.pairs[f"{name}.weight"] = (
                    nn.Parameter(torch.zeros(len(weight), rank).to(weight)),
                    nn.Parameter(down),
                )

    def parameters(self, recurse: bool = True) -> Any:
        """The updates only."""
        return [parameter for pair in self.pairs.values() for parameter in pair]

    def _updated(self) -> dict[str, Tensor]:
        weights = dict(self.model[0].named_parameters())
        return {n: weights[n].detach() + (up @ down).reshape(weights[n].shape) for n, (up, down) in self.pairs.items()}

    def forward(self, t: Tensor, x: Tensor, y: Any = None) -> Tensor:
        """The updated model."""
        return torch.func.functional_call(self.model[0], self._updated(), (t, x, y))

    def merge(self) -> None:
        """Write the updates into the model."""
        with torch.no_grad():
            for name, weight in self._updated().items():
                self.model[0].get_parameter(name).copy_(weight)
