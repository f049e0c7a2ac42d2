"""Plans: dense and sparse forms agree, sampling has the right law, mass that does not move is not invented."""

import pytest
import torch

from mbot import Plan


def sparse_and_dense():
    row = torch.tensor([[0, 1, 1, 0], [2, 0, 1, 0]])
    col = torch.tensor([[1, 0, 0, 0], [3, 2, 2, 0]])
    mass = torch.tensor([[0.25, 0.25, 0.25, 0.0], [0.5, 0.25, 0.125, 0.0]])
    sparse = Plan(mass, (3, 4), row, col)
    return sparse, Plan(sparse.to_dense(), (3, 4))


def test_repeated_entries_add_up_and_padding_does_not_count():
    sparse, _ = sparse_and_dense()
    expected = torch.zeros(2, 3, 4)
    expected[0, 0, 1], expected[0, 1, 0] = 0.25, 0.5
    expected[1, 2, 3], expected[1, 0, 2], expected[1, 1, 2] = 0.5, 0.25, 0.125
    assert torch.equal(sparse.to_dense(), expected)


def test_both_forms_agree():
    sparse, dense = sparse_and_dense()
    cost, y = torch.rand(2, 3, 4), torch.randn(2, 4, 5)
    for method in ("row_mass", "col_mass", "total_mass", "to_dense"):
        torch.testing.assert_close(getattr(sparse, method)(), getattr(dense, method)())
    torch.testing.assert_close(sparse.cost(cost), dense.cost(cost))
    for a, b in zip(sparse.barycentric_map(y), dense.barycentric_map(y), strict=True):
        torch.testing.assert_close(a, b)


def test_cost_ignores_forbidden_pairs_without_mass_and_broadcasts():
    sparse, dense = sparse_and_dense()
    cost = torch.rand(3, 4)
    walled = cost.clone()
    walled[2, 0] = torch.inf
    for plan in (sparse, dense):
        torch.testing.assert_close(plan.cost(walled), plan.cost(cost))
        assert plan.cost(cost).shape == (2,)


def test_cost_differentiates_through_the_cost_only():
    sparse, dense = sparse_and_dense()
    for plan in (sparse, dense):
        cost = torch.rand(2, 3, 4, requires_grad=True)
        plan.cost(cost).sum().backward()
        torch.testing.assert_close(cost.grad, plan.to_dense())
    assert not Plan(torch.rand(2, 2, requires_grad=True), (2, 2)).mass.requires_grad


def test_barycentric_map_divides_by_the_row_s_mass_and_flags_rows_without():
    sparse, _ = sparse_and_dense()
    y = torch.tensor([[10.0], [20.0], [30.0], [40.0]]).expand(2, 4, 1)
    mapped, reached = sparse.barycentric_map(y)
    assert mapped[..., 0].tolist() == [[20.0, 10.0, 0.0], [30.0, 30.0, 40.0]]
    assert reached.tolist() == [[True, True, False], [True, True, True]]


def test_barycentric_map_has_finite_gradients_also_in_empty_rows():
    sparse, dense = sparse_and_dense()
    for plan in (sparse, dense):
        y = torch.randn(2, 4, 2, requires_grad=True)
        plan.barycentric_map(y)[0].sum().backward()
        assert bool(torch.isfinite(y.grad).all())


def test_matching():
    ones = torch.ones(3) / 3
    rows = torch.arange(3)
    assert Plan(ones, (3, 3), rows, torch.tensor([2, 0, 1])).matching().tolist() == [1, 2, 0]
    assert Plan(ones, (3, 3), rows, torch.tensor([2, 0, 0])).matching() is None
    assert Plan(ones, (3, 3), torch.tensor([0, 0, 1]), torch.tensor([2, 0, 1])).matching() is None
    assert Plan(torch.eye(3) / 3, (3, 3)).matching() is None


