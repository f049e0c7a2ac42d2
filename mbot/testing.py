"""The contracts of transports and couplings: checks that raise an AssertionError with the input that fails."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mbot.cost import pairwise_cost
from mbot.couplings import Coupling, Pairs
from mbot.plan import Plan
from mbot.solvers import fast_paths
from mbot.transport import Transport

_SIZES = ((6, 6), (5, 7), (1, 1), (1, 4), (4, 1))
_N = 12  # samples a side of a coupling


def check_transport(transport: Transport, *, device: torch.device | str = "cpu") -> None:
    """Check that a transport keeps the promises that losses and couplings count on.

    Plans have the shape, dtype and device of the costs, non-negative masses, and sums that agree with their entries; a
    batch is its problems one by one, and no problems have no plans; the same call gives the same plan; renamed points
    give the renamed plan; a point of weight zero is as if it were not there; inputs stay as they are; gradients are
    those of the value (finite differences in float64); a callable cost and a named one agree; half precision is
    computed in float32; settings are frozen, compare, hash, pickle and print.

    Args:
        transport: the transport, at the settings to check: with a tolerance far below 1e-6, if it iterates.
        device: where the costs are.

    Raises:
        AssertionError: a promise that is not kept, with the input that shows it.

    >>> check_transport(mbot.ExactOT())
    """
    _require(isinstance(transport, Transport), f"a transport is derived from mbot.Transport; got {transport!r}")
    device = torch.device(device)
    _settings(transport)
    hash(transport)
    for check in (_plans, _batches, _no_problems, _renamed, _weightless, _gradients, _callable_cost, _half):
        check(transport, device)


def check_coupling(coupling: Coupling, *, device: torch.device | str = "cpu") -> None:
    """Check that a coupling keeps the promises that flow matching and loaders count on.

    Pairs are int64 indices in range, on the samples' device, and give the samples by ``apply``; weights are
    non-negative with mean 1 and no gradient; equal inputs and generators give equal pairs, whatever was coupled before
    and whatever torch's own generator holds; inputs stay as they are, contiguous or not; unequal batches are paired or
    refused with a ValueError; bad samples are refused; settings are frozen, compare, pickle and print.

    Args:
        coupling: the coupling, at the settings to check. It gets integer classes as the targets' conditions.
        device: where the samples are.

    Raises:
        AssertionError: a promise that is not kept, with the input that shows it.

    >>> check_coupling(mbot.OTCoupling())
    """
    _require(isinstance(coupling, Coupling), f"a coupling is derived from mbot.Coupling; got {coupling!r}")
    device = torch.device(device)
    _settings(coupling)
    for check in (_pairs, _unequal, _repeated, _coupling_inputs, _refused):
        check(coupling, device)


@contextmanager
def without_fast_paths() -> Iterator[None]:
    """Inside, small problems take the general route instead of a compiled short cut, in this thread: to compare them.

    >>> with without_fast_paths():
    ...     reference = mbot.EntropicOT(0.1).plan(torch.rand(5, 5))
    """
    token = fast_paths.set(False)
    try:
        yield
    finally:
        fast_paths.reset(token)


def _require(promise: bool, says: str) -> None:
    """An assertion that ``python -O`` keeps."""
    if not promise:
        raise AssertionError(says)


def _close(got: Tensor, want: Tensor, says: str) -> None:
    try:
        torch.testing.assert_close(got, want)
    except AssertionError as error:
        raise AssertionError(f"{says}: {error}") from None


def _case(settings: Any, says: str, **inputs: Tensor | None) -> str:
    """A sentence with small inputs written out, and the shapes of all."""
    given = [
        f"{name} = {value.tolist() if value.numel() <= 64 else '…'} ({value.dtype} of shape {tuple(value.shape)})"
        for name, value in inputs.items()
        if value is not None
    ]
    return f"{settings!r}: {says}, at {', '.join(given)}"


def _settings(settings: Any) -> None:
    _require(
        dataclasses.is_dataclass(settings), f"{settings!r} is no dataclass: its settings are not compared and saved"
    )
    again = pickle.loads(pickle.dumps(settings))
    _require(again == settings, f"{settings!r} is not equal to its pickled copy {again!r}")
    _require(repr(again) == repr(settings), f"{settings!r} prints as {again!r} once pickled")
    _require(type(settings).__name__ in repr(settings), f"{settings!r} does not print its class")
    try:
        settings.not_a_setting = 1
    except AttributeError:  # FrozenInstanceError is one
        return
    raise AssertionError(f"{settings!r}: its settings can be changed; use @dataclass(frozen=True)")


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
        raise AssertionError(_case(transport, f"plan raised {error!r}", **before)) from error
    for name, value in inputs.items():
        kept: Any = before[name]
        same = value is None or torch.equal(value, kept)
        _require(same, _case(transport, f"plan changed {name} in place", **before))
    return plan


def _plans(transport: Transport, device: torch.device) -> None:
    g = torch.Generator().manual_seed(0)
    for n, m in _SIZES:
        for dtype in (torch.float32, torch.float64):
            cost = torch.rand(2, 3, n, m, generator=g, dtype=dtype).to(device)
            plan = _plan(transport, cost)

            def require(promise: bool, says: str, cost: Tensor = cost) -> None:
                _require(promise, _case(transport, says, cost=cost))

            def close(got: Tensor, want: Tensor, says: str, cost: Tensor = cost) -> None:
                _close(got, want, _case(transport, says, cost=cost))

            mass = plan.mass
            require(plan.size == (n, m) and plan.batch_shape == (2, 3), f"the plan is {plan!r}")
            require(mass.dtype == dtype and mass.device == cost.device, f"masses are {mass.dtype} on {mass.device}")
            require(not mass.requires_grad, "masses require gradients: a plan is a constant")
            require(bool((mass >= 0).all()), "masses are negative or NaN")
            facts = {"converged": torch.bool, "error": torch.float64, "iterations": torch.int64, "penalty": dtype}
            for name, kind in facts.items():
                fact = getattr(plan, name)
                require(fact.shape == (2, 3) and fact.dtype == kind, f"{name} is {fact.dtype} of {tuple(fact.shape)}")
            require(bool(plan.converged.all()), f"not converged (error {float(plan.error.max()):.3g})")
            for index, size, name in zip(plan.entries()[:2], plan.size, ("row", "column"), strict=True):
                good = index.dtype == torch.int64 and 0 <= int(index.min()) <= int(index.max()) < size
                require(good, f"{name} indices are no int64 in [0, {size})")
            dense = plan.to_dense()
            require(torch.equal(_plan(transport, cost).to_dense(), dense), "the same call gives another plan")
            close(plan.row_mass(), dense.sum(-1), "row_mass is not the plan's")
            close(plan.col_mass(), dense.sum(-2), "col_mass is not the plan's")
            close(plan.cost(cost), (dense * cost).sum((-2, -1)), "cost is not that of the plan")
            close(transport.value(cost), plan.cost(cost) + plan.penalty, "value is not cost plus penalty")


def _batches(transport: Transport, device: torch.device) -> None:
    x, y = _clouds(2, 3, device=device)
    cost = pairwise_cost(x, y)
    together, values = _plan(transport, cost).to_dense(), transport(x, y)
    for i in range(2):
        for j in range(3):
            says = _case(transport, f"problem ({i}, {j}) of a batch (2, 3) is not what it is alone", cost=cost[i, j])
            _close(together[i, j], _plan(transport, cost[i, j]).to_dense(), says)
            _close(values[i, j], transport(x[i, j], y[i, j]), says)


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
            _require(good, f"{transport!r}: a batch of no problems, costs {shape}, does not give no plans")


def _renamed(transport: Transport, device: torch.device) -> None:
    g = torch.Generator().manual_seed(0)
    for n, m in _SIZES[:2]:
        x, y = _clouds(n=n, m=m, device=device)
        cost = pairwise_cost(x, y)
        p, q = (torch.randperm(size, generator=g).to(device) for size in (n, m))
        says = _case(transport, f"rows renamed {p.tolist()}, columns {q.tolist()}: another plan", cost=cost)
        _close(_plan(transport, cost[p][:, q]).to_dense(), _plan(transport, cost).to_dense()[p][:, q], says)
        _close(transport(x[p], y[q]), transport(x, y), says)


def _weightless(transport: Transport, device: torch.device) -> None:
    x, y = _clouds(2, device=device)
    cost = pairwise_cost(x, y)
    keep_x, keep_y = torch.tensor([0, 2, 3, 5], device=device), torch.tensor([1, 2, 4, 5], device=device)
    for left, right in (([0.25] * 4, [0.25] * 4), ([0.1, 0.2, 0.3, 0.4], [0.4, 0.1, 0.25, 0.25])):
        a, b = torch.zeros(2, 6, dtype=torch.float64, device=device)
        a[keep_x], b[keep_y] = (torch.tensor(w, dtype=torch.float64, device=device) for w in (left, right))
        full = _plan(transport, cost, a, b).to_dense()
        part = _plan(transport, cost[:, keep_x][:, :, keep_y], a[keep_x], b[keep_y]).to_dense()
        says = _case(transport, "a point of weight 0 is not as if it were not there", cost=cost, a=a, b=b)
        _close(full[:, keep_x][:, :, keep_y], part, says)
        _close(full.sum((-2, -1)), part.sum((-2, -1)), says)
        alone = transport(x[:, keep_x], y[:, keep_y], a[keep_x], b[keep_y])
        _close(transport(x, y, a, b), alone, says)


def _gradients(transport: Transport, device: torch.device) -> None:
    g = torch.Generator().manual_seed(1)
    for cost in ("sqeuclidean", "euclidean", "cosine", "dot"):
        x, y = (points.requires_grad_() for points in _clouds(2, n=5, m=5, device=device))
        says = _case(transport, f"gradients under the cost {cost!r} are not those of the value", x=x, y=y)
        of_x, of_y = torch.autograd.grad(transport(x, y, cost=cost).sum(), (x, y))
        for _ in range(2):
            way_x, way_y = (torch.randn(p.shape, generator=g, dtype=p.dtype).to(device) for p in (x, y))
            with torch.no_grad():
                ahead, behind = (transport(x + h * way_x, y + h * way_y, cost=cost).sum() for h in (1e-6, -1e-6))
            parts = torch.cat(((of_x * way_x).flatten(), (of_y * way_y).flatten()))
            off = float(((ahead - behind) / 2e-6 - parts.sum()).abs())
            good = off <= 1e-5 * float(parts.abs().sum()) + 1e-6
            _require(good, f"{says}: off by {off:.3g} along a random direction")


def _callable_cost(transport: Transport, device: torch.device) -> None:
    x, y = _clouds(2, device=device)
    x.requires_grad_()
    named = transport(x, y, cost="sqeuclidean")
    called = transport(x, y, cost=lambda x, y: (x[..., :, None, :] - y[..., None, :, :]).square().sum(-1))
    says = _case(transport, "a callable cost gives something else than its name", x=x.detach(), y=y)
    _close(named, called, says)
    _close(torch.autograd.grad(named.sum(), x)[0], torch.autograd.grad(called.sum(), x)[0], says)


def _half(transport: Transport, device: torch.device) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        x, y = _clouds(2, device=device, dtype=dtype)
        says = _case(transport, "half precision is not computed in float32", x=x, y=y)
        _close(transport(x, y), transport(x.float(), y.float()), says)


def _samples(
    n: int = _N,
    m: int = _N,
    shape: tuple[int, ...] = (3,),
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sources, targets and the targets' classes."""
    g = torch.Generator().manual_seed(seed)
    x0, x1 = (torch.randn(size, *shape, generator=g).to(device, dtype) for size in (n, m))
    return x0, x1 + 1, torch.randint(0, 3, (m,), generator=g).to(device)


