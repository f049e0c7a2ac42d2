"""Where mini-batch transport takes the points of a cloud."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mbot


@settings(deadline=None, max_examples=30)
@given(
    st.integers(3, 23),
    st.integers(3, 17),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 4),
    st.booleans(),
    st.integers(0, 99),
)
def test_the_barycentric_map_leaves_no_point_out(n, m, size, num, visits, bomb, seed):
    """Every source point is mapped into the hull of the targets, whatever the sizes."""
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(n, 2, 1, generator=g), torch.rand(m, 2, 1, generator=g)
    make = mbot.BoMbOT if bomb else mbot.MiniBatchOT
    loss = make(mbot.ExactOT(), num_batches=num, batch_size=size, generator=g)
    mapped, reached = loss.barycentric_map(x, y, visits)
    assert mapped.shape == x.shape
    assert (
        bool(reached.all()) or bomb
    )  # BoMb's outer plan may pair a batch with none of them only if totals are unequal
    assert bool(((mapped >= y.amin(0) - 1e-5) & (mapped <= y.amax(0) + 1e-5)).all(1)[reached].all())


def test_the_barycentric_map_of_one_batch_is_that_of_the_exact_plan():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(12, 3, generator=g), torch.randn(12, 3, generator=g) + 1
    exact, _ = mbot.ExactOT().plan(mbot.pairwise_cost(x, y)).barycentric_map(y)
    mapped, reached = mbot.MiniBatchOT(mbot.ExactOT(), num_batches=1, batch_size=12).barycentric_map(x, y, visits=3)
    torch.testing.assert_close(mapped, exact)
    assert bool(reached.all())


def test_the_barycentric_map_visits_each_point_as_often_as_asked():
    """With batches of one, the map is the mean of as many targets; partial transport leaves far points as they are."""
    x, y = torch.zeros(5, 1), torch.arange(5.0)[:, None]
    loss = mbot.MiniBatchOT(mbot.ExactOT(), num_batches=5, batch_size=1, pairing="aligned")
    mapped, _ = loss.barycentric_map(x, y, visits=1)
    assert sorted(mapped.flatten().tolist()) == [0, 1, 2, 3, 4]
    far = torch.cat((torch.zeros(9, 1), torch.full((1, 1), 1e3)))
    part = mbot.MiniBatchOT(mbot.PartialOT(0.9), num_batches=1, batch_size=10)
    mapped, reached = part.barycentric_map(far, torch.ones(10, 1))
    assert reached.tolist() == [True] * 9 + [False]
    assert mapped.flatten().tolist() == [1] * 9 + [1e3]
    with pytest.raises(ValueError, match="a batch of 11 cannot be drawn from the 10 points of x"):
        mbot.MiniBatchOT(mbot.ExactOT(), num_batches=1, batch_size=11).barycentric_map(far, far)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_barycentric_map_of_half_precision_points_is_summed_in_more(dtype):
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(40, 2, generator=g).to(dtype), (torch.randn(40, 2, generator=g) + 3).to(dtype)

    def mapped(x, y):
        loss = mbot.MiniBatchOT(
            mbot.EntropicOT(1.0), num_batches=4, batch_size=20, generator=torch.Generator().manual_seed(0)
        )
        return loss.barycentric_map(x, y, visits=64)[0]

    found = mapped(x, y)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), mapped(x.float(), y.float()), rtol=torch.finfo(dtype).eps, atol=1e-3)
