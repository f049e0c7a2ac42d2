"""Transport plans of a batch of problems, dense or sparse."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from mbot import checks
from mbot.numerics import product, running_sum
from mbot.random import draw


@dataclass(frozen=True)
class _Dense:
    """Masses ``(…, n, m)`` of all cells."""

    mass: Tensor
    size: tuple[int, int]

    kind, axes = "dense", (-2, -1)

    def matrix(self) -> Tensor:
        return self.mass

    def located(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Rows and columns of masses, by their index ``(…, k)`` in the flattened ones."""
        return index // self.size[1], index % self.size[1]

    def entries(self) -> tuple[Tensor, Tensor, Tensor]:
        mass = self.mass.flatten(-2)
        return *self.located(torch.arange(mass.shape[-1], device=mass.device).expand_as(mass)), mass

    def costs(self, cost: Tensor) -> Tensor:
        """The cost of each mass."""
        return cost

    def marginal(self, axis: int) -> Tensor:
        """Row sums (axis 0) or column sums (axis 1)."""
        return self.mass.sum((-1, -2)[axis])

    def times(self, y: Tensor) -> Tensor:
        """``(P y)_i = sum_j P_ij y_j``, ``(…, n, d)``."""
        return product(self.mass.to(y.dtype), y)

    def distinct(self) -> Tensor:
        """The masses, repeated cells added up."""
        return self.mass

    def matching(self) -> Tensor | None:
        return None


