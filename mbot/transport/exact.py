"""Exact optimal transport: linear assignment for uniform weights, network simplex for all others.

``min <C, P>`` over ``P >= 0`` with row sums ``a`` and column sums ``b``. Every plan is certified: dual variables give
a lower bound on the optimum, and the relative gap is in ``Plan.error``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mbot import checks, convergence
from mbot.kernels import device_matching
from mbot.plan import Plan
from mbot.transport.base import Transport

# The gap of a plan that is optimal up to rounding: float64 dual values of up to n * eps relative size.
_TOLERANCE = 1e-9
_ADVICE = "Rescale the cost or pass it in float64."
_ALL_FORBIDDEN = "every pair of a problem is forbidden (its costs are all +inf)"


@dataclass(frozen=True)
class ExactOT(Transport):
    """Exact (unregularised) optimal transport of a batch of problems, always optimal.

    Args:
        solver: ``"assignment"`` (uniform weights, n = m, after dropping points of weight zero; a permutation),
            ``"network_simplex"`` (any weights; POT's solver, run to optimality), or ``"auto"``: the assignment
            wherever it applies. There is no crossover to pick by: in every cell measured (n = 256 … 4096, d = 2 and
            3072, Gaussian and clustered clouds) its kernel was faster than the best of scipy, POT's network simplex
            and lapx; the table is ``benchmarks/results/mbot_one_problem.md``.

    Uniform square problems on a CUDA device are solved there where Triton is installed (it comes with torch's CUDA
    builds) and n is at most 16,384; a call then waits for the device three times, to check its input and its result.
    All other problems on a device are solved on the CPU, and the plan is copied back.

    >>> x = torch.tensor([[0.0], [1.0], [2.0]])
    >>> ExactOT()(x, x.flip(0) + 0.5)
    tensor(0.2500)
    """

    solver: str = "auto"

    def __post_init__(self) -> None:
        checks.choice(self.solver, "solver", ("auto", "assignment", "network_simplex"))

    def _solve(self, cost: Tensor, a: Tensor | None, b: Tensor | None) -> Plan:
        n, m = cost.shape[-2:]
        if (a is not None or b is not None) and n > 0:
            uniform = cost.new_ones((), dtype=torch.float64)
            a = (uniform / n).expand(*cost.shape[:-1]) if a is None else a
            b = (uniform / m).expand(*cost.shape[:-2], m) if b is None else b
            b = checks.equal_totals(a, b)
        if a is None and n == m and self.solver != "network_simplex" and device_matching.applies(cost):
            return _on_device(cost)
        flat = np.ascontiguousarray(cost.flatten(0, -3).cpu().numpy() if cost.ndim > 2 else cost[None].cpu().numpy())
        if a is None and n == m and self.solver != "network_simplex":
            found = _assign_uniform(flat)
        else:
            rows = np.full((len(flat), n), 1 / n) if a is None else a.reshape(-1, n).cpu().numpy()
            cols = np.full((len(flat), m), 1 / m) if b is None else b.reshape(-1, m).cpu().numpy()
            found = _general(flat, rows, cols, self.solver)
        return _plan("ExactOT", cost, found)


_Found = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def _plan(name: str, cost: Tensor, found: _Found) -> Plan:
    """Arrays of ``B`` problems as a sparse `Plan` of the cost's batch shape, with a warning if not certified."""
    row, col, mass, error, f, g = found
    batch = cost.shape[:-2]

    def tensor(array: np.ndarray, dtype: torch.dtype) -> Tensor:
        return torch.from_numpy(array.reshape((*batch, *array.shape[1:]))).to(cost.device, dtype)

    plan = Plan(
        tensor(mass, cost.dtype),
        (cost.shape[-2], cost.shape[-1]),
        tensor(row, torch.int64),
        tensor(col, torch.int64),
        converged=tensor(error <= _TOLERANCE, torch.bool),
        error=tensor(error, torch.float64),
        potentials=(tensor(f, cost.dtype), tensor(g, cost.dtype)),
    )
    convergence.warn_unconverged(name, plan, _ADVICE)
    return plan


def _on_device(cost: Tensor) -> Plan:
    """Uniform square problems ``(…, n, n)`` as tensors on the costs' device, which the CPU path does in numpy."""
    n = cost.shape[-1]
    walled, forbidden = forbid_on_device(cost.reshape(-1, n, n))
    found = device_matching.match(walled)
    col = found.column
    row = torch.arange(n, device=cost.device).expand_as(col)
    check_allowed_on_device(forbidden, row, col, torch.ones_like(col))
    matched = walled.gather(2, col[:, :, None])[:, :, 0].double().abs()
    size = matched.sum(1) + found.row_dual.abs().sum(1) + found.col_dual.abs().sum(1)
    error = relative_on_device(found.gap, size, n * found.typical)
    mass = torch.full(col.shape, 1 / n, dtype=cost.dtype, device=cost.device)
    return plan_on_device("ExactOT", cost, row, col, mass, error, found.row_dual, found.col_dual)


def plan_on_device(
    name: str, cost: Tensor, row: Tensor, col: Tensor, mass: Tensor, error: Tensor, f: Tensor, g: Tensor
) -> Plan:
    """Tensors of ``B`` problems as a sparse `Plan` of the cost's batch shape, with a warning if not certified."""
    batch = cost.shape[:-2]

    def shaped(tensor: Tensor) -> Tensor:
        return tensor.reshape((*batch, *tensor.shape[1:]))

    plan = Plan(
        shaped(mass),
        (cost.shape[-2], cost.shape[-1]),
        shaped(row),
        shaped(col),
        converged=shaped(error <= _TOLERANCE),
        error=shaped(error),
        potentials=(shaped(f.to(cost.dtype)), shaped(g.to(cost.dtype))),
    )
    convergence.warn_unconverged(name, plan, _ADVICE)
    return plan


def forbid_on_device(cost: Tensor) -> tuple[Tensor, Tensor | None]:
    """`_forbid` for tensors ``(B, n, m)``."""
    if bool(cost.amax() < torch.inf):
        return cost, None
    forbidden = cost == torch.inf
    if bool(forbidden.flatten(1).all(1).any()):
        raise ValueError(_ALL_FORBIDDEN)
    finite = cost.double()
    low = finite.amin((1, 2))
    high = finite.masked_fill(forbidden, -torch.inf).amax((1, 2))
    margin = high - low + 1e-3 * torch.maximum(low.abs(), high.abs())
    wall = high + torch.where(margin > 0, margin, 1) * (1 + min(cost.shape[-2:]))
    return torch.where(forbidden, wall[:, None, None], finite), forbidden


def check_allowed_on_device(forbidden: Tensor | None, row: Tensor, col: Tensor, mass: Tensor) -> None:
    """`_check_allowed` for tensors."""
    if forbidden is None:
        return
    problem = torch.arange(len(row), device=row.device)[:, None]
    used = (forbidden[problem, row, col] & (mass > 1e-12 * mass.amax())).any(1)
    if bool(used.any()):
        raise ValueError(_unavoidable(int(used.sum()), len(row), int(used.int().argmax())))


def relative_on_device(gap: Tensor, size: Tensor, typical: Tensor) -> Tensor:
    """`_relative` for tensors."""
    return gap.clamp_min(0) / torch.maximum(size, 1e-3 * typical).clamp_min(torch.finfo(torch.float64).tiny)


def _unavoidable(count: int, problems: int, first: int) -> str:
    return (
        f"no plan avoids the forbidden pairs (cost +inf) in {count} of {problems} problems, the first at index {first}"
    )


def _forbid(cost: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Replace ``+inf`` by a finite cost that no optimal plan uses if it can be avoided."""
    with np.errstate(over="ignore"):
        if np.isfinite(cost.sum()):  # one quick pass for the usual case; a sum may also overflow
            return cost, None
    forbidden = np.isinf(cost)
    if not forbidden.any():
        return cost, None
    finite = np.where(forbidden, np.nan, cost.astype(np.float64))
    if np.isnan(finite).all(axis=(-2, -1)).any():
        raise ValueError(_ALL_FORBIDDEN)
    low, high = np.nanmin(finite, axis=(-2, -1)), np.nanmax(finite, axis=(-2, -1))
    margin = high - low + 1e-3 * np.maximum(np.abs(low), np.abs(high))  # in the units of the costs
    wall = high + np.where(margin > 0, margin, 1) * (1 + min(cost.shape[-2:]))
    return np.where(forbidden, wall[:, None, None], finite), forbidden


def _check_allowed(forbidden: np.ndarray | None, row: np.ndarray, col: np.ndarray, mass: np.ndarray) -> None:
    if forbidden is None:
        return
    problem = np.arange(len(row))[:, None]
    used = (forbidden[problem, row, col] & (mass > 1e-12 * mass.max())).any(axis=1)
    if used.any():
        raise ValueError(_unavoidable(int(used.sum()), len(row), int(used.argmax())))


def _relative(gap: Any, size: Any, typical: Any) -> Any:
    """Duality gap relative to the numbers it is computed from, or to 1e-3 of a typical cost where these vanish."""
    return np.maximum(gap, 0) / np.maximum(np.maximum(size, 1e-3 * typical), np.finfo(np.float64).tiny)


def _assign_uniform(cost: np.ndarray) -> _Found:
    """Uniform square problems ``(B, n, n)`` in one call of the batched kernel."""
    from mbot.kernels.assignment import assign

    problems, n, _ = cost.shape
    walled, forbidden = _forbid(cost)
    col, f, g, gap, size, typical = assign(walled.reshape(-1), np.full(problems, n))
    col, f, g = (array.reshape(problems, n) for array in (col, f, g))
    row, mass = np.tile(np.arange(n), (problems, 1)), np.full(col.shape, 1 / n)
    _check_allowed(forbidden, row, col, mass)
    return row, col, mass, _relative(gap, size, n * typical), f, g


def assign_blocks(costs: list[Tensor]) -> list[Tensor]:
    """Exact assignments of square problems of different sizes, solved together: the row matched to each column."""
    from mbot.kernels.assignment import assign

    sizes = np.array([len(cost) for cost in costs])
    dtype = np.float64 if costs[0].dtype == torch.float64 else np.float32
    flat = np.concatenate([cost.cpu().numpy().astype(dtype, copy=False).reshape(-1) for cost in costs])
    column, *_ = assign(flat, sizes)
    return [torch.from_numpy(np.argsort(part)).to(costs[0].device) for part in np.split(column, np.cumsum(sizes)[:-1])]


def _general(cost: np.ndarray, a: np.ndarray, b: np.ndarray, solver: str) -> _Found:
    """Problems with weights: points of weight zero are dropped, then each problem goes to the solver that fits it."""
    from mbot.kernels.threads import run_slices

    problems, n, m = cost.shape
    walled, forbidden = _forbid(cost)
    live = [(np.flatnonzero(p), np.flatnonzero(q)) for p, q in zip(a, b, strict=True)]
    entries = [(np.zeros(0, np.int64),) * 2 + (np.zeros(0),)] * problems
    error, f, g = np.zeros(problems), np.zeros((problems, n)), np.zeros((problems, m))
    square = []
    for p, (rows, cols) in enumerate(live):
        uniform = np.ptp(a[p, rows]) <= 1e-12 * a[p, rows[0]] and np.ptp(b[p, cols]) <= 1e-12 * b[p, cols[0]]
        if len(rows) == len(cols) and uniform and solver != "network_simplex":
            square.append(p)
        elif solver == "assignment":
            raise ValueError(
                f"solver='assignment' needs uniform weights and equally many points of positive weight; problem {p} "
                f"has {len(rows)} and {len(cols)}, {'uniform' if uniform else 'non-uniform'}. Use solver='auto'"
            )

    def submatrix(p: int) -> np.ndarray:
        rows, cols = live[p]
        return walled[p] if len(rows) == n and len(cols) == m else walled[p][np.ix_(rows, cols)]

    def finish(p: int, row: np.ndarray, col: np.ndarray, mass: np.ndarray, g_live: np.ndarray, c: np.ndarray) -> None:
        """Complete the dual variables, certify, and write the result in the full problem's indices."""
        rows, cols = live[p]
        f_live = (c - g_live).min(1)
        matched, wa, wb = c[row, col], a[p, rows], b[p, cols]
        gap = matched @ mass - f_live @ wa - g_live @ wb
        size = np.abs(matched) @ mass + np.abs(f_live) @ wa + np.abs(g_live) @ wb
        error[p] = _relative(gap, size, mass.sum() * np.abs(c).mean())
        f[p, rows], g[p, cols] = f_live, g_live
        entries[p] = (rows[row], cols[col], mass)

    if square:
        from mbot.kernels.assignment import assign

        blocks = [submatrix(p) for p in square]
        sizes = np.array([len(block) for block in blocks])
        column, _, price, *_ = assign(np.concatenate([block.reshape(-1) for block in blocks]), sizes)
        ends = np.cumsum(sizes)[:-1]
        for p, block, col, dual in zip(square, blocks, np.split(column, ends), np.split(price, ends), strict=True):
            row = np.arange(len(block))
            finish(p, row, col, a[p, live[p][0]], dual, block.astype(np.float64))

    rest = sorted(set(range(problems)) - set(square))
    if rest:
        import ot

        def simplex(begin: int, stop: int) -> None:
            for p in rest[begin:stop]:
                rows, cols = live[p]
                c = np.ascontiguousarray(submatrix(p), dtype=np.float64)
                # POT's tolerances are absolute: give it costs in [0, 1] and a total mass of 1. The iteration limit is
                # far above what the simplex needs; POT's default of 1e5 stops early at n >= 2048.
                low, span, total = c.min(), np.ptp(c) or 1.0, a[p].sum()
                scaled = (c - low) / span
                dense, log = ot.lp.emd(
                    a[p, rows] / total, b[p, cols] / total, scaled, numItermax=1_000_000_000, log=True
                )
                row, col = np.nonzero(dense)
                finish(p, row, col, total * dense[row, col], span * log["v"], c)

        run_slices(simplex, [float(len(live[p][0]) * len(live[p][1])) for p in rest])

    width = max(len(entry[0]) for entry in entries)
    row, col, mass = (
        np.zeros((problems, width), np.int64),
        np.zeros((problems, width), np.int64),
        np.zeros((problems, width)),
    )
    for p, (r, c, w) in enumerate(entries):
        row[p, : len(r)], col[p, : len(c)], mass[p, : len(w)] = r, c, w
    _check_allowed(forbidden, row, col, mass)
    return row, col, mass, error, f, g
