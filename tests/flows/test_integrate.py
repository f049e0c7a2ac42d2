"""The ODE solver on fields with known solutions."""

import copy
import math

import pytest
import torch

import flows
from flows import integrate, step_times
from flows.integrate import METHODS


def rotate(t, x, y):
    return torch.stack((-x[:, 1], x[:, 0]), 1) * math.pi / 2


def test_one_euler_step_is_one_evaluation():
    x0 = torch.randn(5, 2)
    solved = integrate(rotate, x0, method="euler", steps=1)
    torch.testing.assert_close(solved.final, x0 + rotate(None, x0, None))
    assert solved.nfe == 1
    assert solved.t.tolist() == [0, 1]
    assert solved.x.shape == (2, 5, 2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equal_steps_are_equal_to_the_digits_of_the_points(dtype):
    """Every step's slope is its time: the sum over k of k / n²."""
    n, seen = 10, []

    def field(t, x, y):
        seen.append(float(t[0]))
        return t[:, None].to(x.dtype).expand_as(x)

    solved = integrate(field, torch.zeros(1, 1, dtype=dtype), method="euler", steps=n)
    assert solved.t.dtype == torch.promote_types(dtype, torch.float32)
    digits = {torch.float64: 1e-15, torch.float32: 1e-7, torch.bfloat16: 1e-2}[dtype]
    assert seen == pytest.approx([k / n for k in range(n)], abs=digits)
    assert float(solved.final) == pytest.approx(sum(range(n)) / n**2, abs=2 * digits)


@pytest.mark.parametrize(("method", "evaluations"), [("euler", 1), ("midpoint", 2), ("heun", 2), ("rk4", 4)])
def test_fixed_steps_count_their_evaluations(method, evaluations):
    assert integrate(rotate, torch.randn(3, 2), method=method, steps=7).nfe == 7 * evaluations


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("midpoint", 2), ("heun", 2), ("rk4", 4)])
def test_fixed_steps_converge_at_their_order(method, order):
    x0 = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    exact = torch.tensor([[0.0, 1.0]], dtype=torch.float64)
    errors = [float((integrate(rotate, x0, method=method, steps=s).final - exact).norm()) for s in (20, 40)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.15)


