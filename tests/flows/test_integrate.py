"""The ODE solver on fields with known solutions."""

import math

import pytest
import torch

import flows
from flows import integrate


def rotate(t, x, y):
    return torch.stack((-x[:, 1], x[:, 0]), 1) * math.pi / 2


def test_one_euler_step_is_one_evaluation():
    x0 = torch.randn(5, 2)
    solved = integrate(rotate, x0, method="euler", steps=1)
    torch.testing.assert_close(solved.final, x0 + rotate(None, x0, None))
    assert solved.nfe == 1
    assert solved.t.tolist() == [0, 1]
    assert solved.x.shape == (2, 5, 2)


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
    with pytest.raises(RuntimeError, match="could not go on"):
        integrate(lambda t, x, y: x * torch.nan, torch.ones(2, 2))
