"""Diagnosis of the slots of an encoder on a batch: their similarity, their attention, and the mass of each."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from setenc import checks
from setenc.encoder import UMBC
from setenc.pooling import Pooling
from setenc.state import SetState


@dataclass(frozen=True, eq=False)
class SlotDiagnosis:
    """Means over the sets of a batch, and over heads where they differ.

    Args:
        slot_cosine: mean cosine between two slots of a set; 1 = all slots have one read-out.
        effective_rank: of the ``K`` slots of a set: exp of the entropy of their squared singular values, from 1 to K.
        entropy: of a slot's attention, divided by log n; 1 = uniform over the elements, 0 = a single one.
        overlap: mean cosine between the attention maps of two slots; 1 = all slots attend to the same elements.
        mass: ``(K,)`` share of each slot in the weight that all slots gave.
        advice: one line.
    """

    slot_cosine: float
    effective_rank: float
    entropy: float
    overlap: float
    mass: Tensor
    advice: str

    def __str__(self) -> str:
        return (
            f"slot cosine      {self.slot_cosine:.3f}\n"
            f"effective rank   {self.effective_rank:.2f} of {len(self.mass)}\n"
            f"entropy / log n  {self.entropy:.3f}\n"
            f"overlap of maps  {self.overlap:.3f}\n"
            f"mass of a slot   {float(self.mass.min()):.3f} to {float(self.mass.max()):.3f}\n"
            f"{self.advice}"
        )


@torch.no_grad()
def diagnose_slots(
    enc: UMBC | Pooling,
    x: Tensor,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    *,
    state: SetState | None = None,
) -> SlotDiagnosis:
    """Whether the slots of an encoder do different things on a batch of sets.

    A new `SlotPooling` starts with a slot cosine, an entropy and an overlap of 1 to three digits, and an effective rank
    of 1: all slots are one. `SlotPooling.init_slots` starts them apart.

    Args:
        enc: a `UMBC`, or a pooling whose features ``x`` are; its pooling gives elements attention.
        x: ``(B, N, …)`` whole sets, or with ``state`` the elements to examine.
        mask: ``(B, N)`` bool, True = a real element.
        weights: ``(B, N)`` multiplicities >= 0.
        state: of a stream that has seen these elements, and others; None is that of ``x``.

    Raises:
        NotImplementedError: a pooling without attention.

    >>> enc = setenc.UMBC(None, setenc.SlotPooling(3, 32, 8), None)
    >>> found = diagnose_slots(enc, torch.randn(4, 100, 3))
    >>> found.overlap > 0.95, found.entropy > 0.95
    (True, True)
    """
    if not isinstance(enc, UMBC | Pooling):
        raise TypeError(f"enc must be a setenc.UMBC or a setenc.Pooling; got {type(enc).__name__}")
    enc = enc if isinstance(enc, UMBC) else UMBC(None, enc, None)
    if not enc.pooling.has_masses:
        raise NotImplementedError(f"slots of {type(enc.pooling).__name__} do not weigh elements: nothing to diagnose")
    x, mask, weights = checks.elements(x, mask, weights)
    if state is None:
        state = enc.update(enc.init_state(len(x)), x, mask, weights)
    shares = enc.attention(state, x, mask, weights)
    slots = enc.pooling.readout(state).float()
    whole = shares.sum(-1, keepdim=True)
    shares = (shares / torch.where(whole > 0, whole, 1)).float()
    seen = (shares > 0).any(2).any(1).sum(-1)
    entropy = -torch.special.xlogy(shares, shares).sum(-1).mean((1, 2)) / seen.clamp_min(2).log()
    logs = state.log_mean_weight()
    mass = logs.softmax(-1).mean((0, 1))
    found = (_cosine(slots), _rank(slots), float(entropy[seen > 1].mean()) if bool((seen > 1).any()) else 0.0)
    overlap = _cosine(shares.flatten(0, 1))
    return SlotDiagnosis(*found, overlap, mass, _advice(found[0], found[2], overlap, len(mass)))


def _cosine(rows: Tensor) -> float:
    """Mean cosine between two of the ``K`` rows ``(B, K, d)``; 1 for a single one."""
    count = rows.shape[1]
    if count == 1 or len(rows) == 0:
        return 1.0
    rows = F.normalize(rows, dim=-1)
    product = rows @ rows.mT
    return float((product.sum((1, 2)) - product.diagonal(0, 1, 2).sum(1)).mean() / (count * (count - 1)))


def _rank(rows: Tensor) -> float:
    """Mean over ``B`` of the effective rank of ``(K, d)``."""
    if len(rows) == 0:
        return 1.0
    power = torch.linalg.svdvals(rows).square()
    power = power / power.sum(-1, keepdim=True).clamp_min(torch.finfo(power.dtype).tiny)
    return float((-torch.special.xlogy(power, power).sum(-1)).exp().mean())


def _advice(cosine: float, entropy: float, overlap: float, count: int) -> str:
    if count == 1:
        return "There is one slot: nothing to tell apart."
    if overlap > 0.9:
        return (
            "The slots attend to the same elements, and are one slot. Place them with SlotPooling.init_slots before "
            "training, and read them one by one (setenc.SlotQuery)."
        )
    if entropy < 0.05:
        return "Each slot attends to hardly more than one element: lower the sharpness, or give mass_feature=True."
    if cosine > 0.95:
        return (
            "The slots attend to different elements and read alike: residual=False, or more features, tell them apart."
        )
    return "The slots attend to different elements, and differ."
