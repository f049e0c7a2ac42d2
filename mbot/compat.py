"""Classes of other libraries, with their interface and our solvers.

`OTPlanSampler` stands in for torchcfm's class of that name (torchcfm 1.0, Tong et al. 2024, arXiv 2302.00482)::

    torchcfm.conditional_flow_matching.OTPlanSampler = mbot.compat.OTPlanSampler   # before matchers are made
    matcher.ot_sampler = mbot.compat.OTPlanSampler("exact")                        # or one matcher at a time
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mbot import checks, conditions, convergence
from mbot.cost import pairwise
from mbot.couplings.drawing import sources_of, stratified
from mbot.eager import outside_graphs
from mbot.numerics import rows_of
from mbot.plan import Plan
from mbot.transport import EntropicOT, ExactOT, Transport, UnbalancedOT

# Looser than POT's limits (1000 iterations, 1e-9), and still below what a draw of pairs can show.
_MAX_ITER = 1000
_NO_MASS = 1e-8  # below which the uniform plan stands in
_TOL = 1e-3  # L1, of the marginals; a draw of n pairs scatters by 1 / sqrt(n)


class OTPlanSampler:
    """torchcfm's ``OTPlanSampler``: optimal transport plans of two batches and pairs drawn from them.

    Same constructor, methods, argument and return types. What differs:

    * Pairs are drawn **stratified**: each x1 as often as its mass says, rounded up or down, x1 in order, a source for
      each from its column of the plan. Every pair has torchcfm's probability on average, but a permutation plan gives
      each of its pairs exactly once where torchcfm's independent draws leave out 37 % of a batch and repeat others.
      No draw over n² cells.
    * Randomness is torch's. The draws are a function of the state of torch's default generator and leave it as it was
      (torchcfm's numpy draws do not touch it either): ``torch.manual_seed`` makes them reproducible, and what follows
      (times, noise) is what it was. Without any other draw in between, a second call repeats the first one's numbers;
      pass ``generator`` to draw from a stream of its own.
    * Solvers work in the log domain: no NaN where the plain kernel underflows. ``"partial"`` moves all mass, as POT's
      default does that torchcfm calls, and is therefore the same plan as ``"sinkhorn"``. For plans that leave
      outliers use `mbot.OTCoupling` with `mbot.PartialOT`.
    * ``num_threads`` is accepted and has no effect: one assignment is one thread's work.

    Args:
        method: ``"exact"``, ``"sinkhorn"``, ``"unbalanced"`` or ``"partial"``.
        reg: entropic regularisation of all but ``"exact"``, in units of the squared distance.
        reg_m: price of marginal deviations of ``"unbalanced"``.
        normalize_cost: divide the costs by their maximum.
        num_threads: no effect.
        warn: False silences warnings about convergence and empty plans.
        generator: source of randomness; None: see above.

    Raises:
        ValueError: an unknown method, a regularisation that is not positive, samples that are not finite.
    """

    def __init__(
        self,
        method: str,
        reg: float = 0.05,
        reg_m: float = 1.0,
        normalize_cost: bool = False,
        num_threads: int | str = 1,
        warn: bool = True,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        self.method = checks.choice(method, "method", ("exact", "sinkhorn", "unbalanced", "partial"))
        most = isinstance(num_threads, str) and num_threads == "max"
        self.num_threads = num_threads if most else checks.count(num_threads, "num_threads")
        self.reg = checks.positive(reg, "reg", allow_zero=method == "exact")
        self.reg_m = checks.positive(reg_m, "reg_m", allow_zero=method != "unbalanced")
        self.normalize_cost, self.warn = normalize_cost, warn
        self.generator = generator
        self.transport: Transport = ExactOT()
        if method == "unbalanced":
            self.transport = UnbalancedOT(self.reg, self.reg_m, max_iter=_MAX_ITER, tol=_TOL)
        elif method != "exact":
            self.transport = EntropicOT(self.reg, max_iter=_MAX_ITER, tol=_TOL)

    @outside_graphs
    def get_map(self, x0: Tensor, x1: Tensor) -> np.ndarray:
        """The plan between two batches under the squared Euclidean cost.

        Args:
            x0: ``(n, d…)`` source samples.
            x1: ``(m, d…)`` target samples.

        Returns:
            ``(n, m)`` float64 array.
        """
        plan = self._plan(self._cost(x0, x1))
        matched = plan.matching()
        if matched is None:
            return plan.to_dense().double().cpu().numpy()
        n = len(matched)
        dense = np.zeros((n, n))
        dense[matched.cpu().numpy(), np.arange(n)] = 1 / n  # in float64, whatever the samples are in
        return dense

    @outside_graphs
    def sample_map(self, pi: Any, batch_size: int, replace: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """Pairs drawn from a plan.

        Args:
            pi: ``(n, m)`` non-negative array, on any scale.
            batch_size: number of pairs.
            replace: True: stratified, see the class. False: no cell of the plan twice.

        Returns:
            ``(i, j)`` int64 arrays of length ``batch_size``.
        """
        mass = torch.as_tensor(pi, dtype=torch.float64)
        if mass.ndim != 2 or not bool(torch.isfinite(mass).all() & (mass >= 0).all() & (mass.sum() > 0)):
            raise ValueError(f"pi must be a finite non-negative (n, m) array with mass; got shape {tuple(mass.shape)}")
        i, j = self._draw(Plan(mass, (mass.shape[0], mass.shape[1])), batch_size, replace)
        return i.numpy(), j.numpy()

    @outside_graphs
    def sample_plan(self, x0: Tensor, x1: Tensor, replace: bool = True) -> tuple[Tensor, Tensor]:
        """Paired samples ``x0[i], x1[j]``, as many as x0 has, differentiable in both.

        Args:
            x0: ``(n, d…)`` source samples.
            x1: ``(m, d…)`` target samples.
            replace: see `sample_map`.
        """
        i, j = self._pairs(x0, x1, replace)
        return rows_of(x0, i), rows_of(x1, j)

    @outside_graphs
    def sample_plan_with_labels(
        self, x0: Tensor, x1: Tensor, y0: Any = None, y1: Any = None, replace: bool = True
    ) -> tuple[Tensor, Tensor, Any, Any]:
        """`sample_plan` with labels that follow their samples, of any kind that `mbot.conditions` names.

        The labels do not enter the transport, so the noise that a label sees is skewed: see
        `mbot.ConditionalOTCoupling`.
        """
        conditions.check(y0, len(x0), "y0", "x0")
        conditions.check(y1, len(x1), "y1", "x1")
        i, j = self._pairs(x0, x1, replace)
        pairs = rows_of(x0, i), rows_of(x1, j)
        return *pairs, conditions.select(y0, i), conditions.select(y1, j)

    @outside_graphs
    def sample_plan_with_scipy(self, x0: Tensor, x1: Tensor) -> tuple[Tensor, Tensor]:
        """The exact assignment, whatever the method: x0 in order, x1 permuted; each flattened to ``(n, d)``.

        For unequal sizes the smaller batch is matched completely.
        """
        cost, size = self._cost(x0, x1), max(len(x0), len(x1))
        square = torch.nn.functional.pad(cost, (0, size - len(x1), 0, size - len(x0)))  # dummy points take the others
        col = ExactOT().plan(square).entries()[1][: len(x0)]
        kept = col < len(x1)
        return x0.flatten(1)[kept], x1.flatten(1)[col[kept]]

    @outside_graphs
    def sample_trajectory(self, X: Tensor) -> np.ndarray:
        """Chains of samples through several populations, each step drawn from the plan between neighbours.

        Args:
            X: ``(n, times, d…)`` populations.

        Returns:
            ``(n, times, d…)`` array; row i starts at sample i.
        """
        checks.floating(X, "X")
        if X.ndim < 3:
            raise ValueError(f"X must have shape (n, times, d…); got {tuple(X.shape)}")
        index = torch.arange(len(X), device=X.device)
        generator = self._generator()
        steps = [X[:, 0]]
        for t in range(X.shape[1] - 1):
            plan = self._plan(self._cost(X[:, t], X[:, t + 1]))
            index = sources_of(_transposed(plan), index, generator)
            steps.append(rows_of(X[:, t + 1], index))
        return torch.stack(steps, 1).detach().cpu().numpy()

    def _cost(self, x0: Tensor, x1: Tensor) -> Tensor:
        x0, x1 = checks.samples(x0, x1)
        cost = pairwise(x0.detach(), x1.detach(), "sqeuclidean")
        return cost / cost.max().clamp_min(torch.finfo(cost.dtype).tiny) if self.normalize_cost else cost

    def _plan(self, cost: Tensor) -> Plan:
        if self.warn or self.method == "exact":
            plan = self.transport.plan(cost)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", convergence.ConvergenceWarning)
                plan = self.transport.plan(cost)
        if self.method != "unbalanced" or float(plan.total_mass()) >= _NO_MASS:  # the others move all mass
            return plan
        if self.warn:
            convergence.warn(
                f"OTPlanSampler: the plan of method={self.method!r} moves no mass; the uniform plan is used. Raise "
                f"reg_m (now {self.reg_m:g}) or set normalize_cost=True"
            )
        return Plan(torch.full_like(plan.mass, 1 / plan.mass.numel()), plan.size)

    def _pairs(self, x0: Tensor, x1: Tensor, replace: bool) -> tuple[Tensor, Tensor]:
        cost = self._cost(x0, x1)
        mass = self.transport.uniform_mass(cost) if replace else None
        if mass is not None and (self.method != "unbalanced" or float(mass.sum()) >= _NO_MASS):
            return stratified(mass, len(x0), self._generator())
        return self._draw(self._plan(cost), len(x0), replace)

    def _draw(self, plan: Plan, count: int, replace: bool) -> tuple[Tensor, Tensor]:
        matched = plan.matching() if replace and count == plan.size[1] else None
        if matched is not None:  # the draw below would give the same
            return matched, torch.arange(count, device=matched.device)
        if replace:
            return stratified(plan, count, self._generator())
        if plan.matching() is None and not plan.is_sparse:
            cell = torch.nonzero(plan.mass)
            plan = Plan(plan.mass[cell[:, 0], cell[:, 1]], plan.size, cell[:, 0], cell[:, 1])
        return plan.sample(count, replacement=False, generator=self._generator())

    def _generator(self) -> torch.Generator:
        """The user's generator, or one that is seeded by the state of torch's default generator."""
        if self.generator is not None:
            return self.generator
        copy = torch.Generator()
        copy.set_state(torch.get_rng_state())
        seed = torch.rand(1, generator=copy, dtype=torch.float64, device="cpu")  # whatever the default device is
        return copy.manual_seed(int(seed.view(torch.int64)))


def _transposed(plan: Plan) -> Plan:
    """The transposed plan, from targets to sources."""
    size = plan.size[::-1]
    if not plan.is_sparse:
        return Plan(plan.mass.T, size)
    row, col, mass = plan.entries()
    return Plan(mass, size, col, row)
