"""Semidiscrete optimal transport between a noise distribution and a whole data set.

SD-FM (arXiv 2509.25519) and AlignFlow (arXiv 2510.15038): one number a data point, its dual potential g_j, is learned
once. A fresh noise x then goes to ``argmax_j <x, y_j> + g_j - |y_j|² / 2`` (y about the data's mean), the data point of
its Laguerre cell; no batch, no assignment, and none of the bias of either. The cells have equal mass when g maximises
the concave dual ``E_x min_j (|x - y_j|² / 2 - g_j) + mean g``, with gradient ``1/N - P(x falls into cell j)``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mbot import checks, convergence
from mbot.conditions import class_codes
from mbot.cost import at_least_float32
from mbot.couplings.base import Coupling, Labels, Pairs
from mbot.couplings.cells import balanced_cells, cells, class_sizes, masses
from mbot.couplings.fitted import check_fitted, codes_of, fingerprint, state_of
from mbot.eager import outside_graphs
from mbot.numerics import full_float32, rows_of
from mbot.random import draw

Noise = Callable[..., Tensor]
"""``noise(n, generator=…) -> (n, d…)``: fresh draws of the source distribution."""

_DELAY = 10.0  # steps before the learning rate falls
_SOFT = 1e-3  # share of the regularisation that is left after half of the steps


@dataclass(frozen=True, eq=False)
class DualPotentials:
    """Potentials of the points of a data set, and how far they are from equal cells.

    Attributes:
        values: ``(N,)`` g, in units of the squared distance's half; float32.
        chi2: estimate of the χ² divergence of the cells' masses from equal ones, within classes: 0 at the optimum,
            about N for a single cell. Gains in training flatten at about 0.05 (SD-FM).
        steps: gradient steps behind them.
        point: ``(N,)`` the last iterate, that further steps start from.
        fingerprint: hash of the points (and of their classes) that they belong to.
    """

    values: Tensor
    chi2: float
    steps: int
    point: Tensor
    fingerprint: int

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, DualPotentials):
            return NotImplemented
        same = (self.steps, self.fingerprint) == (other.steps, other.fingerprint)
        return same and torch.equal(self.values.cpu(), other.values.cpu())

    __hash__ = None  # type: ignore[assignment]  # equal by its tensors, which may change

    def __repr__(self) -> str:
        return f"DualPotentials({len(self.values)} points, chi2={self.chi2:.3g}, steps={self.steps})"


@dataclass(frozen=True)
class SemidiscreteCoupling(Coupling):
    """Each noise with the data point of its Laguerre cell, over a whole data set; squared Euclidean cost.

    ``fit`` learns the potentials of a data set by averaged stochastic gradient ascent and returns the coupling that
    holds them; ``coupling(x0, data)`` then pairs noise with rows **of that same data set** (another one, another order
    or other classes are refused): ``source`` is ``arange(len(x0))`` and ``target`` the row of each noise, so labels and
    ids follow by index. Every noise is used once and keeps its distribution exactly; data points are hit equally often
    up to ``chi2``.

    With labels, classes have potentials of their own (``conditional=True``): a noise goes to a cell of its own class,
    ``y0``, or where that is not given the class of a data point drawn at random; noise and condition are then
    independent. Class-agnostic potentials skew the noise of a class as any class-agnostic coupling does; under strong
    classifier-free guidance that can be the better choice, see `ConditionalOTCoupling`.

    A coupling without potentials learns them in every call, from the noise of that call: too slow for training.

    With ``balanced=True`` points are not hit at random, but equally often: n noises take each of N points (of a class)
    ``n / N`` times, up to rounding. Points keep noises of their own cell as far as they have room; the other noises go
    to the cells of the points that are left, the last of them by exact transport. Every noise is still used once. At
    n = N, 63 % of the noises stay in their own cell (``info["kept"]``), more where n is a multiple of N. One OT batch
    that holds an epoch, ``CoupledLoader(ot_batch_size=…, drop_last=False)``, thus serves each point once an epoch.

    ``info`` holds ``chi2``, ``transport_cost`` (mean squared distance of the pairs) and, if balanced, ``kept``.

    Args:
        conditional: whether classes are paired apart; needs labels.
        steps: gradient steps of ``fit``.
        batch_size: noises a step.
        rate: first step length, in units of the standard deviation of the inner products; it falls as 1 / steps.
        tol: χ² above which ``fit`` warns.
        balanced: take every point equally often.
        reg: regularisation that ``fit`` starts with, in units of the standard deviation of the inner products; it
            falls to a thousandth over half of the steps, and a step is half of it long in place of ``rate``. 0: none.
            In low dimension 0.3 takes a tenth of the steps; in high dimension none is needed. The cells of the
            potentials that are returned are never regularised. Few steps want a larger one: all potentials move by at
            most ``reg · steps / 14`` in these units.
        stop_at: χ² at which ``fit`` ends before its ``steps``: it is measured on fresh noise after an eighth, a quarter
            and half of them. None: all steps.
        potentials: result of ``fit``.

    >>> data = torch.randn(64, 2)
    >>> coupling = SemidiscreteCoupling(steps=300).fit(data)
    >>> coupling.potentials.chi2 < 0.1
    True
    >>> pairs = coupling(torch.randn(1000, 2), data)
    >>> int(torch.bincount(pairs.target, minlength=64).min()) > 2  # 15.6 on average
    True
    """

    conditional: bool = False
    steps: int = 2000
    batch_size: int = 1024
    rate: float = 0.1
    tol: float = 0.1
    balanced: bool = False
    reg: float = 0.0
    stop_at: float | None = None
    potentials: DualPotentials | None = field(default=None)

    def __post_init__(self) -> None:
        checks.store(
            self,
            conditional=checks.flag(self.conditional, "conditional"),
            balanced=checks.flag(self.balanced, "balanced"),
            steps=checks.count(self.steps, "steps"),
            batch_size=checks.count(self.batch_size, "batch_size", at_least=2),
            rate=checks.positive(self.rate, "rate"),
            tol=checks.positive(self.tol, "tol"),
            reg=checks.positive(self.reg, "reg", allow_zero=True),
            stop_at=None if self.stop_at is None else checks.positive(self.stop_at, "stop_at"),
            ignores_conditions=not self.conditional,
        )

    @outside_graphs
    def fit(
        self,
        data: Tensor,
        y: Labels | None = None,
        *,
        noise: Noise | None = None,
        generator: torch.Generator | None = None,
        progress: Callable[[int, int], None] | None = None,
        total: Callable[[Tensor], Tensor] | None = None,
    ) -> SemidiscreteCoupling:
        """The coupling with potentials learned for a data set, starting from the potentials of this one if it has any.

        Args:
            data: ``(N, d…)`` data set.
            y: ``(N,)`` labels, for ``conditional=True``.
            noise: ``noise(n, generator=…)`` draws ``(n, d…)`` fresh noises; None: standard normal.
            generator: source of randomness.
            progress: called with (steps done, steps) after every step.
            total: sum of a tensor over the processes that fit together; see `mbot.distributed.fit`.

        Raises:
            ValueError: invalid data, labels missing, or potentials of another data set.

        Warns:
            ConvergenceWarning: χ² above ``tol`` at the end; fit again to go on from there.
        """
        flat, _ = checks.samples(data, data, "data", "data")
        points = at_least_float32(flat.detach())

        def fresh(count: int) -> Tensor:
            if noise is None:
                return draw(
                    torch.randn, count, points.shape[1], generator=generator, device=points.device, dtype=points.dtype
                )
            drawn = noise(count, generator=generator)
            if not isinstance(drawn, Tensor) or drawn.shape != (count, *data.shape[1:]):
                got = tuple(drawn.shape) if isinstance(drawn, Tensor) else type(drawn).__name__
                raise ValueError(f"noise must return {(count, *data.shape[1:])}; got {got}")
            return drawn.detach().flatten(1).to(points)

        with full_float32():
            learned = self._learn(points, self._codes(y, points, "y"), fresh, generator, progress, total)
        if learned.chi2 > self.tol:
            convergence.warn(
                f"SemidiscreteCoupling: the cells' masses are off by chi2 = {learned.chi2:.3g} after {learned.steps} "
                f"steps (tol {self.tol:g}). Fit again to continue, or raise steps or batch_size"
            )
        return dataclasses.replace(self, potentials=learned)

    def state_dict(self) -> dict[str, Any]:
        """Settings and potentials as plain values and tensors, for ``torch.save``."""
        return state_of(self, "potentials")

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> SemidiscreteCoupling:
        """The coupling that ``state_dict`` described."""
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = set(state) - known
        if unknown:
            raise ValueError(
                f"state must hold settings of SemidiscreteCoupling, {sorted(known)}; got {sorted(unknown)}"
            )
        saved = state.get("potentials")
        return cls(**{**state, "potentials": None if saved is None else DualPotentials(**saved)})

    @property
    def needs_data_set(self) -> bool:
        """It pairs with the points of a whole data set."""
        return True

    def _check_data_set(self, points: Tensor, codes: Tensor | None, name: str) -> None:
        """Refuse all but the data set that the potentials belong to."""
        if self.potentials is not None:
            check_fitted(self, self.potentials.fingerprint, len(self.potentials.values), points, codes, name)

    def _codes(self, y: Labels | None, points: Tensor, name: str) -> Tensor | None:
        """Classes of the points as 0 … c-1, or None for one class."""
        return codes_of(y, points, name) if self.conditional else None

    def _pair(
        self, x0: Tensor, x1: Tensor, y0: Labels | None, y1: Labels | None, generator: torch.Generator | None
    ) -> Pairs:
        x, points = at_least_float32(x0), at_least_float32(x1)
        codes = self._codes(y1, points, "y1")
        learned = self.potentials
        if learned is None:

            def again(count: int) -> Tensor:
                share = draw(torch.rand, count, generator=generator, device=x.device)
                return x[(share * len(x)).long().clamp_max(len(x) - 1)]

            learned = self._learn(points, codes, again, generator)
        else:
            self._check_data_set(points, codes, "x1")
        wanted = self._classes_of(x, y0, y1, codes, generator)
        info: dict[str, Any] = {"chi2": learned.chi2}
        if self.balanced:
            target, info["kept"] = balanced_cells(x, points, learned.values.to(points), codes, wanted, generator)
        else:
            target = cells(x, points, learned.values.to(points), codes, wanted)
        source = torch.arange(len(x), device=x.device)
        cost = (x - rows_of(points, target)).square().sum(1).double().mean()
        checks.finite(cost, "the mean squared distance of the pairs")
        return Pairs(source, target, info=info | {"transport_cost": float(cost)})

    def _classes_of(
        self, x: Tensor, y0: Labels | None, y1: Labels | None, codes: Tensor | None, generator: torch.Generator | None
    ) -> Tensor | None:
        """The class of each noise."""
        if codes is None:
            return None
        if y0 is None and self.balanced:
            rounds = -(-len(x) // len(codes))
            orders = [draw(torch.randperm, len(codes), generator=generator, device=x.device) for _ in range(rounds)]
            return codes[torch.cat(orders)[: len(x)]]
        if y0 is None:
            share = draw(torch.rand, len(x), generator=generator, device=x.device)
            return codes[(share * len(codes)).long().clamp_max(len(codes) - 1)]
        of_noise, of_data, names = class_codes(y0, y1)  # numbered as those of the data alone
        strange = of_noise[of_noise > of_data.max()]
        if len(strange):
            raise ValueError(f"y0 must hold classes of the data set; {names[strange[0]]!r} is none of them")
        return torch.from_numpy(of_noise).to(x.device)

    def _learn(
        self, points: Tensor, codes: Tensor | None, fresh: Callable[[int], Tensor], generator: torch.Generator | None,
        progress: Callable[[int, int], None] | None = None, total: Callable[[Tensor], Tensor] | None = None,
    ) -> DualPotentials:  # fmt: skip
        """Averaged stochastic gradient ascent; a class sees noises in proportion to its size."""
        total = total or (lambda values: values)
        count = len(points)
        first = 0
        # Scores <x, y>, without |y|²/2: in data spread wider than the noise it gives one point all of the noise.
        last = (points - points.mean(0)).square().sum(1) / 2
        last -= last.mean()
        if self.potentials is not None:
            self._check_data_set(points, codes, "data")
            first, last = self.potentials.steps, self.potentials.point.to(points).clone()
        # The unit of the potentials: the standard deviation of <x, y> over y, for noise of this size.
        norm, deviation = fresh(256).square().sum(1).mean().sqrt(), points.var(0, correction=0).mean().sqrt()
        processes = float(total(torch.ones((), device=points.device)))
        scale = float(total(norm) / processes * deviation)
        if not math.isfinite(256 * max(scale, float(points.abs().amax() ** 2 * points.shape[1]))):
            raise ValueError(f"the squared distances of these points do not fit into {points.dtype}: rescale them")
        size = class_sizes(points, codes)
        expected = processes * self.batch_size * size / count  # noises of its class that a step sees
        rounds = max(4, math.ceil(8 * count / (processes * self.batch_size)))
        looks = {self.steps // part for part in (8, 4, 2) if self.stop_at is not None} - {0}
        starts = {look // 2 for look in looks} | {self.steps // 2}  # of averages: each over the second half so far
        average, averaged = last.clone(), 0
        for step in range(self.steps):
            reg = scale * self._reg(step)
            hits, seen = total(torch.stack(self._hits(points, codes, last, fresh(self.batch_size), generator, reg)))
            rate = self.rate * scale / (1 + (first + step) / _DELAY) if reg == 0 else reg / 2
            last += rate * (seen - size * hits) / expected
            if step in starts:
                average, averaged = last.clone(), 1
            else:
                averaged += 1
                average += (last - average) / averaged
            if progress is not None:
                progress(step + 1, self.steps)
            if step + 1 in looks:
                chi2 = self._chi2(points, codes, average, fresh, generator, rounds, total)
                if chi2 <= (self.stop_at or 0):
                    return DualPotentials(average, chi2, first + step + 1, last, fingerprint(points, codes))
        chi2 = self._chi2(points, codes, average, fresh, generator, rounds, total)
        return DualPotentials(average, chi2, first + self.steps, last, fingerprint(points, codes))

    def _reg(self, step: int) -> float:
        """Regularisation of a step, in those units; the last one throughout where cells are equal already."""
        equal = self.potentials is not None and self.potentials.chi2 <= self.tol
        return self.reg * _SOFT ** (1 if equal else min(1, step / max(1, self.steps // 2)))

    def _hits(
        self, points: Tensor, codes: Tensor | None, values: Tensor, x: Tensor, generator: torch.Generator | None,
        reg: float = 0.0,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Noises in each cell, and noises that its class has seen, ``(N,)`` each."""
        wanted = self._classes_of(x, None, None, codes, generator)
        hits = masses(x, points, values, codes, wanted, reg)
        if codes is None or wanted is None:
            return hits, torch.full_like(hits, len(x))
        return hits, torch.bincount(wanted, minlength=int(codes.max()) + 1).to(points.dtype)[codes]

    def _chi2(
        self, points: Tensor, codes: Tensor | None, values: Tensor, fresh: Callable[[int], Tensor],
        generator: torch.Generator | None, rounds: int, total: Callable[[Tensor], Tensor],
    ) -> float:  # fmt: skip
        """Unbiased estimate of ``sum_j (p_j - b_j)² / b_j`` in the classes, their mean weighted by size."""
        hits = torch.zeros(len(points), dtype=torch.float64, device=points.device)
        seen = hits.clone()
        for _ in range(rounds):
            more, drawn = self._hits(points, codes, values, fresh(self.batch_size), generator)
            hits, seen = hits + more, seen + drawn
        hits, seen = total(torch.stack((hits, seen)))
        size = class_sizes(points, codes).double()
        squared = hits * (hits - 1) / (seen * (seen - 1)).clamp_min(1)  # unbiased for p_j²
        return float(((squared * size - 1 / size) * size / len(points)).sum())
