"""What every exact plan is held to: huge and forbidden costs, potentials of all points, certificates, bad numbers."""

import ast
import itertools
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment, linprog

import mbot
from mbot import BoMbCoupling, ConditionalOTCoupling, ExactOT, OTCoupling, PartialOT
from mbot.certify import certified
from mbot.kernels import device_matching
from mbot.problem import TOLERANCE, Live, Problems, Solution
from mbot.solvers.matching import match
from mbot.solvers.simplex import simplex

NEVER = [1e9, 1e12, 1e14, 1e20, 3e38, 1e100, 1e300]


@pytest.fixture(params=["cpu", "device"])
def place(request, monkeypatch):
    """Both backends of the assignment; the device's in plain torch."""
    if request.param == "device":
        monkeypatch.setattr(device_matching, "applies", lambda *_: True)
    return request.param


def slack(plan, cost):
    """``C - f - g``."""
    f, g = (p.double() for p in plan.potentials)
    return cost.double() - f[..., :, None] - g[..., None, :]


@pytest.mark.parametrize("never", NEVER)
@pytest.mark.parametrize("solver", ["auto", "assignment", "network_simplex"])
def test_a_never_of_three_points(never, solver, place):
    cost = torch.tensor([[0.5, 0.77, 0.09], [0.13, 0.31, 0.63], [never, never, 0.46]], dtype=torch.float64)
    plan = ExactOT(solver).plan(cost)
    assert 3 * float(plan.cost(cost)) == pytest.approx(1.27, rel=1e-12)
    assert bool(plan.converged)
    assert float(slack(plan, cost).min()) > -1e-12


@pytest.mark.parametrize("never", NEVER)
def test_twelve_points_with_weights_and_a_few_nevers(never):
    g = torch.Generator().manual_seed(0)
    cost = torch.rand(40, 12, 12, generator=g, dtype=torch.float64)
    a, b = (torch.rand(12, generator=g, dtype=torch.float64) + 0.1 for _ in range(2))
    a, b = a / a.sum(), b / b.sum()
    forbidden = torch.zeros(40, 144, dtype=torch.bool).scatter_(
        1, torch.rand(40, 144, generator=g).argsort(1)[:, :9], True
    )
    forbidden = forbidden.reshape_as(cost)
    expected = ExactOT().plan(cost.masked_fill(forbidden, torch.inf), a, b)
    never = cost.masked_fill(forbidden, never)
    plan = ExactOT().plan(never, a, b)
    assert bool(plan.converged.all())
    torch.testing.assert_close(plan.cost(never), expected.cost(cost), rtol=1e-9, atol=0)


@settings(max_examples=50, deadline=None)
@given(
    n=st.integers(2, 9),
    m=st.integers(2, 9),
    square=st.booleans(),
    share=st.floats(0, 0.7),
    never=st.sampled_from(NEVER),
    weights=st.sampled_from(["uniform", "random", "some zero"]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    device=st.integers(0, 15).map(lambda k: k == 0),  # in plain torch, slowly
    mass=st.sampled_from([None, 0.05, 0.3, 0.77, 0.9, 0.999]),
    seed=st.integers(0, 2**31),
)
def test_a_huge_cost_is_as_good_as_a_forbidden_pair(n, m, square, share, never, weights, dtype, device, mass, seed):
    m = n if square else m
    g = torch.Generator().manual_seed(seed)
    cost = (torch.rand(n, m, generator=g, dtype=torch.float64) * 2 - 0.5).to(dtype)
    mask = torch.rand(n, m, generator=g) < share
    a = b = None
    if weights != "uniform":
        a, b = (torch.rand(size, generator=g, dtype=torch.float64) + 0.05 for size in (n, m))
        if weights == "some zero":
            a[1:] *= torch.rand(n - 1, generator=g) < 0.7
            b[1:] *= torch.rand(m - 1, generator=g) < 0.7
        a, b = a / a.sum(), b / b.sum()
    huge, allowed = cost.masked_fill(mask, min(never, torch.finfo(dtype).max)), cost.masked_fill(mask, torch.inf)
    transport = ExactOT() if mass is None else PartialOT(mass)
    wa, wb = (torch.full((s,), 1 / s, dtype=torch.float64) if w is None else w for s, w in ((n, a), (m, b)))
    expected = linear_program(cost.double(), mask, wa, wb, mass)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device_matching, "applies", lambda *_: device)
        plan = transport.plan(huge, a, b)
        assert bool(plan.converged)
        assert float(slack(plan, huge).min()) >= -1e-6 * max(1, float(plan.potentials[0].abs().max()))
        if expected is not None:
            assert float(plan.cost(huge.double())) == pytest.approx(expected, rel=1e-6, abs=1e-7)
            plan = transport.plan(allowed, a, b)
            assert float(plan.cost(cost.double())) == pytest.approx(expected, rel=1e-6, abs=1e-7)
            assert float(plan.to_dense()[mask].sum()) == 0