@dataclass(frozen=True)
class _Sparse:
    """Masses ``(…, e)`` of the cells ``(row, col)``; methods as of `_Dense`."""

    mass: Tensor
    size: tuple[int, int]
    row: Tensor
    col: Tensor

    axes = (-1,)

    @property
    def kind(self) -> str:
        return f"sparse, {self.mass.shape[-1]} entries"

    @property
    def cell(self) -> Tensor:
        """Numbers of the cells, row by row."""
        return self.row * self.size[1] + self.col

    def matrix(self) -> Tensor:
        n, m = self.size
        dense = self.mass.new_zeros(*self.mass.shape[:-1], n * m)
        return dense.scatter_add_(-1, self.cell, self.mass).unflatten(-1, (n, m))

    def located(self, index: Tensor) -> tuple[Tensor, Tensor]:
        return self.row.gather(-1, index), self.col.gather(-1, index)

    def entries(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.row, self.col, self.mass

    def costs(self, cost: Tensor) -> Tensor:
        flat, index = cost.flatten(-2), self.cell
        batch = torch.broadcast_shapes(flat.shape[:-1], index.shape[:-1])
        return flat.expand(*batch, -1).gather(-1, index.expand(*batch, -1))

    def marginal(self, axis: int) -> Tensor:
        sums = self.mass.new_zeros(*self.mass.shape[:-1], self.size[axis])
        return sums.scatter_add_(-1, (self.row, self.col)[axis], self.mass)

    def times(self, y: Tensor) -> Tensor:
        y = y.expand(*self.mass.shape[:-1], *y.shape[-2:])
        arriving = torch.take_along_dim(y, self.col[..., None], -2) * self.mass.to(y.dtype)[..., None]
        moved = y.new_zeros(*y.shape[:-2], self.size[0], y.shape[-1])
        return moved.scatter_add(-2, self.row[..., None].expand_as(arriving), arriving)

    def distinct(self) -> Tensor:
        """The masses, those of a repeated cell added up at its first entry."""
        cell = self.cell
        order = cell.argsort(dim=-1, stable=True)
        ordered = cell.gather(-1, order)
        first = torch.ones_like(ordered, dtype=torch.bool)
        first[..., 1:] = ordered[..., 1:] != ordered[..., :-1]
        group = first.cumsum(-1) - 1
        sums = torch.zeros_like(self.mass).scatter_add_(-1, group, self.mass.gather(-1, order))
        merged = torch.where(first, sums.gather(-1, group), 0)
        return torch.zeros_like(self.mass).scatter_(-1, order, merged)

    def matching(self) -> Tensor | None:
        n, m = self.size
        if n != m or self.mass.shape[-1] != n or not self.mass.numel() or not float(self.mass.amin()) > 0:
            return None
        source = torch.full_like(self.col, -1).scatter_(-1, self.col, self.row)
        if int(source.amin()) < 0:  # n entries leave no column out: each is in one of its own
            return None
        used = torch.zeros_like(source, dtype=torch.bool).scatter_(-1, source, True)
        return source if bool(used.all()) else None


_UNLESS_GIVEN = (  # dtype None: that of the mass
    ("converged", True, torch.bool), ("error", 0, torch.float64), ("iterations", 0, torch.int64), ("penalty", 0, None),
)  # fmt: skip


@dataclass(frozen=True, eq=False, repr=False)
class Plan:
    """Plans of a batch of problems between ``n`` source and ``m`` target points.

    A dense plan holds ``mass`` of shape ``(…, n, m)``. A sparse one holds entries ``(row, col, mass)`` of shape
    ``(…, e)``; entries of mass zero are padding, and repeated ``(row, col)`` add up. A plan is a constant: it never
    requires gradients (the envelope theorem: values differentiate through the ground cost, and in the weights through
    the potentials).

    Attributes:
        mass: amounts moved, non-negative, in the dtype of the cost.
        size: ``(n, m)``.
        row, col: int64 indices of the entries; None for a dense plan.
        converged: ``(…,)`` bool, whether each problem met its tolerance (always True of exact solvers that finished).
        error: ``(…,)`` what the solver stopped on: of exact solvers the duality gap, relative to the cost of the plan
            itself (a plan that costs next to nothing: to the smaller costs); of iterative ones the largest marginal
            error.
        iterations: ``(…,)`` int64 iterations spent (0 where the notion does not apply).
        potentials: dual variables ``(f, g)`` of shapes ``(…, n)`` and ``(…, m)`` where the solver has them. Those of
            exact plans satisfy ``f_i + g_j <= C_ij`` for all pairs, points of weight zero included, with equality
            where mass moves; in a partial plan, points that leave mass behind have the largest ``f`` or ``g``.
        penalty: ``(…,)`` what the solver's objective adds to the transport cost (entropy, marginal terms); 0 if none.

    >>> plan = Plan(torch.tensor([0.5, 0.5]), (2, 2), torch.tensor([0, 1]), torch.tensor([1, 0]))
    >>> plan.to_dense()
    tensor([[0.0000, 0.5000],
            [0.5000, 0.0000]])
    >>> plan.cost(torch.tensor([[9.0, 1.0], [3.0, 9.0]]))
    tensor(2.)
    """

    mass: Tensor
    size: tuple[int, int]
    row: Tensor | None = None
    col: Tensor | None = None
    converged: Tensor = None  # type: ignore[assignment]  # filled in by __post_init__
    error: Tensor = None  # type: ignore[assignment]  # filled in by __post_init__
    iterations: Tensor = None  # type: ignore[assignment]  # filled in by __post_init__
    potentials: tuple[Tensor, Tensor] | None = None
    penalty: Tensor = None  # type: ignore[assignment]  # filled in by __post_init__

    _linear = True

    def __post_init__(self) -> None:
        if self.mass.requires_grad:
            object.__setattr__(self, "mass", self.mass.detach())
        object.__setattr__(self, "_linear", self.penalty is None)
        for name, value, dtype in _UNLESS_GIVEN:
            if getattr(self, name) is None:
                full = torch.full(self.batch_shape, value, dtype=dtype or self.mass.dtype, device=self.mass.device)
                object.__setattr__(self, name, full)

    def __repr__(self) -> str:
        return (
            f"Plan({self.size[0]} x {self.size[1]}, batch {tuple(self.batch_shape)}, {self._form.kind}, "
            f"{self.mass.dtype}, converged={bool(self.converged.all())})"
        )

    @cached_property
    def _form(self) -> _Dense | _Sparse:
        if self.row is None or self.col is None:
            return _Dense(self.mass, self.size)
        return _Sparse(self.mass, self.size, self.row, self.col)

    @property
    def batch_shape(self) -> torch.Size:
        """Shape of the batch of problems."""
        return self.mass.shape[: -len(self._form.axes)]

    @property
    def is_sparse(self) -> bool:
        """Whether the plan is kept as entries."""
        return isinstance(self._form, _Sparse)

    @property
    def piecewise_constant(self) -> bool:
        """Whether small changes of the costs leave the plan as it is, so that second derivatives of values are right.

        So it is for solutions of linear problems: sparse plans that were made without a penalty.
        """
        return self.is_sparse and self._linear

    def to_dense(self) -> Tensor:
        """The plan as ``(…, n, m)``; repeated entries are added up."""
        return self._form.matrix()

    def entries(self) -> tuple[Tensor, Tensor, Tensor]:
        """``(row, col, mass)``, each ``(…, e)``: the entries of a sparse plan, all cells of a dense one."""
        return self._form.entries()

    def cost(self, cost: Tensor) -> Tensor:
        """Transport cost ``<C, P>`` of the plan under ``cost`` ``(…, n, m)``: ``(…,)``, differentiable in ``cost``.

        Entries without mass do not count, whatever their cost (``inf`` included).
        """
        if tuple(cost.shape[-2:]) != self.size:
            raise ValueError(f"cost must have shape (…, {self.size[0]}, {self.size[1]}); got {tuple(cost.shape)}")
        return torch.where(self.mass > 0, self._form.costs(cost), 0).mul(self.mass).sum(self._form.axes)

    def row_mass(self) -> Tensor:
        """Mass that leaves each source point, ``(…, n)``."""
        return self._form.marginal(0)

    def col_mass(self) -> Tensor:
        """Mass that reaches each target point, ``(…, m)``."""
        return self._form.marginal(1)

    def total_mass(self) -> Tensor:
        """All mass that moves, ``(…,)``."""
        return self.mass.sum(self._form.axes)

    def distinct_mass(self) -> Tensor:
        """The masses, those of a repeated cell added up at one of its entries and 0 at the others; as `mass`."""
        return self._form.distinct()

    def matching(self) -> Tensor | None:
        """The source index of each target, ``(…, m)`` int64, if every plan is a one-to-one matching; None otherwise."""
        return self._form.matching()

    def sample(
        self, num: int, replacement: bool = False, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draw pairs with probability proportional to their mass.

        Args:
            num: pairs to draw from each problem.
            replacement: False draws no cell of the plan twice, so that ``num = n`` pairs of a permutation plan are
                its ``n`` matched pairs, in random order. True draws independently.
            generator: source of randomness (None: torch's default generator).

        Returns:
            ``(row, col)`` of shape ``(…, num)`` int64.

        Raises:
            ValueError: a plan without mass, or fewer cells with mass than ``num`` without replacement.
        """
        checks.count(num, "num")
        mass = self.mass if replacement else self.distinct_mass()
        mass = mass.flatten(len(self.batch_shape))
        support = (mass > 0).sum(-1)
        if bool((support == 0).any()):
            raise ValueError("cannot sample from a plan without mass")
        if not replacement and bool((support < num).any()):
            raise ValueError(
                f"num must be at most the number of cells with mass ({int(support.min())}) when replacement=False; "
                f"got {num}"
            )
        if replacement:
            # Inverse of the cumulative mass in float64: torch.multinomial is limited to 2^24 cells.
            cumulative = running_sum(mass.double(), -1)
            uniform = draw(
                torch.rand, *mass.shape[:-1], num, generator=generator, device=mass.device, dtype=torch.float64
            )
            last = mass.shape[-1] - 1 - (mass > 0).flip(-1).int().argmax(-1, keepdim=True)
            cell = torch.searchsorted(cumulative, uniform * cumulative[..., -1:], right=True).minimum(last)
        else:
            # Exponential races: the num smallest arrival times are a draw without replacement.
            uniform = draw(torch.rand, *mass.shape, generator=generator, device=mass.device, dtype=torch.float64)
            arrival = -torch.log1p(-uniform) / mass
            cell = arrival.masked_fill(mass <= 0, torch.inf).topk(num, largest=False).indices
        return self._form.located(cell)

    def barycentric_map(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """The barycentric projection: each source point is mapped to the mass-weighted mean of its targets.

        Args:
            y: ``(…, m, d)`` target points.

        Returns:
            ``mapped`` ``(…, n, d)``, zero in rows that send no mass, and ``reached`` ``(…, n)`` bool, False there.
        """
        y = checks.floating(y, "y")
        if y.ndim < 2 or y.shape[-2] != self.size[1]:
            raise ValueError(f"y must have shape (…, {self.size[1]}, d); got {tuple(y.shape)}")
        # Sums of half precision are in float32, and masses that it would round to 0 have their share.
        points = y.to(torch.promote_types(y.dtype, torch.float32))
        row_mass = self.row_mass().to(points.dtype)
        reached = row_mass > 0
        return (self._form.times(points) / torch.where(reached, row_mass, 1)[..., None]).to(y.dtype), reached
