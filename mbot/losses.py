"""Mini-batch transport losses: m-OT and its relatives, and BoMb-OT, over any transport.

m-OT (Fatras et al. 2020, arXiv 1910.04091) averages the transport cost over pairs of mini-batches; BoMb-OT (Nguyen et
al. 2022, arXiv 2102.05912) transports between the mini-batches themselves. With values ``D_ij`` of the inner problems,

    m-OT     = sum_ij u_i v_j D_ij        (grid)   or   1/k sum_i D_ii   (aligned)
    BoMb-OT  = min over couplings gamma of u and v of  sum_ij gamma_ij D_ij   (+ reg KL(gamma | u ⊗ v))

All inner problems of a loss are solved in one batched call. Plans are constants in backward; gradients flow through
the ground cost, and only through the pairs that count.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Self

import torch
from torch import Tensor, nn

from mbot import checks
from mbot.convergence import one_warning
from mbot.cost import Cost, check_cost
from mbot.eager import outside_graphs
from mbot.envelope import first_order
from mbot.grid import Batches, Grid, Inner, Scheme, Side
from mbot.minibatch import draw_batches
from mbot.numerics import rows_of
from mbot.plan import Plan
from mbot.problem import Problems, tell
from mbot.solvers.matching import match
from mbot.transport import EntropicOT, ExactOT, Transport


class MiniBatchLoss(nn.Module):
    """Base of the mini-batch losses: mini-batches are drawn, the grid between them is solved, its values are summed.

    Attributes:
        solver: solves the grid of a scheme between two sides; see `solved_by`.
    """

    solver: Callable[[Scheme, Side, Side], Grid] = staticmethod(Scheme.solve)

    def __init__(
        self,
        transport: Inner,
        *,
        num_batches: int | tuple[int, int],
        batch_size: int | tuple[int, int],
        replacement: bool = False,
        disjoint: bool = False,
        cost: Cost = "sqeuclidean",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if not callable(transport) or isinstance(transport, type):
            got = f"the class {transport.__name__}" if isinstance(transport, type) else type(transport).__name__
            raise TypeError(
                f"transport must be an mbot transport such as ExactOT(), or a callable (x, y) -> value; got {got}"
            )
        self.transport = transport
        self.num_batches = checks.both_sides(num_batches, "num_batches")
        self.batch_size = checks.both_sides(batch_size, "batch_size")
        self.replacement, self.disjoint = checks.flag(replacement, "replacement"), checks.flag(disjoint, "disjoint")
        if replacement and disjoint:
            raise ValueError("disjoint batches are drawn without replacement: set replacement or disjoint, not both")
        self.generator = generator
        self.cost = check_cost(cost)

    def extra_repr(self) -> str:
        """Settings, for printing."""
        return f"{self.transport}, num_batches={self.num_batches}, batch_size={self.batch_size}, cost={self.cost!r}"

    def solved_by(self, solver: Callable[[Scheme, Side, Side], Grid]) -> Self:
        """A copy of this loss whose grids are solved by ``solver``, which stands in for `mbot.grid.Scheme.solve`."""
        other = copy.copy(self)
        other.solver = solver
        return other

    @property
    def scheme(self) -> Scheme:
        """Settings of the inner problems."""
        return Scheme(self.transport, self.cost, aligned=False, generator=self.generator)

    def _pair_weights(self, grid: Grid) -> tuple[Tensor, Tensor | None]:
        """Weights ``(k, k')`` of the inner problems, and the penalty of the outer problem if it has one."""
        raise NotImplementedError

    @outside_graphs
    @one_warning()
    def forward(self, x: Tensor, y: Tensor, a: Tensor | None = None, b: Tensor | None = None) -> Tensor:
        """The loss of freshly drawn mini-batches.

        Args:
            x: ``(n, d…)`` source points.
            y: ``(n', d…)`` target points.
            a: ``(n,)`` source weights with sum 1, or None for uniform.
            b: ``(n',)`` target weights with sum 1, or None for uniform.

        Returns:
            A scalar, differentiable in ``x`` and ``y``.

        Weights follow the two consistent rules of Fatras et al. 2021 (arXiv 2101.01792): with replacement, points are
        drawn in proportion to their weights and count equally inside a batch; without, batches are uniform subsets,
        points keep their renormalised weights inside, and a batch counts by its total weight.
        """
        return self._value(*self._draw(x, y, a, b, self.num_batches, self.batch_size))

    def _draw(
        self, x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None, num: tuple[int, int], size: tuple[int, int]
    ) -> tuple[Side, Side]:
        """Mini-batches of two clouds, ``num`` on either side, of ``size`` points."""
        x, y = checks.samples(x, y, "x", "y")
        for weight, name in ((a, "a"), (b, "b")):
            checks.constant_weights(weight, name, "a loss that draws mini-batches by the weights")
        left = self._side(x, checks.weights(a, len(x), x[None, None], "a"), num[0], size[0], "x")
        return left, self._side(y, checks.weights(b, len(y), y[None, None], "b"), num[1], size[1], "y")

    def _side(self, points: Tensor, weight: Tensor | None, num: int, size: int, name: str) -> Side:
        """Mini-batches of a cloud ``(n, d)``."""
        if weight is not None:
            weight = weight.reshape(-1) / weight.sum()
        index = draw_batches(
            len(points), num, size, replacement=self.replacement, disjoint=self.disjoint, weight=weight,
            generator=self.generator, device=points.device, name=name,
        )  # fmt: skip
        if weight is None or self.replacement:
            return Side(rows_of(points, index), f"{name}s", index)
        inside = weight[index]
        live = int(weight.count_nonzero())
        factor = inside.sum(1) * (live / index.shape[1])  # expectation 1 over uniform subsets
        return Side(rows_of(points, index), f"{name}s", index, inside / inside.sum(1, keepdim=True), factor)

    def _value(self, x: Side, y: Side) -> Tensor:
        return self._outer(self.solver(self.scheme, x, y))

    def _outer(self, grid: Grid) -> Tensor:
        weight, penalty = self._pair_weights(grid)
        total = grid.total(weight)
        return total if penalty is None else total + penalty

    @outside_graphs
    @one_warning()
    def from_batches(self, xs: Batches, ys: Batches) -> Tensor:
        """The loss of given mini-batches, a scalar.

        Args:
            xs: ``(k, m, d…)``, or a sequence of ``(m_i, d…)`` batches; batches of unequal sizes count by their sizes.
            ys: ``(k', m', d…)``, or such a sequence.
        """
        return self._value(Side(xs, "xs"), Side(ys, "ys"))

    @outside_graphs
    @one_warning()
    def from_cost(self, cost: Tensor) -> Tensor:
        """The loss of given ground costs ``(k, k', m, m')``: a scalar, differentiable in the costs."""
        if not isinstance(self.transport, Transport):
            raise TypeError("from_cost needs an mbot transport with plans; SlicedOT and callables have no cost matrix")
        cost = checks.cost_matrix(cost)
        if cost.ndim != 4 or cost.numel() == 0:
            raise ValueError(f"cost must have shape (k, k', m, m') with k, k' >= 1; got {tuple(cost.shape)}")
        if not self.scheme.aligned:
            return self._outer(Grid.of_values(self.transport.value(cost), aligned=False))
        if cost.shape[0] != cost.shape[1]:
            raise ValueError(f"pairing='aligned' needs as many batches on both sides; got {tuple(cost.shape[:2])}")
        pairs = cost.diagonal().movedim(-1, 0)
        return self._outer(Grid.of_values(self.transport.value(pairs)[:, None], aligned=True))

    @outside_graphs
    @one_warning()
    def plan(self, x: Tensor, y: Tensor, a: Tensor | None = None, b: Tensor | None = None) -> Plan:
        """The plan of the full ``n × n'`` problem that freshly drawn mini-batches give: sparse, entries accumulated.

        Its marginals are uniform only on average; points that no batch drew have no mass.
        """
        with torch.no_grad():
            return self._plan_of(*self._draw(x, y, a, b, self.num_batches, self.batch_size), len(x), len(y))

    def _plan_of(self, left: Side, right: Side, n: int, m: int) -> Plan:
        assert left.index is not None
        assert right.index is not None
        grid = self.solver(self.scheme, left, right)
        return grid.scatter(self._pair_weights(grid)[0], left.index, right.index, n, m)

    @outside_graphs
    @one_warning()
    def barycentric_map(self, x: Tensor, y: Tensor, visits: int = 8) -> tuple[Tensor, Tensor]:
        """The image of each source point: the mean of its targets over mini-batches of all points.

        Both clouds go through random orders, so no point is left out; `plan` leaves out those that no batch drew.

        Args:
            x: ``(n, d…)`` source points.
            y: ``(n', d…)`` target points.
            visits: mini-batches that each source point is in, at least; more make the map less noisy.

        Returns:
            ``mapped`` ``(n, d…)``, and ``reached`` ``(n,)`` bool: False where a point sent no mass (in partial
            transport) and stays where it is.
        """
        from mbot.low_memory import map_by_batches

        return map_by_batches(self._plan_of, x, y, self.num_batches, self.batch_size, visits, self.generator)

    @outside_graphs
    @one_warning()
    def backward_by_pair(
        self, embed: Callable[[Tensor], Tensor], xs: Batches, ys: Batches, weight: float = 1.0
    ) -> Tensor:
        """Value and gradients of ``(weight * from_batches(embed(xs), embed(ys))).backward()``, one batch in memory.

        Each mini-batch is embedded once without gradients, all inner problems are solved on the embeddings, and each
        is embedded again with gradients to pass its share on: 2 (k + k') embeddings and the activations of one.
        Dropout draws the same masks in both passes; normalisation layers in train mode update their running
        statistics once. Gradients accumulate in the parameters, as after ``backward``.

        Args:
            embed: maps a mini-batch ``(m, d…)`` to embeddings ``(m, e…)``.
            xs: ``k`` mini-batches ``(m, d…)``.
            ys: ``k'`` mini-batches.
            weight: factor on the loss (a loss weight, or an AMP scaler's scale).

        Returns:
            The detached value, without ``weight``.
        """
        from mbot.low_memory import backward_by_batch

        return backward_by_batch(self.from_batches, embed, xs, ys, weight)


class MiniBatchOT(MiniBatchLoss):
    """m-OT and its relatives: the average of a transport cost over pairs of mini-batches.

    m-OT is ``MiniBatchOT(ExactOT())``, m-POT ``MiniBatchOT(PartialOT(mass=s))``, m-UOT
    ``MiniBatchOT(UnbalancedOT(…))``, m-SW ``MiniBatchOT(SlicedOT())``; any callable ``(x, y) -> value`` (geomloss's
    ``SamplesLoss``) works as well. Gradients are then the callable's own: that of an unbalanced ``SamplesLoss`` is
    ``(ρ + ε/2) / (ρ + ε)`` times the derivative of its value, with ``ε = blur ** p`` and ``ρ = reach ** p``.
    The loss of a measure with itself is positive; ``debiased=True`` subtracts the self terms (and may be negative).

    Args:
        transport: the inner transport, or a callable on two clouds ``(m, d)`` (called on batches of clouds if it
            takes them).
        num_batches: k, or ``(k, k')`` for the two sides.
        batch_size: m, or ``(m, m')``.
        pairing: ``"grid"`` averages all k · k' pairs (Nguyen et al. 2022), ``"aligned"`` the k pairs (X_i, Y_i)
            (Fatras et al. 2020; the m-POT paper).
        replacement: draw the points of a batch with replacement.
        debiased: ``U(x, y) - (U(x, x') + U(y, y')) / 2`` with independent second batches x', y'.
        cost: ground cost, see `mbot.pairwise_cost`.
        generator: source of the mini-batches (and of SlicedOT's directions).
        disjoint: draw batches that share no point.

    >>> x = torch.tensor([[0.0, 0.0], [0.0, 1.0], [0.0, 2.0]], dtype=torch.float64)
    >>> y = x + torch.tensor([1.0, 0.0], dtype=torch.float64)
    >>> xs, ys = torch.stack((x[1:], x[:2])), torch.stack((y[1:], y[:2]))
    >>> mbot.MiniBatchOT(mbot.ExactOT(), num_batches=2, batch_size=2).from_batches(xs, ys)
    tensor(1.5000, dtype=torch.float64)
    >>> mbot.BoMbOT(mbot.ExactOT(), num_batches=2, batch_size=2).from_batches(xs, ys)
    tensor(1., dtype=torch.float64)
    """

    def __init__(
        self,
        transport: Inner,
        *,
        num_batches: int | tuple[int, int],
        batch_size: int | tuple[int, int],
        pairing: str = "grid",
        replacement: bool = False,
        debiased: bool = False,
        cost: Cost = "sqeuclidean",
        generator: torch.Generator | None = None,
        disjoint: bool = False,
    ) -> None:
        super().__init__(
            transport, num_batches=num_batches, batch_size=batch_size, replacement=replacement, disjoint=disjoint,
            cost=cost, generator=generator,
        )  # fmt: skip
        self.pairing = checks.choice(pairing, "pairing", ("grid", "aligned"))
        self.debiased = checks.flag(debiased, "debiased")
        if pairing == "aligned" and self.num_batches[0] != self.num_batches[1]:
            raise ValueError(f"pairing='aligned' needs equally many batches on both sides; got {self.num_batches}")

    def extra_repr(self) -> str:
        """Settings, for printing."""
        return f"{super().extra_repr()}, pairing={self.pairing!r}, debiased={self.debiased}"

    @property
    def scheme(self) -> Scheme:
        """Settings of the inner problems."""
        return replace(super().scheme, aligned=self.pairing == "aligned")

    def _pair_weights(self, grid: Grid) -> tuple[Tensor, None]:
        return grid.independent(), None

    @outside_graphs
    @one_warning()
    def forward(self, x: Tensor, y: Tensor, a: Tensor | None = None, b: Tensor | None = None) -> Tensor:
        """See `MiniBatchLoss.forward`; the debiased loss draws second batches for its self terms."""
        value = super().forward(x, y, a, b)
        if not self.debiased:
            return value
        for side, (points, weight) in enumerate(((x, a), (y, b))):
            num, size = (self.num_batches[side],) * 2, (self.batch_size[side],) * 2
            value = value - self._value(*self._draw(points, points, weight, weight, num, size)) / 2
        return value

    @outside_graphs
    @one_warning()
    def from_batches(self, xs: Batches, ys: Batches, xs2: Batches | None = None, ys2: Batches | None = None) -> Tensor:
        """See `MiniBatchLoss.from_batches`; the debiased loss needs second batches ``xs2``, ``ys2``, drawn anew."""
        value = super().from_batches(xs, ys)
        if not self.debiased:
            return value
        if xs2 is None or ys2 is None:
            raise ValueError(
                "debiased=True needs second, independently drawn batches xs2 and ys2: comparing a batch with itself "
                "gives 0 and removes no bias"
            )
        return value - (super().from_batches(xs, xs2) + super().from_batches(ys, ys2)) / 2

    @outside_graphs
    @one_warning()
    def from_cost(self, cost: Tensor) -> Tensor:
        """See `MiniBatchLoss.from_cost`; not defined for the debiased loss."""
        if self.debiased:
            raise ValueError("the debiased loss needs self terms that a cost between xs and ys does not hold")
        return super().from_cost(cost)

    @outside_graphs
    @one_warning()
    def plan(self, x: Tensor, y: Tensor, a: Tensor | None = None, b: Tensor | None = None) -> Plan:
        """See `MiniBatchLoss.plan`; not defined for the debiased loss."""
        if self.debiased:
            raise ValueError("the debiased loss is a difference of three transports and has no plan")
        return super().plan(x, y, a, b)


class BoMbOT(MiniBatchLoss):
    """BoMb-OT: optimal transport between mini-batches, whose ground cost is a transport between their points.

    e-BoMb-OT is ``reg > 0``: an entropic outer problem, between BoMb-OT (``reg -> 0``) and m-OT on the grid
    (``reg -> inf``). ``reg`` is in units of the inner values; choose it relative to their standard deviation. The
    value includes the outer penalty ``reg KL(gamma | u ⊗ v)``, as its gradient does.

    The outer cost of two mini-batches is the whole value of the inner transport, penalties included. The authors' code
    takes ``<C, P>`` alone, which differs over `EntropicOT`, `UnbalancedOT` and entropic `PartialOT`: for that, give a
    callable ``lambda x, y: inner.plan(mbot.pairwise_cost(x, y)).cost(mbot.pairwise_cost(x, y))`` as the transport.

    Args:
        transport: the inner transport, or a callable on two clouds.
        num_batches: k, or ``(k, k')`` for the two sides.
        batch_size: m, or ``(m, m')``.
        reg: entropic regularisation of the outer problem; 0 for exact.
        replacement: draw the points of a batch with replacement.
        cost: ground cost, see `mbot.pairwise_cost`.
        generator: source of the mini-batches (and of SlicedOT's directions).
        disjoint: draw batches that share no point.
    """

    def __init__(
        self,
        transport: Inner,
        *,
        num_batches: int | tuple[int, int],
        batch_size: int | tuple[int, int],
        reg: float = 0.0,
        replacement: bool = False,
        cost: Cost = "sqeuclidean",
        generator: torch.Generator | None = None,
        disjoint: bool = False,
    ) -> None:
        super().__init__(
            transport, num_batches=num_batches, batch_size=batch_size, replacement=replacement, disjoint=disjoint,
            cost=cost, generator=generator,
        )  # fmt: skip
        self.reg = checks.positive(reg, "reg", allow_zero=True)

    def extra_repr(self) -> str:
        """Settings, for printing."""
        return f"{super().extra_repr()}, reg={self.reg}"

    def _outer(self, grid: Grid) -> Tensor:
        value = super()._outer(grid)
        return first_order(value) if self.reg > 0 else value

    def _pair_weights(self, grid: Grid) -> tuple[Tensor, Tensor | None]:
        uniform = all(len(set(weight.tolist())) == 1 for weight in (grid.u, grid.v))
        k, k2 = grid.values.shape
        if uniform and k == k2 and self.reg == 0:
            found = match(Problems.dense(grid.values[None]))
            tell("ExactOT", found.error)
            return torch.zeros_like(grid.values).scatter_(1, found.col.T, 1 / k), None
        outer: Transport = EntropicOT(self.reg) if self.reg > 0 else ExactOT()
        weights = (None, None) if uniform else (grid.u / grid.u.sum(), grid.v / grid.v.sum())
        plan = outer.plan(grid.values, *weights)
        return plan.to_dense(), plan.penalty