def linear_program(cost, mask, a, b, mass):
    """The least cost by scipy, None where no plan avoids the mask."""
    n, m = cost.shape
    sums = np.vstack([np.kron(np.eye(n), np.ones(m)), np.kron(np.ones(n), np.eye(m))])
    bounds = [(0, 0 if hit else None) for hit in mask.flatten().tolist()]
    limits = np.concatenate((a, b))
    kwargs = {"A_eq": sums, "b_eq": limits} if mass is None else {
        "A_ub": sums, "b_ub": limits, "A_eq": np.ones((1, n * m)), "b_eq": [mass]
    }  # fmt: skip
    solved = linprog(cost.flatten().numpy(), bounds=bounds, method="highs", **kwargs)
    return solved.fun if solved.success else None


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(2, 4),
    levels=st.lists(st.sampled_from([0, 1, 1e3, 1e6, 1e9, 1e12, 1e20, 1e120]), min_size=1, max_size=3),
    pairs=st.integers(1, 4),
    device=st.integers(0, 15).map(lambda k: k == 0),  # in plain torch, slowly
    seed=st.integers(0, 2**31),
)
def test_costs_of_several_magnitudes_in_exact_arithmetic(n, levels, pairs, device, seed):
    rng = np.random.default_rng(seed)
    cost = rng.random((n, n)) * rng.choice(levels, size=(n, n))
    pairs = min(pairs, n)
    exact = [[Fraction(c) for c in row] for row in cost.tolist()]
    best = min(
        sum(exact[i][j] for i, j in zip(rows, cols, strict=True))
        for rows in itertools.combinations(range(n), pairs)
        for cols in itertools.permutations(range(n), pairs)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device_matching, "applies", lambda *_: device)
        plan = (ExactOT() if pairs == n else PartialOT(pairs / n)).plan(torch.from_numpy(cost))
    assert bool(plan.converged)
    used = plan.mass > 0
    value = sum(exact[i][j] for i, j in zip(plan.row[used].tolist(), plan.col[used].tolist(), strict=True))
    assert value - best <= Fraction(2e-9) * best + Fraction(1e-15)


@pytest.mark.parametrize("n", [64, 200])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nevers_in_larger_batches(n, share, dtype):
    """A batch in which some problems have huge costs, few or most of their entries."""
    g = torch.Generator().manual_seed(n)
    cost = torch.rand(4, n, n, generator=g, dtype=dtype)
    mask = torch.rand(4, n, n, generator=g) < share
    mask[1] = False
    mask.diagonal(dim1=1, dim2=2).fill_(False)
    huge = cost.masked_fill(mask, 1e20)
    plan = ExactOT().plan(huge)
    assert bool(plan.converged.all())
    for p in range(4):
        reference = np.where(mask[p], 1e6, cost[p].double())
        expected = reference[linear_sum_assignment(reference)].mean()
        assert float(plan.cost(huge.double())[p]) == pytest.approx(
            expected, rel=1e-9 if dtype == torch.float64 else 1e-6
        )
    transport = PartialOT(0.9)
    torch.testing.assert_close(
        transport.plan(huge).cost(huge.double()),
        transport.plan(cost.masked_fill(mask, torch.inf)).cost(cost.double()),
        rtol=1e-9, atol=0,
    )  # fmt: skip


def test_what_cannot_be_certified_says_so(monkeypatch):
    """A huge negative entry leaves float64 no digits, whatever the cap."""
    cost = torch.tensor([[0, 7e119, 5e119], [-1.7e119, 0, -290850.0], [9.6e119, 644622.0, 0]], dtype=torch.float64)
    with pytest.warns(mbot.ConvergenceWarning, match="ExactOT: 1 of 1 problems"):
        plan = ExactOT().plan(cost)
    assert not bool(plan.converged)