def test_sampling_a_permutation_without_replacement_gives_every_pair_once():
    n = 50
    plan = Plan(torch.full((n,), 1 / n), (n, n), torch.arange(n), torch.randperm(n))
    row, col = plan.sample(n)
    assert sorted(row.tolist()) == list(range(n))
    assert torch.equal(plan.col[row], col)


@pytest.mark.parametrize("form", [0, 1])
def test_sampling_follows_the_masses(form):
    plan = sparse_and_dense()[form]
    row, col = plan.sample(40_000, replacement=True, generator=torch.Generator().manual_seed(0))
    assert row.shape == (2, 40_000)
    for b in range(2):
        frequency = torch.bincount(row[b] * 4 + col[b], minlength=12).reshape(3, 4) / 40_000
        expected = plan.to_dense()[b] / plan.total_mass()[b]
        torch.testing.assert_close(frequency, expected, rtol=0, atol=0.012)
        assert bool((frequency[expected == 0] == 0).all())


@pytest.mark.parametrize("form", [0, 1])
def test_sampling_without_replacement_draws_no_cell_twice_and_follows_the_masses(form):
    plan = sparse_and_dense()[form]
    g = torch.Generator().manual_seed(0)
    first = torch.zeros(12)
    for _ in range(2000):
        row, col = plan.sample(2, generator=g)
        cell = row * 4 + col
        assert cell[0, 0] != cell[0, 1]
        first[cell[1, 0]] += 1
    torch.testing.assert_close((first / 2000).reshape(3, 4), plan.to_dense()[1] / 0.875, rtol=0, atol=0.04)


def test_sampling_is_decided_by_the_generator():
    plan = sparse_and_dense()[0]
    a, b = (plan.sample(2, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(a[0], b[0])
    assert torch.equal(a[1], b[1])


def test_sampling_errors():
    sparse, _ = sparse_and_dense()
    with pytest.raises(ValueError, match=r"at most the number of cells with mass \(2\)"):
        sparse.sample(3)
    with pytest.raises(ValueError, match="without mass"):
        Plan(torch.zeros(2, 2), (2, 2)).sample(1)
    with pytest.raises(ValueError, match="num must be at least 1"):
        sparse.sample(0)
    with pytest.raises(ValueError, match=r"shape \(…, 3, 4\)"):
        sparse.cost(torch.zeros(4, 3))
    with pytest.raises(ValueError, match=r"shape \(…, 4, d\)"):
        sparse.barycentric_map(torch.zeros(3, 2))


def test_repr_says_what_it_is():
    sparse, dense = sparse_and_dense()
    assert repr(sparse) == "Plan(3 x 4, batch (2,), sparse, 4 entries, torch.float32, converged=True)"
    assert "dense" in repr(dense)


def test_entries_and_distinct_masses_of_both_forms_make_the_same_plan():
    sparse, dense = sparse_and_dense()
    for plan in (sparse, dense):
        row, col, mass = plan.entries()
        assert torch.equal(Plan(mass, (3, 4), row, col).to_dense(), plan.to_dense())
        assert plan.distinct_mass().shape == plan.mass.shape
    assert sparse.distinct_mass().tolist() == [[0.25, 0.5, 0.0, 0.0], [0.5, 0.25, 0.125, 0.0]]
    assert torch.equal(dense.distinct_mass(), dense.mass)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sparse", [False, True])
def test_barycentric_map_of_half_precision_points_takes_masses_that_do_not_fit(dtype, sparse):
    n = 600
    y = torch.rand(n, 1, generator=torch.Generator().manual_seed(0)).to(dtype)
    mass = torch.arange(1.0, n + 1) * 1e-12
    index = torch.arange(n)
    plan = Plan(mass, (1, n), torch.zeros_like(index), index) if sparse else Plan(mass[None], (1, n))
    mapped, reached = plan.barycentric_map(y)
    assert mapped.dtype == dtype
    assert bool(reached.all())
    expected = (mass[:, None] * y.float()).sum(0) / mass.sum()
    torch.testing.assert_close(mapped[0].float(), expected, rtol=torch.finfo(dtype).eps, atol=0)