def _couple(coupling: Coupling, x0: Tensor, x1: Tensor, y1: Tensor, *, seed: int = 7) -> Pairs:
    """Pairs; errors of the coupling are raised again with the input."""
    try:
        return coupling(x0, x1, y1=y1, generator=torch.Generator().manual_seed(seed))
    except Exception as error:
        raise AssertionError(_case(coupling, f"it raised {error!r}", x0=x0, x1=x1, y1=y1)) from error


def _check_pairs(coupling: Coupling, pairs: Pairs, x0: Tensor, x1: Tensor, y1: Tensor) -> None:
    def require(promise: bool, says: str) -> None:
        _require(promise, _case(coupling, says, x0=x0, x1=x1, y1=y1))

    for index, size, name in ((pairs.source, len(x0), "source"), (pairs.target, len(x1), "target")):
        require(index.dtype == torch.int64 and index.device == x1.device, f"{name} is {index.dtype} on {index.device}")
        require(index.shape == (len(pairs),) and len(pairs) > 0, f"{name} has shape {tuple(index.shape)}")
        require(0 <= int(index.min()) <= int(index.max()) < size, f"{name} is not in [0, {size})")
    source, target = pairs.apply(x0, x1)
    good = torch.equal(source, x0[pairs.source]) and torch.equal(target, x1[pairs.target])
    require(good, "apply does not give the samples of the indices")
    require(isinstance(pairs.info, dict), f"info is a {type(pairs.info).__name__}")
    weight = pairs.weight
    if weight is not None:
        require(weight.shape == (len(pairs),), f"weights have shape {tuple(weight.shape)}")
        require(not weight.requires_grad, "weights require gradients")
        good = bool((weight >= 0).all()) and abs(float(weight.double().mean()) - 1) < 1e-4
        require(good, f"weights are negative, or have mean {float(weight.double().mean()):.4g}, not 1")


