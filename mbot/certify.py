"""Certificates of exact plans: solve, measure the duality gap, and solve again under caps where it stays open.

Potentials with ``f_i + g_j <= C_ij`` bound every plan from below, so the gap between them and a plan certifies it,
whatever solver found both.

Costs that no good plan pays ("never" costs of 1e20, forbidden pairs of ``+inf``) would leave float64 without digits
for the others, so solvers see ``min(C, cap)``. Potentials for that are potentials for C. A plan that pays no capped
entry therefore is optimal for C, and its certificate says so; otherwise the cap is raised.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from mbot import checks
from mbot.numerics import kth_smallest
from mbot.problem import TOLERANCE, Problems, Solution

_ROUNDING = 1e-13  # gap, relative to the smaller costs, that rounding may leave where the plan costs next to nothing
_STEP = 100  # ratio of a cap to the one before
_NO_ROWS, _NO_WEIGHTS = np.zeros((0, 0), np.int64), np.zeros((0, 0))  # stand for None in compiled code


def certified(problems: Problems, solve: Callable[[Problems], Solution]) -> Solution:
    """Solve and certify; problems whose certificate stays open are solved again with caps on their costs.

    Args:
        problems: the problems; costs may be ``+inf``.
        solve: their solver; see `Problems` for what it may leave out.

    Returns:
        Solutions with their ``error``; one that is above `TOLERANCE` is not certified.

    Raises:
        ValueError: costs that are NaN, -inf or too large; no plan avoids the forbidden pairs.
    """
    found = solve(problems)
    error = _errors(problems, found)
    if not (error <= TOLERANCE).all():
        found = found.take(slice(None))
        _again(problems, solve, found, error)
    return replace(found, error=error)


def _errors(problems: Problems, found: Solution, floor: np.ndarray | None = None) -> np.ndarray:
    """Error of each solution, ``(B,)``: its gap relative to its cost, or to a cost per mass of ``floor``, if larger.

    Computed on the host: all that is read are vectors, and the answer is needed there.
    """
    from mbot.kernels.certificate import errors

    flat, start, stride = problems.flat, problems.starts, problems.cols
    if flat.is_cuda:
        flat, stride = problems.at(found.row, found.col).flatten(), np.zeros_like(stride)
        start = found.col.shape[1] * np.arange(problems.count)
    row = _NO_ROWS if found.row is None else _host(found.row)
    a, b = (_NO_WEIGHTS if weight is None else _host(weight) for weight in (problems.a, problems.b))
    moved = -1.0 if problems.mass is None else problems.mass
    return errors(
        flat.cpu().numpy(), start, stride, row, _host(found.col), _host(found.mass), _host(found.f), _host(found.g),
        a, b, moved, np.zeros(problems.count) if floor is None else floor,
    )  # fmt: skip


def _host(tensor: Tensor) -> np.ndarray:
    return tensor.contiguous().cpu().numpy()


def _again(problems: Problems, solve: Callable[[Problems], Solution], found: Solution, error: np.ndarray) -> None:
    """Solve problems that are not certified under caps, from low ones up; ``found`` and ``error`` change in place."""
    at = np.flatnonzero(~(error <= TOLERANCE))
    few = problems.take(at)
    checks.cost_range(few.flat, *torch.stack(few.flat.aminmax()).tolist())
    error[at] = _near(few, found.take(at, few.size), error[at])
    levels = _Levels.of(few)
    level = levels.needed
    left = error[at] > TOLERANCE
    while left.any():
        which = np.flatnonzero(left)
        some, cap = few.take(which), levels.caps(level)
        other = _under(some, solve, cap[which])
        new = _near(some, other, _errors(some, other))
        better = np.flatnonzero(new < error[at[which]])
        error[at[which[better]]] = new[better]
        found.put(at[which[better]], other.take(better))
        left &= (error[at] > TOLERANCE) & (level < levels.high).cpu().numpy()
        # If no cost lies between the level and the cap, a plan must pay one above it: the least of these is next.
        following = few.least_above(levels.low + level)
        level = torch.where(following > cap, following - levels.low, _STEP * (cap - levels.low)).minimum(levels.high)
    unavoidable = at[error[at] == np.inf]
    if len(unavoidable):
        raise ValueError(
            f"no plan avoids the forbidden pairs (cost +inf) in {len(unavoidable)} of {problems.count} problems, the "
            f"first at index {unavoidable[0]}"
        )


def _under(problems: Problems, solve: Callable[[Problems], Solution], cap: Tensor) -> Solution:
    """Solutions with costs capped, without the mass that rounding left on capped entries."""
    found = solve(problems.under(cap))
    rounding = found.mass <= 1e-12 * found.mass.sum(1, keepdim=True)
    over = problems.at(found.row, found.col) > cap[:, None]
    return replace(found, mass=found.mass.masked_fill(over & rounding, 0))


def _near(problems: Problems, found: Solution, error: np.ndarray) -> np.ndarray:
    """Errors of solutions that are not certified, relative to the smaller costs where plans cost next to nothing."""
    error = error.copy()
    which = np.flatnonzero((error > TOLERANCE) & (error < np.inf))
    if len(which):
        some = problems.take(which)
        # The scale of one small cost more than a plan has pairs: among fewer of them there would be no choice.
        pairs = max(some.size) if some.mass is None else int(some.mass)
        floors = []
        for cost in some.parts():
            size = cost.flatten(1).abs().double()
            among = kth_smallest(size, min(pairs + 1, size.shape[1])).nan_to_num(posinf=0)
            least = torch.where(size > 0, size, torch.inf).amin(1).nan_to_num(posinf=1)
            floors.append(_ROUNDING / TOLERANCE * (2 + min(cost.shape[1:])) * among.maximum(least))
        error[which] = _errors(some, found.take(which, some.size), torch.cat(floors).cpu().numpy())
    return error


@dataclass(frozen=True)
class _Levels:
    """Costs by which the caps of ``B`` problems are chosen, ``(B,)`` each.

    Attributes:
        low: the least cost.
        high: the largest finite cost, above the least one.
        needed: a cost above the least one that no plan can avoid, or a smaller one.
        detour: pairs that a detour around a pair may have.
        forbidden: whether there are infinite costs.
    """

    low: Tensor
    high: Tensor
    needed: Tensor
    detour: Tensor
    forbidden: Tensor

    @staticmethod
    def of(problems: Problems) -> _Levels:
        """Levels of these problems."""
        parts = [_Levels._of(cost, problems.mass) for cost in problems.parts()]
        return _Levels(*(torch.cat(column) for column in zip(*parts, strict=True)))

    @staticmethod
    def _of(cost: Tensor, mass: float | None) -> tuple[Tensor, ...]:
        low = cost.amin((1, 2))
        if bool((low == torch.inf).any()):
            raise ValueError("every pair of a problem is forbidden (its costs are all +inf)")
        infinite = cost == torch.inf
        high = cost.masked_fill(infinite, -torch.inf).amax((1, 2))
        needed = cost.masked_fill(cost <= low[:, None, None], torch.inf).amin((1, 2))
        if mass is None:
            needed = needed.maximum(cost.amin(1).amax(1)).maximum(cost.amin(2).amax(1))
        else:
            needed = needed.maximum(kth_smallest(cost.flatten(1), 1 + int(mass)))
        low, high, needed = low.double(), high.double(), needed.minimum(high).double()
        return low, high - low, needed - low, torch.full_like(low, 1 + min(cost.shape[1:])), infinite.flatten(1).any(1)

    def caps(self, level: Tensor) -> Tensor:
        """Big-M: more than any detour over costs up to ``level`` above the least; +inf where all finite costs are."""
        margin = level + 1e-3 * self.low.abs().maximum((self.low + level).abs())  # in the units of the costs
        big_m = self.low + level + torch.where(margin > 0, margin, 1) * self.detour
        return torch.where((level < self.high) | self.forbidden, big_m, torch.inf)