def test_plans_that_cost_nothing_are_certified():
    """The gap is rounding, and there is no cost to compare it with."""
    for d in (2, 64):
        x = torch.randn(3, 100, d, generator=torch.Generator().manual_seed(d))
        cost = mbot.pairwise_cost(x, x)
        for transport in (ExactOT(), ExactOT("network_simplex"), PartialOT(0.7)):
            assert bool(transport.plan(cost).converged.all())
    for ties in (torch.eye(4), torch.eye(4).log(), torch.zeros(4, 4)):
        assert bool(ExactOT().plan(-ties).converged.all())


def test_the_simplex_leaves_no_mass_on_forbidden_pairs():
    g = torch.Generator().manual_seed(1)
    for _ in range(100):
        cost = torch.rand(6, 2, generator=g, dtype=torch.float64)
        cost[torch.rand(6, 2, generator=g) < 0.3] = torch.inf
        a, b = (torch.rand(size, generator=g, dtype=torch.float64) for size in (6, 2))
        a, b = a / a.sum(), b / b.sum()
        try:
            plan = ExactOT().plan(cost, a, b)
        except ValueError:
            continue
        assert float(plan.to_dense()[cost == torch.inf].sum()) == 0
        assert bool(torch.isfinite(plan.cost(cost)))
        torch.testing.assert_close(plan.row_mass(), a, rtol=0, atol=1e-12)


# --- potentials ----------------------------------------------------------------------------------------------------


def test_potentials_of_points_without_weight():
    cost = torch.tensor([[-1.0, 0, 1], [2, -1, 0], [-2, -2, -1]])
    plan = ExactOT().plan(cost, torch.tensor([0.5, 0.5, 0]), torch.tensor([0, 0.25, 0.75]))
    assert float(slack(plan, cost).min()) >= 0


@settings(max_examples=80, deadline=None)
@given(
    n=st.integers(1, 8),
    m=st.integers(1, 8),
    mass=st.sampled_from([None, 0.1, 0.4, 0.75, 1.0]),
    weights=st.sampled_from(["uniform", "random", "some zero"]),
    kind=st.sampled_from(["real", "integer", "forbidden"]),
    device=st.integers(0, 15).map(lambda k: k == 0),  # in plain torch, slowly
    seed=st.integers(0, 2**31),
)
def test_potentials_are_feasible_for_all_pairs_and_give_the_value(n, m, mass, weights, kind, device, seed):
    g = torch.Generator().manual_seed(seed)
    cost = torch.randn(n, m, generator=g, dtype=torch.float64)
    if kind == "integer":
        cost = torch.randint(-2, 3, (n, m), generator=g).double()
    elif kind == "forbidden":
        cost[1:, 1:][torch.rand(n - 1, m - 1, generator=g) < 0.3] = torch.inf
    a, b = (torch.full((size,), 1 / size, dtype=torch.float64) for size in (n, m))
    if weights != "uniform":
        a, b = (torch.rand(size, generator=g, dtype=torch.float64) + 0.05 for size in (n, m))
        if weights == "some zero":
            a[1:] *= torch.rand(n - 1, generator=g) < 0.6
            b[1:] *= torch.rand(m - 1, generator=g) < 0.6
        a, b = a / a.sum(), b / b.sum()
    given = (None, None) if weights == "uniform" else (a, b)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device_matching, "applies", lambda *_: device)
        try:
            plan = (ExactOT() if mass is None else PartialOT(mass)).plan(cost, *given)
        except ValueError:
            return
    f, g = plan.potentials
    assert float(slack(plan, cost).min()) >= -1e-12
    left = 0 if mass is None else 1 - mass  # what is left behind has the largest potential
    dual = (a * f).sum() + (b * g).sum() - left * (f[a > 0].max() + g[b > 0].max())
    assert float(dual) == pytest.approx(float(plan.cost(cost)), rel=1e-9, abs=1e-9)


# --- numbers that no kernel may see --------------------------------------------------------------------------------