def _pairs(coupling: Coupling, device: torch.device) -> None:
    for shape in ((3,), (1, 4, 4)):
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            given = _samples(shape=shape, dtype=dtype, device=device)
            x0, x1 = (samples.clone().requires_grad_() for samples in given[:2])
            _check_pairs(coupling, _couple(coupling, x0, x1, given[2]), *given)


def _unequal(coupling: Coupling, device: torch.device) -> None:
    for n, m in ((9, 12), (12, 9), (1, 5), (5, 1), (1, 1)):
        given = _samples(n, m, device=device)
        try:
            pairs = coupling(given[0], given[1], y1=given[2], generator=torch.Generator().manual_seed(7))
        except ValueError:
            _require(n != m, _case(coupling, "it refuses equal batches", x0=given[0], x1=given[1]))
            continue
        _check_pairs(coupling, pairs, *given)


def _repeated(coupling: Coupling, device: torch.device) -> None:
    given, other = _samples(device=device), _samples(device=device, seed=5)
    state = torch.get_rng_state()
    try:
        torch.manual_seed(1)
        first = _couple(coupling, *given)
        _couple(coupling, *other, seed=8)
        torch.manual_seed(2)
        again = _couple(coupling, *given)
    finally:
        torch.set_rng_state(state)
    says = "equal inputs and generators give other pairs: the generator must decide, and no call be remembered"
    good = torch.equal(first.source, again.source) and torch.equal(first.target, again.target)
    if first.weight is not None and again.weight is not None:
        good = good and torch.equal(first.weight, again.weight)
    _require(good, _case(coupling, says, x0=given[0], x1=given[1], y1=given[2]))