def test_the_adaptive_solver_meets_its_tolerance_and_counts():
    x0 = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    calls = []
    solved = integrate(lambda t, x, y: calls.append(1) or rotate(t, x, y), x0, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(solved.final, torch.tensor([[0.0, 1.0]], dtype=torch.float64), rtol=0, atol=1e-5)
    assert solved.nfe == len(calls)
    loose = integrate(rotate, x0, rtol=1e-2, atol=1e-2)
    assert loose.nfe < solved.nfe


def test_times_run_both_ways_and_are_reported_where_asked():
    x0 = torch.randn(4, 2, dtype=torch.float64)
    there = integrate(rotate, x0, times=torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64), rtol=1e-8, atol=1e-8)
    assert there.x.shape == (3, 4, 2)
    back = integrate(rotate, there.final, times=torch.tensor([1.0, 0.0], dtype=torch.float64), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(back.final, x0, rtol=0, atol=1e-6)
    assert integrate(rotate, x0, steps=10).x.shape == (11, 4, 2)


def test_time_reaches_the_model_as_a_vector_and_conditions_as_they_are():
    seen = []

    def model(t, x, y):
        seen.append((t.shape, t.dtype, y))
        return x

    marker = {"anything": 1}
    integrate(model, torch.ones(3, 1, 2, 2), y=marker, method="rk4", steps=2)
    assert {(tuple(s), d) for s, d, _ in seen} == {((3,), torch.float32)}
    assert all(y is marker for _, _, y in seen)


def test_no_graph_is_recorded():
    model = flows.models.ResidualMLP(2)
    assert not integrate(model, torch.randn(3, 2), steps=2, method="euler").final.requires_grad


@pytest.mark.parametrize(
    ("kwargs", "error", "says"),
    [
        ({"method": "rk45"}, ValueError, "method must be one of"),
        ({"method": "euler"}, ValueError, "give steps"),
        ({"method": "euler", "steps": 0}, ValueError, "steps must be at least 1"),
        ({"method": "euler", "steps": 2.0}, TypeError, "steps must be an int"),
        ({"steps": 2, "times": torch.tensor([0.0, 1.0])}, ValueError, "not both"),
        ({"times": torch.tensor([0.0, 0.0, 1.0])}, ValueError, "strictly"),
        ({"times": torch.tensor([0.0])}, ValueError, "at least two"),
        ({"rtol": -1.0}, ValueError, "rtol must be a finite number >= 0"),
        ({"atol": float("nan")}, ValueError, "atol must be a finite number >= 0"),
        ({"rtol": 0.0, "atol": 0.0}, ValueError, "rtol and atol must not both be 0"),
    ],
)
def test_bad_settings(kwargs, error, says):
    with pytest.raises(error, match=says):
        integrate(rotate, torch.randn(3, 2), **kwargs)


def test_bad_points_and_fields():
    with pytest.raises(ValueError, match="finite"):
        integrate(rotate, torch.full((2, 2), torch.nan))
    with pytest.raises(TypeError, match="floating"):
        integrate(rotate, torch.zeros(2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"shape \(B, d…\)"):
        integrate(rotate, torch.zeros(0, 2))
    with pytest.raises(ValueError, match="velocities of shape"):
        integrate(lambda t, x, y: x[:, :1], torch.zeros(2, 2), method="euler", steps=1)


HALF = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("method", "steps"), [("euler", 1000), ("heun", 500), ("rk4", 300), ("dopri5", None)])
def test_half_precision_is_of_the_model_not_of_the_sum(dtype, method, steps):
    """x' = 1 ends at 1 and x' = x at e, for a model that sees half precision only."""
    seen = set()

    def grow(t, x, y):
        seen.update((t.dtype, x.dtype))
        return x

    def one(t, x, y):
        return torch.ones_like(x)

    x0 = torch.ones(3, 2, dtype=dtype)
    solved = integrate(one, x0 - 1, method=method, steps=steps)
    assert solved.x.dtype == dtype
    assert torch.equal(solved.final, x0)
    final = integrate(grow, x0, method=method, steps=steps).final
    torch.testing.assert_close(final.double(), torch.full((3, 2), math.e, dtype=torch.float64), rtol=5e-3, atol=0)
    assert seen == {dtype}


def test_half_precision_weights_are_called_in_half_precision():
    model = flows.models.ResidualMLP(2, width=16, depth=1)
    x0 = torch.randn(5, 2)
    for method in ("euler", "dopri5"):
        want = integrate(model, x0.bfloat16().float(), method=method, steps=100).final
        got = integrate(copy.deepcopy(model).bfloat16(), x0.bfloat16(), method=method, steps=100).final
        torch.testing.assert_close(got.float(), want, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("dtype", HALF)
def test_what_is_read_off_a_trajectory_is_not_its_rounding(dtype):
    """Speeds are differences of a trajectory, times its steps."""
    x0 = torch.full((4, 2), 3.0, dtype=dtype)
    slow = lambda t, x, y: torch.full_like(x, 0.5)
    assert flows.metrics.path_energy(slow, x0) == pytest.approx(0.5, rel=1e-3)
    assert flows.metrics.straightness(slow, x0) == pytest.approx(0, abs=1e-5)
    assert float(step_times.jump_costs(slow, x0, grid=20).triu(1).nan_to_num(posinf=0).max()) < 1e-6
    model = flows.models.ResidualMLP(2, width=8, depth=1)
    want, got = (flows.metrics.path_energy(m, x) for m, x in (
        (model, x0.float()), (copy.deepcopy(model).to(dtype), x0)))  # fmt: skip
    assert got == pytest.approx(want, rel=0.05)


FIELDS = {
    "everywhere": lambda t, x, y: x * torch.nan,
    "from the middle on": lambda t, x, y: x * torch.where(t > 0.55, torch.nan, 1.0)[:, None],
    "in one row": lambda t, x, y: torch.where(torch.arange(len(x)) == 1, torch.inf, 1.0)[:, None] * x,
    "by overflow": lambda t, x, y: x**3 * 1e12,
}


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize(("method", "steps"), [("euler", 10), ("midpoint", 10), ("heun", 10), ("rk4", 10)])
def test_fixed_steps_refuse_to_return_what_is_no_number(field, method, steps):
    with pytest.raises(flows.IntegrationError, match=rf"{method} could not go on.*not finite from time 0\.\d+ on"):
        integrate(FIELDS[field], torch.ones(3, 2), method=method, steps=steps)


@pytest.mark.parametrize("field", list(FIELDS)[:3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF])
def test_adaptive_steps_say_what_stopped_them(field, dtype):
    with pytest.raises(flows.IntegrationError, match=r"velocity is not finite at time [\d.]+\. Check") as stop:
        integrate(FIELDS[field], torch.ones(3, 2, dtype=dtype))
    assert "stiff" not in str(stop.value)


def test_a_stiff_field_is_called_so():
    with pytest.raises(flows.IntegrationError, match=r"dopri5 could not go on at time 0\.5.*too stiff for rtol"):
        integrate(lambda t, x, y: x**2, torch.full((3, 2), 2.0, dtype=torch.float64))  # x = 1 / (1/2 - t)


def test_the_models_own_assertions_are_its_own():
    def picky(t, x, y):
        assert y is not None, "labels, please"
        return x

    with pytest.raises(AssertionError, match="labels, please"):
        integrate(picky, torch.ones(2, 2))


def test_inference_mode_changes_nothing():
    model = flows.models.ResidualMLP(2, width=8, depth=1)
    x0 = torch.randn(5, 2)
    for how in ({}, {"method": "rk4", "steps": 3}):
        want = integrate(model, x0, **how).final
        with torch.inference_mode():
            assert torch.equal(integrate(model, x0 + 0, **how).final, want)


class Hasty:
    """The field ``x``, by a model that changes its inputs and writes every output to the same memory."""

    def __init__(self):
        self.memory = None

    def __call__(self, t, x, y=None, until=None):
        t *= 1000
        self.memory = torch.empty_like(x) if self.memory is None else self.memory
        self.memory.copy_(x)
        x.zero_()
        return self.memory


@pytest.mark.parametrize("rows", [1, 3])
def test_models_may_change_their_inputs_and_use_their_outputs_memory_again(rows):
    """As in-place activations and captured graphs do."""
    plain = lambda t, x, y=None, until=None: x
    start = torch.randn(rows, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for solve in (
        *(lambda m, x, name=name: flows.integrate(m, x, method=name, steps=4).final for name in METHODS),
        lambda m, x: flows.MeanFlow.sample(m, x, steps=3),
        lambda m, x: flows.integrate_sde(m, m, x, sigma=1.0, steps=3, generator=torch.Generator().manual_seed(1)).final,
        lambda m, x: flows.generate_pairs(m, rows, x0=x, method="rk4", steps=3).x1,
        lambda m, x: flows.Distillation(teacher=m).target(x, x, x[:, 0].sigmoid()),
    ):
        x = start.clone()
        torch.testing.assert_close(solve(Hasty(), x), solve(plain, x), rtol=0, atol=0)
        assert torch.equal(x, start)
