"""A noise of its own for each point of a data set: a nearly optimal bijection that is kept, and improved in training.

Optimal transport of a mini-batch forgets its pairs, and those of a batch of 1024 are far from the optimum in many
dimensions. A bijection of as many noises as there are data points is matched once (`mbot.match_clouds`) and stored as a
number a point, from which its noise is remade. Training mini-batches may exchange noises among their points (LOOM-CFM,
arXiv 2603.15279): each exchange lowers the cost of the whole.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mbot import checks
from mbot.conditions import select
from mbot.cost import at_least_float32
from mbot.couplings.base import Coupling, Labels, Pairs, in_order
from mbot.couplings.fitted import check_fitted, codes_of, fingerprint, state_of
from mbot.eager import outside_graphs
from mbot.numerics import rows_of
from mbot.random import normals_at
from mbot.solvers.clouds import match_clouds


@dataclass(frozen=True, eq=False)
class NoiseAssignment:
    """The noises of the points of a data set.

    Attributes:
        number: ``(N, c)`` int64, the number of each noise in the sequence that the seed begins.
        seed: of the sequence.
        refreshed: how often the noises were replaced by new ones.
        fingerprint: hash of the points (and of their classes) that they belong to.
        shape: of a sample.
    """

    number: Tensor
    seed: int
    refreshed: int
    fingerprint: int
    shape: tuple[int, ...]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, NoiseAssignment):
            return NotImplemented
        names = ("seed", "refreshed", "fingerprint", "shape")
        same = all(getattr(self, name) == getattr(other, name) for name in names)
        return same and torch.equal(self.number.cpu(), other.number.cpu())

    __hash__ = None  # type: ignore[assignment]  # equal by its tensors, which may change

    def __repr__(self) -> str:
        return f"NoiseAssignment({len(self.number)} points, seed={self.seed}, fingerprint={self.fingerprint})"


@dataclass(frozen=True)
class DataCoupling(Coupling):
    """Each point of a data set with noises of its own, matched over the whole set; squared Euclidean cost.

    ``fit`` draws ``num_noises`` standard normal noises for each point, matches them by `mbot.match_clouds` and returns
    the coupling that holds the assignment: one int64 a noise, from which the noise is remade. `flows.CoupledLoader`
    then serves each point with its own noise, whatever the batch size: point i comes once an epoch, in epoch e with
    its noise ``e % num_noises``.

    **Exchange**: before an epoch each of its OT batches exchanges noises among its points where that lowers their cost
    (an exact matching of the batch), so the cost of the assignment never rises while training runs.
    **Refresh**: a fixed noise for each point can be memorised, as ``N · num_noises`` noises are all that a model ever
    sees. ``refresh=k`` draws and matches new ones every k epochs, at the price of another `fit`.

    With ``conditional=True`` noises are matched within classes: the noise of each class is a standard normal sample,
    so noise and condition are independent, as in C²OT.

    Called directly, it pairs the two clouds that it is given afresh, each x1 once (with as many sources drawn, if their
    numbers differ), within classes ``y0`` and ``y1`` if conditional; a noise without ``y0`` is of the class of its row
    in x1. ``info`` holds ``transport_cost``, the mean squared distance of the pairs.

    Args:
        num_noises: noises of each data point.
        refresh: epochs after which all noises are replaced; None: never.
        exchange: whether batches of the loader exchange noises.
        conditional: whether classes are matched apart; needs labels.
        tol: of `mbot.match_clouds`.
        assignment: result of ``fit``.

    >>> data = torch.randn(512, 2) + 3
    >>> coupling = DataCoupling().fit(data)
    >>> noise = coupling.noises(torch.arange(512))
    >>> bool((noise - data).square().sum(1).mean() < (torch.randn(512, 2) - data).square().sum(1).mean())
    True
    """

    num_noises: int = 1
    refresh: int | None = None
    exchange: bool = True
    conditional: bool = False
    tol: float = 5e-3
    assignment: NoiseAssignment | None = field(default=None)

    def __post_init__(self) -> None:
        checks.store(
            self,
            num_noises=checks.count(self.num_noises, "num_noises"),
            refresh=None if self.refresh is None else checks.count(self.refresh, "refresh"),
            exchange=checks.flag(self.exchange, "exchange"),
            conditional=checks.flag(self.conditional, "conditional"),
            tol=checks.positive(self.tol, "tol", allow_zero=True),
            ignores_conditions=not self.conditional,
        )

    @property
    def needs_data_set(self) -> bool:
        """It knows the points of a whole data set."""
        return True

    @property
    def brings_noise(self) -> bool:
        """Each point has noises of its own."""
        return True

    @outside_graphs
    def fit(
        self,
        data: Tensor,
        y: Labels | None = None,
        *,
        noise: None = None,
        generator: torch.Generator | None = None,
        progress: bool = False,
    ) -> DataCoupling:
        """The coupling with noises assigned to the points of a data set, anew.

        Args:
            data: ``(N, d…)`` data set.
            y: ``(N,)`` labels, for ``conditional=True``.
            noise: None, for standard normal noise: no other can be remade from a number.
            generator: source of the seed.
            progress: show a bar of the matching's sweeps.

        Raises:
            ValueError: invalid data, labels missing, a noise of one's own.
        """
        if noise is not None:
            raise ValueError(
                "DataCoupling remakes standard normal noise from numbers, and takes no other source; between two data "
                "sets use match_clouds, or another coupling"
            )
        flat, _ = checks.samples(data, data, "data", "data")
        codes = self._codes(y, flat, "y")
        seed = int(torch.randint(2**62, (1,), generator=generator, device=generator.device if generator else None))
        start = NoiseAssignment(
            torch.arange(len(flat) * self.num_noises).reshape(len(flat), -1), seed, 0,
            fingerprint(at_least_float32(flat), codes), tuple(data.shape[1:]),
        )  # fmt: skip
        return dataclasses.replace(self, assignment=start)._matched(data, codes, 0, progress)

    def noises(self, rows: Tensor | Sequence[int], turn: int = 0) -> Tensor:
        """The noises of points of the data set.

        Args:
            rows: ``(n,)`` positions of the points, integers in a tensor, an array or a list.
            turn: which of its noises each point gives.

        Returns:
            ``(n, d…)``, float32, on the device of ``rows``.
        """
        held, rows = self._held(), torch.as_tensor(rows)
        if rows.ndim != 1 or rows.is_floating_point() or rows.dtype == torch.bool:
            raise TypeError(f"rows must be integers (n,); got {rows.dtype} of shape {tuple(rows.shape)}")
        number = held.number[rows.to(held.number.device), turn % self.num_noises].to(rows.device)
        return normals_at(_key(held), number, torch.Size(held.shape).numel()).reshape(len(rows), *held.shape)

    def check_data_set(self, data: Tensor, y: Labels | None = None) -> None:
        """Refuse all but the data set that the noises belong to.

        Raises:
            ValueError: another data set, another order, other classes, or a coupling that was not fitted.
        """
        held = self._held()
        flat, _ = checks.samples(data, data, "data", "data")
        codes = self._codes(y, flat, "y")
        check_fitted(self, held.fingerprint, len(held.number), at_least_float32(flat), codes, "data")

    def at_epoch(self, epoch: int, data: Tensor, y: Labels | None, rows: Tensor, groups: Tensor) -> DataCoupling:
        """The coupling for an epoch, from that for the one before: noises refreshed where it is time, and exchanged.

        A function of its arguments alone, whatever the number of threads.

        Args:
            epoch: number of the epoch.
            data: ``(N, d…)`` the data set that it was fitted to.
            y: labels, for ``conditional=True``.
            rows: ``(n,)`` points that the epoch serves.
            groups: ``(n,)`` the OT batch of each, inside which noises are exchanged.
        """
        coupling, codes = self, self._codes(y, data, "y")
        if self.refresh and epoch and epoch % self.refresh == 0:
            coupling = self._matched(data, codes, epoch // self.refresh)
        if not self.exchange:
            return coupling
        turn, held = epoch % self.num_noises, coupling._held()
        if codes is not None:
            groups = groups * (int(codes.max()) + 1) + codes.to(groups.device)[rows]
        number = held.number[rows, turn]
        found = match_clouds(
            coupling.noises(rows.cpu(), turn), data[rows.to(data.device)], labels=(groups, groups), tol=self.tol,
            start=torch.arange(len(rows)), generator=torch.Generator().manual_seed(epoch),
        )  # fmt: skip
        exchanged = held.number.clone()
        exchanged[rows, turn] = number[found.source]
        return dataclasses.replace(coupling, assignment=dataclasses.replace(held, number=exchanged))

    def state_dict(self) -> dict[str, Any]:
        """Settings and assignment as plain values and tensors, for ``torch.save``."""
        return state_of(self, "assignment")

    def load_state_dict(self, state: dict[str, Any]) -> DataCoupling:
        """The coupling with a saved assignment; settings are immutable, so it is another object.

        Raises:
            ValueError: the state is of other settings.
        """
        own = {name: value for name, value in self.state_dict().items() if name != "assignment"}
        given = {name: value for name, value in state.items() if name != "assignment"}
        if own != given:
            raise ValueError(f"the state is of other settings: saved {given}, here {own}")
        held = state.get("assignment")
        return dataclasses.replace(self, assignment=None if held is None else NoiseAssignment(**held))

    def _held(self) -> NoiseAssignment:
        if self.assignment is None:
            raise ValueError("the coupling has no noises yet: coupling = DataCoupling(…).fit(data)")
        return self.assignment

    def _matched(self, data: Tensor, codes: Tensor | None, refreshed: int, progress: bool = False) -> DataCoupling:
        """New noises for all points."""
        held = dataclasses.replace(self._held(), refreshed=refreshed)
        n, c = held.number.shape
        number = torch.arange(n * c)
        x0 = normals_at(_key(held), number, torch.Size(held.shape).numel())
        found = match_clouds(
            x0, data.flatten(1), labels=None if codes is None else (codes.repeat(c), codes), tol=self.tol,
            generator=torch.Generator().manual_seed(_key(held)), progress=progress,
        )  # fmt: skip
        assignment = dataclasses.replace(held, number=found.source.reshape(n, c))
        return dataclasses.replace(self, assignment=assignment)

    def _codes(self, y: Labels | None, points: Tensor, name: str) -> Tensor | None:
        """Classes of the points as 0 … c-1, or None for one class."""
        return codes_of(y, points, name) if self.conditional else None

    def _pair(
        self, x0: Tensor, x1: Tensor, y0: Labels | None, y1: Labels | None, generator: torch.Generator | None
    ) -> Pairs:
        codes, labels = self._codes(y1, x1, "y1"), None
        source, target = in_order(x0, x1, generator)
        if codes is not None:
            labels = (codes, codes) if y0 is None else (select(y0, source), y1)
        found = match_clouds(rows_of(x0, source), x1, labels=labels, tol=self.tol, generator=generator)
        checks.finite(torch.tensor(found.cost), "the mean squared distance of the pairs")
        return Pairs(source[found.source.to(source.device)], target, info={"transport_cost": found.cost})


def _key(held: NoiseAssignment) -> int:
    """Seed of the noises since they were last replaced."""
    return (held.seed + held.refreshed * 0x2545F4914F6CDD1D) % 2**62
