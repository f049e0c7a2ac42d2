"""Runs the Triton kernels in Triton's interpreter, on the CPU; `test_triton_interpreter.py` starts it.

The interpreter must be chosen before Triton is imported, hence a process of its own. It is slow: sizes are tiny, and
the launch sizes are shrunk so that tiles, parts and blocks still repeat.
"""

import sys
from unittest.mock import patch

import torch

import mbot
from mbot.geometry import Points
from mbot.kernels import device_matching, triton_matching, triton_streaming
from mbot.kernels.device_matching import Problems, Reference, match
from mbot.kernels.device_streaming import Fused


def check_matching(n, cardinality, kind, dtype):
    """Same matching value, certified, from kernels and reference."""
    g = torch.Generator().manual_seed(n)
    cost = torch.randn(2, n, n, generator=g, dtype=dtype)
    if kind == "ties":
        cost = torch.randint(-1, 3, (2, n, n), generator=g).to(dtype)
    more = cardinality < n
    values = []
    for kernels in (triton_matching, Reference):
        columns, f, g = match(cost, cardinality, more, kernels=kernels)
        slack = cost - f[:, :, None] - g[:, None, :]
        assert float(slack.min()) > -1e-9
        for extra, column in enumerate(columns):
            used, pairs = column >= 0, column.clamp_min(0)[:, :, None]
            assert all(len(set(c[c >= 0].tolist())) == cardinality + extra for c in column)
            assert float((slack.gather(2, pairs)[:, :, 0] * used).max()) < 1e-9
            values.append((cost.double().gather(2, pairs)[:, :, 0] * used).sum(1))
    torch.testing.assert_close(values[: len(values) // 2], values[len(values) // 2 :], rtol=1e-12, atol=1e-12)


def short(problems):
    """A start that leaves some rows without a column."""
    return 4, 1


def matching():
    with patch.object(Problems, "schedule", short):
        for case in ((1, 1, "real", torch.float32), (7, 7, "ties", torch.float32), (21, 21, "real", torch.float64)):
            check_matching(*case)
        check_matching(9, 6, "real", torch.float32)
        check_matching(12, 5, "ties", torch.float64)
        check_matching(11, 8, "real", torch.float64)
        # A pass in three parts, each of several tiles.
        with patch.multiple(triton_matching, _TILE=64, _BLOCKWISE=8, _PROGRAMS=6):
            check_matching(19, 12, "real", torch.float32)


def starts():
    """Both forms of the start are the reference's."""
    cost = torch.randn(2, 19, 19, generator=torch.Generator().manual_seed(1)) + 5
    with patch.object(Problems, "schedule", lambda self: (3, 2)):
        problems = device_matching.problems_of(cost, 15)
        expected = Reference.start(problems)
        for blockwise in (512, 8):
            with patch.multiple(triton_matching, _TILE=128, _BLOCKWISE=blockwise, _STRIP=16):
                torch.testing.assert_close(triton_matching.start(problems), expected, rtol=1e-4, atol=1e-4)


def streaming():
    with patch.dict(triton_streaming._WIDE, N=32):
        passes()


def passes():
    g = torch.Generator().manual_seed(0)
    # No products of bfloat16: the interpreter keeps their bits as integers and multiplies these.
    for d, cost, dtype in (
        (2, "sqeuclidean", torch.float32), (3, "sqeuclidean", torch.bfloat16), (35, "sqeuclidean", torch.float16),
        (6, "sqeuclidean", torch.float32), (5, "dot", torch.float32), (7, "cosine", torch.float32),
    ):  # fmt: skip
        x, y = torch.randn(37, d, generator=g).to(dtype), (0.5 * torch.randn(70, d, generator=g) + 1).to(dtype)
        eps = 0.3 * d
        tiles = Points(x.double(), y.double(), cost, 100, eps)
        fused = Fused.prepared(x, y, cost, triton_streaming)
        psi = torch.randn(70, generator=g, dtype=torch.float64)
        phi = -fused.log_sums(psi, eps, False)
        torch.testing.assert_close(phi, -tiles.row_sums(psi[None])[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(fused.log_sums(phi, eps, True), tiles.col_sums(phi[None])[0], rtol=1e-5, atol=1e-5)
        for of_cols in (False, True):
            pulled, mass, points = fused.transported(phi, psi, eps, of_cols)
            expected, weight, there = tiles.transported(phi, psi, of_cols)
            torch.testing.assert_close(mass.double(), weight, rtol=1e-4, atol=1e-5)
            if cost != "cosine":  # whose points the kernels take normalised
                moved = mass[:, None] * points.float() - pulled
                torch.testing.assert_close(moved.double(), weight[:, None] * there - expected, rtol=1e-3, atol=1e-4)


def unreached():
    """Targets of no mass, and rows that nothing reaches."""
    x, y = torch.zeros(1, 3, 2), torch.ones(1, 4, 2)
    nothing = torch.full((1, 4), -torch.inf)
    assert bool((triton_streaming.log_sums(x, y, nothing, "sqeuclidean", 1.0) == -torch.inf).all())
    some = torch.tensor([[-torch.inf, 0.5, -torch.inf, -torch.inf]])
    torch.testing.assert_close(
        triton_streaming.log_sums(x, y, some, "sqeuclidean", 1.0), torch.full((1, 3), -1.5, dtype=torch.float64)
    )


def batches():
    """Several problems in one launch."""
    g = torch.Generator().manual_seed(2)
    x, y, psi = torch.randn(3, 5, 6, generator=g), torch.randn(3, 4, 6, generator=g), torch.randn(3, 4, generator=g)
    expected = torch.logsumexp(psi[:, None] - mbot.pairwise_cost(x, y) / 0.7, 2).double()
    torch.testing.assert_close(triton_streaming.log_sums(x, y, psi, "sqeuclidean", 0.7), expected, rtol=1e-5, atol=1e-5)


if __name__ == "__main__":
    for case in (batches, unreached, streaming, starts, matching):
        if case.__name__ in sys.argv[1:] or len(sys.argv) == 1:
            sys.stdout.write(case.__name__ + "\n")
            case()
