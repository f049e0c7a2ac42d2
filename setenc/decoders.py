"""Decoders of slots: set transformer, MLP, FSPool, DIEM. None is mini-batch consistent by itself; on slots all are.

Any other module on ``(B, K, dim)`` serves as well.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from setenc import checks


class MAB(nn.Module):
    """Multi-head attention block of Lee et al. 2019 (arXiv 1810.00825): ``h = q(X) + att(X, Y)``, ``h + relu(fc(h))``.

    Args:
        dim: features, in and out.
        num_heads: heads.
        norm: layer-normalise after each half.
    """

    def __init__(self, dim: int, num_heads: int = 4, *, norm: bool = False) -> None:
        super().__init__()
        dim, self.num_heads = checks.heads(dim, num_heads)
        checks.flag(norm, "norm")
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(dim, 2 * dim)
        self.feed = nn.Linear(dim, dim)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) if norm else nn.Identity() for _ in range(2))

    def forward(self, x: Tensor, y: Tensor, mask: Tensor | None = None) -> Tensor:
        """``(B, m, dim)`` queries attend to ``(B, n, dim)``, with a mask ``(B, n)``, True = a real element."""
        same = x is y
        y, mask, _ = checks.elements(checks.slots(y, self.query.weight, "x"), mask, None)
        x = y if same else checks.slots(x, self.query.weight, "queries")
        y = y if mask is None else y.masked_fill(~mask[..., None], 0)
        queries = self.query(x)
        q, k, v = (
            t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (queries, *self.key_value(y).chunk(2, -1))
        )
        bias = None if mask is None else mask[:, None, None, :]
        hidden = self.norms[0](queries + F.scaled_dot_product_attention(q, k, v, bias).transpose(1, 2).flatten(2))
        return self.norms[1](hidden + self.feed(hidden).relu())


class SAB(nn.Module):
    """Self-attention block: every element attends to every element, O(n²). Arguments as in `MAB`.

    >>> SAB(8, num_heads=2)(torch.randn(3, 5, 8)).shape
    torch.Size([3, 5, 8])
    """

    def __init__(self, dim: int, num_heads: int = 4, *, norm: bool = False) -> None:
        super().__init__()
        self.attend = MAB(dim, num_heads, norm=norm)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """``(B, n, dim)`` to ``(B, n, dim)``."""
        return self.attend(x, x, mask)


class ISAB(nn.Module):
    """Induced self-attention block: attention through ``num_inducing`` learned points, O(n m).

    >>> ISAB(8, 4, num_heads=2)(torch.randn(3, 5, 8)).shape
    torch.Size([3, 5, 8])
    """

    def __init__(self, dim: int, num_inducing: int, num_heads: int = 4, *, norm: bool = False) -> None:
        super().__init__()
        size = (checks.count(num_inducing, "num_inducing"), checks.count(dim, "dim"))
        self.inducing = nn.Parameter(nn.init.xavier_uniform_(torch.empty(size)))
        self.gather = MAB(dim, num_heads, norm=norm)
        self.spread = MAB(dim, num_heads, norm=norm)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """``(B, n, dim)`` to ``(B, n, dim)``."""
        x = checks.slots(x, self.inducing, "x")
        return self.spread(x, self.gather(self.inducing.expand(x.shape[0], -1, -1), x, mask))


class PMA(nn.Module):
    """Pooling by multi-head attention: ``num_seeds`` learned seeds attend to the elements.

    >>> PMA(8, 2, num_heads=2)(torch.randn(3, 5, 8)).shape
    torch.Size([3, 2, 8])
    """

    def __init__(self, dim: int, num_seeds: int = 1, num_heads: int = 4, *, norm: bool = False) -> None:
        super().__init__()
        size = (checks.count(num_seeds, "num_seeds"), checks.count(dim, "dim"))
        self.seeds = nn.Parameter(nn.init.xavier_uniform_(torch.empty(size)))
        self.attend = MAB(dim, num_heads, norm=norm)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """``(B, n, dim)`` to ``(B, num_seeds, dim)``."""
        x = checks.slots(x, self.seeds, "x")
        return self.attend(self.seeds.expand(x.shape[0], -1, -1), x, mask)


class SetTransformerDecoder(nn.Module):
    """Self-attention blocks over the slots, optionally a pooling to fewer outputs, and a linear map.

    Args:
        dim: features of a slot.
        num_blocks: `SAB` blocks.
        num_heads: heads of each.
        out_dim: features of an output; None leaves the last linear map away.
        num_outputs: outputs of a `PMA` after the blocks; None keeps one output a slot.
        norm: layer-normalise inside the blocks.

    >>> SetTransformerDecoder(8, num_heads=2, out_dim=5)(torch.randn(3, 4, 8)).shape
    torch.Size([3, 4, 5])
    """

    def __init__(
        self,
        dim: int,
        num_blocks: int = 2,
        *,
        num_heads: int = 4,
        out_dim: int | None = None,
        num_outputs: int | None = None,
        norm: bool = False,
    ) -> None:
        super().__init__()
        num_blocks = checks.count(num_blocks, "num_blocks", at_least=0)
        self.blocks = nn.Sequential(*(SAB(dim, num_heads, norm=norm) for _ in range(num_blocks)))
        self.pool = nn.Identity() if num_outputs is None else PMA(dim, num_outputs, num_heads, norm=norm)
        self.output = nn.Identity() if out_dim is None else nn.Linear(dim, checks.count(out_dim, "out_dim"))

    def forward(self, slots: Tensor) -> Tensor:
        """``(B, K, dim)`` to ``(B, K or num_outputs, out_dim or dim)``."""
        return self.output(self.pool(self.blocks(slots)))


class MLPDecoder(nn.Sequential):
    """The same perceptron on every slot: ``(B, K, dim)`` to ``(B, K, out_dim or dim)``.

    Args:
        dim: features of a slot.
        out_dim: features of an output; None is ``dim``.
        hidden_dim: features of the hidden layers; None is ``dim``.
        num_layers: linear layers, with ReLU between them.

    >>> MLPDecoder(8, 5)(torch.randn(3, 4, 8)).shape
    torch.Size([3, 4, 5])
    """

    def __init__(
        self, dim: int, out_dim: int | None = None, *, hidden_dim: int | None = None, num_layers: int = 3
    ) -> None:
        dim, num_layers = checks.count(dim, "dim"), checks.count(num_layers, "num_layers")
        hidden = dim if hidden_dim is None else checks.count(hidden_dim, "hidden_dim")
        last = dim if out_dim is None else checks.count(out_dim, "out_dim")
        layers: list[nn.Module] = []
        for before, after in pairwise([dim, *[hidden] * (num_layers - 1), last]):
            layers += [nn.Linear(before, after), nn.ReLU()]
        super().__init__(*layers[:-1])


class FSPoolDecoder(nn.Module):
    """Feature-wise sort pooling (Zhang et al. 2019, arXiv 1906.02795), then a two-layer perceptron.

    Each feature is sorted over the slots, falling, and summed with weights that are a piecewise linear function of
    the relative rank in [0, 1].

    Args:
        dim: features of a slot.
        out_dim: features of the output; None is ``dim``.
        num_pieces: linear pieces of the weight function.

    >>> FSPoolDecoder(8, 5)(torch.randn(3, 4, 8)).shape
    torch.Size([3, 5])
    """

    def __init__(self, dim: int, out_dim: int | None = None, *, num_pieces: int = 20) -> None:
        super().__init__()
        checks.count(num_pieces, "num_pieces")
        dim, num_pieces = checks.count(dim, "dim"), checks.count(num_pieces, "num_pieces")
        self.weight = nn.Parameter(torch.randn(dim, num_pieces + 1))
        self.output = MLPDecoder(dim, out_dim, num_layers=2)

    def forward(self, slots: Tensor) -> Tensor:
        """``(B, K, dim)`` to ``(B, out_dim or dim)``."""
        slots = checks.slots(slots, self.weight.T)
        return self.output((slots.sort(1, descending=True).values * self.rank_weights(slots.shape[1])).sum(1))

    def rank_weights(self, size: int) -> Tensor:
        """Weights ``(size, dim)`` of the ranks of a set of ``size`` elements."""
        pieces = self.weight.shape[1] - 1
        position = torch.linspace(0, pieces, size, device=self.weight.device, dtype=self.weight.dtype)
        left = position.floor().clamp_max(pieces - 1).long()
        share = position - left
        return (self.weight[:, left] * (1 - share) + self.weight[:, left + 1] * share).T


class DIEMDecoder(nn.Module):
    """Differentiable expectation-maximisation (Kim 2022, arXiv 2206.08598): slots as samples of a Gaussian mixture.

    Each head holds a prior mixture (component means and variances, uniform proportions) and runs ``num_steps`` steps
    of maximum-a-posteriori EM from it; the prior counts as ``prior_strength`` elements a component. A component's
    output is a linear map of its log-proportion, mean and log-variance in all heads.

    Args:
        dim: features of a slot.
        num_components: mixture components ``p``.
        out_dim: features of an output; None is ``dim``.
        num_heads: mixtures side by side, each on its own projection of the slots.
        num_steps: EM steps.
        prior_strength: pseudo-observations of the prior, > 0.

    >>> DIEMDecoder(8, 4, out_dim=5)(torch.randn(3, 6, 8)).shape
    torch.Size([3, 4, 5])
    """

    def __init__(
        self,
        dim: int,
        num_components: int = 4,
        *,
        out_dim: int | None = None,
        num_heads: int = 1,
        num_steps: int = 3,
        prior_strength: float = 0.01,
    ) -> None:
        super().__init__()
        dim, num_components = checks.count(dim, "dim"), checks.count(num_components, "num_components")
        self.num_heads = num_heads = checks.count(num_heads, "num_heads")
        out_dim = dim if out_dim is None else checks.count(out_dim, "out_dim")
        self.num_steps = checks.count(num_steps, "num_steps")
        self.prior_strength = checks.positive(prior_strength, "prior_strength")
        self.project = nn.Linear(dim, num_heads * dim)
        self.prior_mean = nn.Parameter(torch.randn(num_heads, num_components, dim))
        self.prior_raw_variance = nn.Parameter(torch.full((num_heads, num_components, dim), math.log(math.e - 1)))
        self.output = nn.Linear(num_heads * (1 + 2 * dim), out_dim)

    def forward(self, slots: Tensor) -> Tensor:
        """``(B, K, dim)`` to ``(B, num_components, out_dim or dim)``."""
        x = self.project(checks.slots(slots, self.project.weight)).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        share, mean, variance = self.mixture(x)
        facts = torch.cat((share.log()[..., None], mean, variance.log()), -1)
        return self.output(facts.transpose(1, 2).flatten(2))

    def mixture(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Proportions ``(B, H, p)``, means and variances ``(B, H, p, d)`` fitted to ``x`` ``(B, H, K, d)``."""
        tau = self.prior_strength
        mean0, variance0 = self.prior_mean, F.softplus(self.prior_raw_variance) + 1e-4
        share = torch.full_like(mean0[..., 0], 1 / mean0.shape[1])
        mean: Tensor = mean0
        variance = variance0
        for _ in range(self.num_steps):
            gap = x[:, :, :, None] - mean.unsqueeze(-3)
            density = -0.5 * (gap.square() / variance.unsqueeze(-3) + variance.unsqueeze(-3).log()).sum(-1)
            duty = (share.log().unsqueeze(-2) + density).softmax(-1).mT
            mass = duty.sum(-1, keepdim=True) + tau
            share = (mass / mass.sum(-2, keepdim=True))[..., 0]
            mean = (duty @ x + tau * mean0) / mass
            spread = (x[:, :, None] - mean.unsqueeze(-2)).square()
            prior = variance0 + (mean0 - mean).square()
            variance = ((duty[..., None] * spread).sum(-2) + tau * prior) / mass + 1e-6
        return share, mean, variance
