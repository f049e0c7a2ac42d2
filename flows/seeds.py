"""Seeds derived from a run's seed and a position in it, so that every process draws the same numbers."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from a path of numbers and names; distinct paths give independent seeds.

    >>> derive_seed(3, "noise", 7) == derive_seed(3, "noise", 7) != derive_seed(3, "noise", 8)
    True
    """
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator_at(*parts: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh generator seeded by `derive_seed`."""
    return torch.Generator(device).manual_seed(derive_seed(*parts))


@dataclass(frozen=True)
class SeededNoise:
    """Standard normal noise by position: that of position i is a function of the seed and i alone.

    Args:
        seed: of all.
        positions: of the rows.
        shape: of a sample.
        dtype: of the result; drawn in float32.
    """

    seed: int
    positions: range
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32

    def __getitem__(self, rows: slice) -> SeededNoise:
        return SeededNoise(self.seed, self.positions[rows], self.shape, self.dtype)

    def __len__(self) -> int:
        return len(self.positions)

    def at(self, rows: Tensor) -> Tensor:
        """Noise of some rows, ``(B, d…)``, on the CPU."""
        drawn, generator = torch.empty(len(rows), *self.shape), torch.Generator()
        for k, row in enumerate(rows.tolist()):
            generator.manual_seed(derive_seed(self.seed, "pair", self.positions[row]))
            torch.randn(self.shape, generator=generator, out=drawn[k])
        return drawn.to(self.dtype)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run a block with the global CPU generators (torch, Python, NumPy) seeded; they are put back afterwards.

    For code of the user's that draws from them, such as the random transforms of a data set.
    """
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])


def random_states(generator: torch.Generator) -> dict[str, torch.Tensor]:
    """States of a run's generator and of torch's default ones, on the CPU and on the generator's GPU."""
    states = {"train": generator.get_state(), "default": torch.get_rng_state()}
    if generator.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(generator.device)
    return states


def restore_random_states(states: dict[str, torch.Tensor], generator: torch.Generator) -> None:
    """Put the generators back to where `random_states` found them."""
    generator.set_state(states["train"])
    torch.set_rng_state(states["default"])
    if generator.device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], generator.device)
