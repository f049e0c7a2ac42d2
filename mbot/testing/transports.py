"""The checks of `mbot.testing.check_transport`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mbot.cost import pairwise_cost
from mbot.plan import Plan
from mbot.testing.tools import case, close, require
from mbot.transport import Transport

_SIZES = ((6, 6), (5, 7), (1, 1), (1, 4), (4, 1))


def _clouds(
    *batch: int, n: int = 6, m: int = 6, device: torch.device, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(*batch, size, 3, generator=g, dtype=torch.float64) for size in (n, m))
    return [points.to(device, dtype) for points in (x, y + 0.5)]


def _plan(transport: Transport, cost: Tensor, a: Tensor | None = None, b: Tensor | None = None) -> Plan:
    """A plan; errors of the transport, and inputs that it changed, are raised with the input."""
    inputs = {"cost": cost, "a": a, "b": b}
    before = {name: None if value is None else value.clone() for name, value in inputs.items()}
    try:
        plan = transport.plan(cost, a, b)
    except Exception as error:
        raise AssertionError(case(transport, f"plan raised {error!r}", **before)) from error
    for name, value in inputs.items():
        kept: Any = before[name]
        same = value is None or torch.equal(value, kept)
        require(same, case(transport, f"plan changed {name} in place", **before))
    return plan


def _plans(transport: Transport, device: torch.device) -> None:
    g = torch.Generator().manual_seed(0)
    for n, m in _SIZES:
        for dtype in (torch.float32, torch.float64):
            cost = torch.rand(2, 3, n, m, generator=g, dtype=dtype).to(device)
            plan = _plan(transport, cost)

            def promised(promise: bool, says: str, cost: Tensor = cost) -> None:
                require(promise, case(transport, says, cost=cost))

            def equal(got: Tensor, want: Tensor, says: str, cost: Tensor = cost) -> None:
                close(got, want, case(transport, says, cost=cost))

            mass = plan.mass
            promised(plan.size == (n, m) and plan.batch_shape == (2, 3), f"the plan is {plan!r}")
            promised(mass.dtype == dtype and mass.device == cost.device, f"masses are {mass.dtype} on {mass.device}")
            promised(not mass.requires_grad, "masses require gradients: a plan is a constant")
            promised(bool((mass >= 0).all()), "masses are negative or NaN")
            facts = {"converged": torch.bool, "error": torch.float64, "iterations": torch.int64, "penalty": dtype}
            for name, kind in facts.items():
                fact = getattr(plan, name)
                promised(fact.shape == (2, 3) and fact.dtype == kind, f"{name} is {fact.dtype} of {tuple(fact.shape)}")
            promised(bool(plan.converged.all()), f"not converged (error {float(plan.error.max()):.3g})")
            for index, size, name in zip(plan.entries()[:2], plan.size, ("row", "column"), strict=True):
                good = index.dtype == torch.int64 and 0 <= int(index.min()) <= int(index.max()) < size
                promised(good, f"{name} indices are no int64 in [0, {size})")
            dense = plan.to_dense()
            promised(torch.equal(_plan(transport, cost).to_dense(), dense), "the same call gives another plan")
            equal(plan.row_mass(), dense.sum(-1), "row_mass is not the plan's")
            equal(plan.col_mass(), dense.sum(-2), "col_mass is not the plan's")
            equal(plan.cost(cost), (dense * cost).sum((-2, -1)), "cost is not that of the plan")
            equal(transport.value(cost), plan.cost(cost) + plan.penalty, "value is not cost plus penalty")


def _batches(transport: Transport, device: torch.device) -> None:
    x, y = _clouds(2, 3, device=device)
    cost = pairwise_cost(x, y)
    together, values = _plan(transport, cost).to_dense(), transport(x, y)
    for i in range(2):
        for j in range(3):
            says = case(transport, f"problem ({i}, {j}) of a batch (2, 3) is not what it is alone", cost=cost[i, j])
            close(together[i, j], _plan(transport, cost[i, j]).to_dense(), says)
            close(values[i, j], transport(x[i, j], y[i, j]), says)


def _no_problems(transport: Transport, device: torch.device) -> None:
    for shape in ((2, 0, 3, 3), (0, 3, 3), (0, 2, 3, 4)):
        *batch, n, m = shape
        x = torch.zeros(*batch, n, 2, device=device, requires_grad=True)
        y = torch.zeros(*batch, m, 2, device=device)
        cost = pairwise_cost(x, y)
        for weights in ((), (torch.full((n,), 1 / n, device=device), torch.full((m,), 1 / m, device=device))):
            plan = transport.plan(cost, *weights)
            good = plan.to_dense().shape == shape and plan.cost(cost).shape == plan.converged.shape == tuple(batch)
            for values in (transport(x, y, *weights), transport.value(cost, *weights)):
                (grad,) = torch.autograd.grad(values.sum(), x, retain_graph=True)
                good = good and values.shape == tuple(batch) and grad.shape == x.shape
            require(good, f"{transport!r}: a batch of no problems, costs {shape}, does not give no plans")


def _renamed(transport: Transport, device: torch.device) -> None:
    g = torch.Generator().manual_seed(0)
    for n, m in _SIZES[:2]:
        x, y = _clouds(n=n, m=m, device=device)
        cost = pairwise_cost(x, y)
        p, q = (torch.randperm(size, generator=g).to(device) for size in (n, m))
        says = case(transport, f"rows renamed {p.tolist()}, columns {q.tolist()}: another plan", cost=cost)
        close(_plan(transport, cost[p][:, q]).to_dense(), _plan(transport, cost).to_dense()[p][:, q], says)
        close(transport(x[p], y[q]), transport(x, y), says)


def _weightless(transport: Transport, device: torch.device) -> None:
    x, y = _clouds(2, device=device)
    cost = pairwise_cost(x, y)
    keep_x, keep_y = torch.tensor([0, 2, 3, 5], device=device), torch.tensor([1, 2, 4, 5], device=device)
    for left, right in (([0.25] * 4, [0.25] * 4), ([0.1, 0.2, 0.3, 0.4], [0.4, 0.1, 0.25, 0.25])):
        a, b = torch.zeros(2, 6, dtype=torch.float64, device=device)
        a[keep_x], b[keep_y] = (torch.tensor(w, dtype=torch.float64, device=device) for w in (left, right))
        full = _plan(transport, cost, a, b).to_dense()
        part = _plan(transport, cost[:, keep_x][:, :, keep_y], a[keep_x], b[keep_y]).to_dense()
        says = case(transport, "a point of weight 0 is not as if it were not there", cost=cost, a=a, b=b)
        close(full[:, keep_x][:, :, keep_y], part, says)
        close(full.sum((-2, -1)), part.sum((-2, -1)), says)
        alone = transport(x[:, keep_x], y[:, keep_y], a[keep_x], b[keep_y])
        close(transport(x, y, a, b), alone, says)


def _gradients(transport: Transport, device: torch.device) -> None:
    g = torch.Generator().manual_seed(1)
    for cost in ("sqeuclidean", "euclidean", "cosine", "dot"):
        x, y = (points.requires_grad_() for points in _clouds(2, n=5, m=5, device=device))
        says = case(transport, f"gradients under the cost {cost!r} are not those of the value", x=x, y=y)
        of_x, of_y = torch.autograd.grad(transport(x, y, cost=cost).sum(), (x, y))
        for _ in range(2):
            way_x, way_y = (torch.randn(p.shape, generator=g, dtype=p.dtype).to(device) for p in (x, y))
            with torch.no_grad():
                ahead, behind = (transport(x + h * way_x, y + h * way_y, cost=cost).sum() for h in (1e-6, -1e-6))
            parts = torch.cat(((of_x * way_x).flatten(), (of_y * way_y).flatten()))
            off = float(((ahead - behind) / 2e-6 - parts.sum()).abs())
            good = off <= 1e-5 * float(parts.abs().sum()) + 1e-6
            require(good, f"{says}: off by {off:.3g} along a random direction")


def _gradients_in_the_weights(transport: Transport, device: torch.device) -> None:
    g = torch.Generator().manual_seed(1)
    x, y = _clouds(2, n=5, m=6, device=device)
    given = [0.3 + torch.rand(2, size, generator=g, dtype=torch.float64).to(device) for size in (5, 6)]
    a, b = ((weight / weight.sum(-1, keepdim=True)).requires_grad_() for weight in given)
    says = case(transport, "gradients in the weights are not those of the value", x=x, y=y, a=a.detach(), b=b.detach())
    try:
        values = transport(x, y, a, b)
    except (TypeError, ValueError, RuntimeError):  # it says that it has none
        return
    slopes = torch.autograd.grad(values.sum(), (a, b), allow_unused=True) if values.requires_grad else (None, None)
    for weight, slope, side in ((a, slopes[0], 0), (b, slopes[1], 1)):
        if slope is None:
            raise AssertionError(f"{says}: there are none, and no error")
        move = torch.randn(weight.shape, generator=g, dtype=weight.dtype).to(device)
        move -= move.mean(-1, keepdim=True)  # totals stay
        with torch.no_grad():
            moved = ((a + h * move, b) if side == 0 else (a, b + h * move) for h in (1e-6, -1e-6))
            ahead, behind = (transport(x, y, left, right).sum() for left, right in moved)
        off = float(((ahead - behind) / 2e-6 - (slope * move).sum()).abs())
        good = off <= 1e-4 * float((slope * move).abs().sum()) + 1e-6
        require(good, f"{says}: off by {off:.3g} along a random direction")


def _second_derivatives(transport: Transport, device: torch.device) -> None:
    g = torch.Generator().manual_seed(1)
    for cost in ("sqeuclidean", "euclidean"):
        x, y = (points.requires_grad_() for points in _clouds(2, n=5, m=5, device=device))
        way_x, way_y = (torch.randn(p.shape, generator=g, dtype=p.dtype).to(device) for p in (x, y))
        of_x, of_y = torch.autograd.grad(transport(x, y, cost=cost).sum(), (x, y), create_graph=True)
        try:
            found = torch.autograd.grad((of_x * way_x).sum() + (of_y * way_y).sum(), (x, y))
        except RuntimeError:  # it says that it has none
            continue
        ends = []
        for h in (1e-5, -1e-5):
            left, right = ((p + h * way).detach().requires_grad_() for p, way in ((x, way_x), (y, way_y)))
            ends.append(torch.autograd.grad(transport(left, right, cost=cost).sum(), (left, right)))
        says = f"second derivatives under the cost {cost!r} are neither those of the value nor an error"
        for got, ahead, behind in zip(found, *ends, strict=True):
            off, size = (got - (ahead - behind) / 2e-5).abs().amax(), got.abs().amax()
            require(bool(off <= 1e-4 * size + 1e-5), case(transport, says, x=x.detach(), y=y.detach()))


def _callable_cost(transport: Transport, device: torch.device) -> None:
    x, y = _clouds(2, device=device)
    x.requires_grad_()
    named = transport(x, y, cost="sqeuclidean")
    called = transport(x, y, cost=lambda x, y: (x[..., :, None, :] - y[..., None, :, :]).square().sum(-1))
    says = case(transport, "a callable cost gives something else than its name", x=x.detach(), y=y)
    close(named, called, says)
    close(torch.autograd.grad(named.sum(), x)[0], torch.autograd.grad(called.sum(), x)[0], says)


def _half(transport: Transport, device: torch.device) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        x, y = _clouds(2, device=device, dtype=dtype)
        says = case(transport, "half precision is not computed in float32", x=x, y=y)
        close(transport(x, y), transport(x.float(), y.float()), says)


def _uniform_mass(transport: Transport, device: torch.device) -> None:
    for n, m in _SIZES:
        for dtype in (torch.float32, torch.float64):
            x, y = _clouds(n=n, m=m, device=device, dtype=dtype)
            cost = pairwise_cost(x, y)
            mass = transport.uniform_mass(cost.clone().requires_grad_())
            if mass is not None:
                says = case(transport, "uniform_mass is not the plan", cost=cost)
                require(not mass.requires_grad, f"{says}: it requires gradients")
                close(mass, _plan(transport, cost).to_dense(), says)


def _entropic_reg(transport: Transport, device: torch.device) -> None:
    """Plans ``a b exp((f + g - C) / reg)`` with the marginals a and b: ``reg log P + C`` is a sum of f and g."""
    reg = transport.entropic_reg
    if reg is None:
        return
    x, y = _clouds(n=4, m=5, device=device)
    cost = pairwise_cost(x, y)
    cost *= 4 * reg / cost.amax()  # every pair has mass
    mass = _plan(transport, cost).to_dense()
    says = case(transport, f"entropic_reg is {reg!r}, and the plan is not the entropic one", cost=cost)
    for sums, size in ((mass.sum(1), 4), (mass.sum(0), 5)):
        close(sums, torch.full_like(sums, 1 / size), says)
    sides = mass.log() + cost / reg
    close(sides + sides.mean(), sides.mean(0) + sides.mean(1, keepdim=True), says)


TRANSPORT_CHECKS = (
    _plans, _batches, _no_problems, _renamed, _weightless, _gradients, _gradients_in_the_weights, _second_derivatives,
    _callable_cost, _half, _uniform_mass, _entropic_reg,
)  # fmt: skip
"""Functions of a transport and a device."""