def test_only_solvers_know_the_kernels():
    """A kernel that is called from anywhere else is called with numbers that nobody has looked at."""
    package = Path(mbot.__file__).parent
    callers = set()
    for path in package.rglob("*.py"):
        module = path.relative_to(package).with_suffix("").as_posix().replace("/", ".")
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            kernels = {name.split(".")[2] for name in names if name.startswith("mbot.kernels.")}
            callers |= {(module, kernel) for kernel in kernels} if not module.startswith("kernels.") else set()
    compiled = {"assignment", "cardinality", "certificate", "device_matching", "triton_matching"}
    assert {(module, kernel) for module, kernel in callers if kernel in compiled} == {
        ("solvers.matching", "assignment"),
        ("solvers.matching", "cardinality"),
        ("solvers.matching", "device_matching"),
        ("solvers.simplex", "assignment"),  # its check
        ("certify", "certificate"),
    }


BAD = {
    "NaN": lambda c: c.fill_diagonal_(torch.nan),
    "-inf": lambda c: c.fill_diagonal_(-torch.inf),
    "overflow": lambda c: c.mul_(1.7e308),
    "all +inf": lambda c: c.fill_(torch.inf),
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("n", [1, 5])
def test_solvers_refuse_what_kernels_cannot_compute_with(bad, n, place):
    cost = torch.rand(n, n, dtype=torch.float64) + 0.5
    cost = BAD[bad](cost)[None].expand(2, n, n).contiguous()
    for problems, solve in (
        (Problems.dense(cost), match),
        (Problems.blocks([cost[0], torch.rand(2, 2, dtype=torch.float64)]), match),
        (Problems.dense(cost, *(torch.full((2, n), 1 / n, dtype=torch.float64) for _ in range(2))), simplex),
        *([(Problems.dense(cost, mass=n - 0.5), match)] if n > 1 else []),
    ):
        with pytest.raises(ValueError, match=r"NaN or -inf|at most 1e\+300|every pair"):
            solve(problems)


def test_a_batch_of_usual_and_refused_problems():
    g = torch.Generator().manual_seed(0)
    cost = torch.rand(5, 6, 6, generator=g, dtype=torch.float64)
    alone = match(Problems.dense(cost))
    cost[1, 0, :5], cost[3, 2, 2] = torch.inf, 1e200
    found = match(Problems.dense(cost))
    for p in (0, 2, 4):
        assert torch.equal(found.col[p], alone.col[p])
        assert torch.equal(found.g[p], alone.g[p])
    assert int(found.col[1, 0]) == 5
    assert float(found.error.max()) < 1e-9


@pytest.mark.parametrize("scale", [1e19, 1e20, 1e38, 1e200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_couplings_of_points_far_out(scale, dtype):
    """Squared distances beyond float32's range reach no kernel: the pairs are right, or refused."""
    if scale > torch.finfo(dtype).max:
        scale = 3e37
    g = torch.Generator().manual_seed(0)
    x0, x1 = (torch.randn(16, 9, generator=g, dtype=dtype) for _ in range(2))
    y = torch.arange(16) % 3
    one_far = x0.clone()
    one_far[3, 4] = scale
    continuous = ConditionalOTCoupling("continuous", weight=1.0, condition_cost="sqeuclidean")
    for coupling in (ConditionalOTCoupling(), continuous, OTCoupling(), BoMbCoupling(num_batches=4)):
        conditions = y.to(dtype)[:, None] if coupling is continuous else y
        for a, b in ((one_far, x1), (x0 * (scale / 10), x1 * (scale / 10))):
            try:
                pairs = coupling(a, b, y1=conditions)
            except ValueError as error:
                said = str(error)
                refused = any(word in said for word in ("range", "forbidden", "finite", "at most", "do not fit into"))
                assert refused, said
            else:
                assert sorted(pairs.source.tolist()) == list(range(16))


def test_conditional_coupling_beyond_float32():
    g = torch.Generator().manual_seed(0)
    x0, x1 = (torch.randn(16, 9, generator=g) for _ in range(2))
    y = torch.arange(16) % 3
    with pytest.raises(ValueError, match=r"do not fit into torch\.float32"):
        ConditionalOTCoupling()(x0 * 1e20, x1 * 1e20, y1=y)
    unit, far = (ConditionalOTCoupling()(c * x0.double(), c * x1.double(), y1=y) for c in (1, 1e20))
    assert torch.equal(far.source, unit.source)
    assert max(unit.info["error"], far.info["error"]) < 1e-9
    conditions = torch.randn(16, 4, generator=g)
    apart = ConditionalOTCoupling("continuous", weight=1e39)(x0, x1, y1=conditions)
    assert apart.source.tolist() == list(range(16))
    with pytest.raises(ValueError, match=r"do not fit into torch\.float64"):
        ConditionalOTCoupling()(x0.double() * 1e200, x1.double(), y1=y)


def test_live_points_are_solved_in_batches_of_their_own():
    """Problems of which some reduce to an assignment, by dropping points without weight."""
    cost = torch.rand(3, 4, 5, dtype=torch.float64)
    a = torch.tensor([[0.5, 0.5, 0, 0], [0.25, 0.25, 0.25, 0.25], [1.0, 0, 0, 0]], dtype=torch.float64)
    b = torch.tensor([[0, 0, 0.5, 0, 0.5], [0.2] * 5, [0, 0, 0, 0.5, 0.5]], dtype=torch.float64)
    live = Live.of(a, b)
    assert live.rows.tolist() == [2, 4, 1]
    assert live.cols.tolist() == [2, 5, 2]
    plan = ExactOT().plan(cost, a, b)
    for p in range(3):
        alone = ExactOT("network_simplex").plan(cost[p], a[p], b[p])
        assert float(plan.cost(cost)[p]) == pytest.approx(float(alone.cost(cost[p])), rel=1e-12)


@pytest.mark.parametrize(
    "coupling",
    [OTCoupling(), BoMbCoupling(num_batches=3), ConditionalOTCoupling(), OTCoupling(PartialOT(0.7))],
    ids=repr,
)
def test_exact_couplings_hand_out_their_certificate(coupling, monkeypatch):
    x0, x1 = torch.randn(20, 3), torch.randn(20, 3)
    assert 0 <= coupling(x0, x1, y1=torch.arange(20) % 2).info["error"] < 1e-9
    monkeypatch.setattr("mbot.problem.TOLERANCE", -1.0)
    with pytest.warns(mbot.ConvergenceWarning, match="did not converge"):
        coupling(x0, x1, y1=torch.arange(20) % 2)


@pytest.mark.parametrize("sizes", [[3, 3, 3], [1, 5, 2, 17, 9, 1], [4, 9], [7]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_problems_of_different_sizes(sizes, dtype, place):
    g = torch.Generator().manual_seed(0)
    costs = [torch.randn(n, n, generator=g, dtype=dtype) for n in sizes]
    for cost in costs[::2]:  # these need a cap
        cost[0, 1:] = 1e20
    found = match(Problems.blocks(costs))
    for p, cost in enumerate(costs):
        n = len(cost)
        _, col = linear_sum_assignment(cost.double().clamp(max=100))
        assert found.col[p, :n].tolist() == col.tolist()
        assert found.mass[p].tolist() == [1] * n + [0] * (max(sizes) - n)
        assert float((cost.double() - found.f[p, :n, None] - found.g[p, :n]).min()) > -1e-12
    assert float(found.error.max()) < 1e-9


def test_mass_that_is_missing_counts_at_its_price():
    """One pair of cost 1 moves, and the next 1e-10 of a pair, at 1e9 a pair, does not."""
    cost = torch.tensor([[[1.0, 1e9], [1e9, 1e9]]], dtype=torch.float64)
    f, g = torch.tensor([[1.0, 1e9], [0.0, 0.0]], dtype=torch.float64)[:, None]
    for moved, right in ((1.0, True), (1 + 1e-14, True), (1 + 1e-10, False)):
        solution = Solution(None, torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1, dtype=torch.float64), f, g)
        found = certified(Problems.dense(cost, mass=moved), lambda _, solution=solution: solution)
        assert (found.error[0] <= TOLERANCE) == right


def test_entries_without_mass_between_others_cost_no_mass():
    """The last entries were dropped for those that rounding had left empty."""
    index, none = torch.tensor([[0, 0, 1]]), torch.zeros(1, 2, dtype=torch.float64)
    mass = torch.tensor([[0.5, 0.0, 0.5]], dtype=torch.float64)
    solution = Solution(index, index, mass, none, none, np.zeros(1))
    weight = torch.full((1, 2), 0.5, dtype=torch.float64)
    found = Live.of(weight, weight).solve(torch.zeros(1, 2, 2), {lambda _: solution: np.arange(1)})
    assert float(found.mass.sum()) == 1