def _coupling_inputs(coupling: Coupling, device: torch.device) -> None:
    given = _samples(2 * _N, 2 * _N, device=device)
    before = [value.clone() for value in given]
    strided = [value[::2] for value in given]
    pairs = _couple(coupling, *strided)
    with torch.inference_mode():  # where it does not depend on the device
        _couple(coupling, *(value.cpu() for value in strided))
    for name, value, copy in zip(("x0", "x1", "y1"), given, before, strict=True):
        _require(torch.equal(value, copy), _case(coupling, f"it changed {name} in place", **{name: copy}))
    packed = _couple(coupling, *(value.contiguous() for value in strided))
    says = _case(coupling, "contiguous copies of strided inputs give other pairs", x0=strided[0], x1=strided[1])
    _require(torch.equal(packed.source, pairs.source) and torch.equal(packed.target, pairs.target), says)


def _refused(coupling: Coupling, device: torch.device) -> None:
    x0, x1, y1 = _samples(device=device)
    third = torch.tensor([3], device=device)
    wrong: dict[str, tuple[Any, Any, Any]] = {
        "no samples": (x0[:0], x1[:0], y1[:0]),
        "integers": (x0.long(), x1.long(), y1),
        "two dtypes": (x0.double(), x1, y1),
        "unequal features": (x0[:, :2], x1, y1),
        "a NaN in x0": (x0.index_fill(0, third, torch.nan), x1, y1),
        "an infinity in x1": (x0, x1.index_fill(0, third, torch.inf), y1),
        "a condition too few": (x0, x1, y1[:-1]),
    }
    for what, given in wrong.items():
        try:
            coupling(*given[:2], y1=given[2])
        except (TypeError, ValueError):
            continue
        except Exception as error:
            raise AssertionError(f"{coupling!r}: {what} raises {error!r}, not a TypeError or ValueError") from error
        raise AssertionError(f"{coupling!r}: {what} is not refused")
