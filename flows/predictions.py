"""Predictions of a model at a point of an affine path: the velocity, the end x1, or the start x0, the noise.

Point and velocity of ``xt = a(t) x0 + b(t) x1`` are two equations in x0 and x1, so that any two of the four quantities
give the others, in expectation too.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from flows.paths import AffinePath, Path, beside, check_path
from mbot import checks

PREDICTIONS = ("velocity", "x1", "noise")
_EARLIEST, _LATEST = 1e-2, 1 - 1e-3  # times between which x0 says where x1 is, and x1 where x0 is


def check_prediction(prediction: str, path: Path) -> str:
    """A prediction that can be turned into the path's velocity.

    Raises:
        ValueError: an unknown one; another than the velocity on a path that has noise of its own, or is not affine.
    """
    checks.choice(prediction, "prediction", PREDICTIONS)
    check_path(path)
    if prediction != "velocity" and (path.needs_noise or not isinstance(path, AffinePath)):
        raise ValueError(f"prediction {prediction!r} needs an affine path without noise of its own; got {path}")
    return prediction


class _Lines(NamedTuple):
    """Weights of x0 and x1 in the point (a, b) and in the velocity (da, db), beside the samples."""

    a: Any
    b: Any
    da: Any
    db: Any


def _lines(path: Any, t: Tensor, x: Tensor) -> _Lines:
    at = path.weights(beside(t, x).to(x.dtype))
    return _Lines(at.x0, at.x1, path.speed * at.x0_rate, path.speed * at.x1_rate)


def from_velocity(path: Path, prediction: str, t: Tensor, xt: Tensor, ut: Tensor) -> Tensor:
    """Right predictions at points ``xt`` ``(B, d…)`` at times ``t`` ``(B,)`` whose velocities are ``ut``."""
    if check_prediction(prediction, path) == "velocity":
        return ut
    at = _lines(path, t, xt)
    determinant = at.a * at.db - at.b * at.da
    return (at.a * ut - at.da * xt if prediction == "x1" else at.db * xt - at.b * ut) / determinant


def to_velocity(path: Path, prediction: str, t: Tensor, xt: Tensor, predicted: Tensor) -> Tensor:
    """The velocity at points ``xt`` that a prediction there means. Infinite where it says nothing of the other end."""
    if check_prediction(prediction, path) == "velocity":
        return predicted
    at = _lines(path, t, xt)
    if prediction == "x1":
        return at.da * (xt - at.b * predicted) / at.a + at.db * predicted
    return at.da * predicted + at.db * (xt - at.a * predicted) / at.b


class _Velocity(nn.Module):
    def __init__(self, model: Any, prediction: str, path: Path) -> None:
        super().__init__()
        self.model, self.prediction, self.path = model, prediction, path

    def extra_repr(self) -> str:
        return f"prediction={self.prediction!r}, path={self.path}"

    def forward(self, t: Tensor, x: Tensor, y: Any = None) -> Tensor:
        t = t.clamp(max=_LATEST) if self.prediction == "x1" else t.clamp(min=_EARLIEST)
        return to_velocity(self.path, self.prediction, t, x, self.model(t, x, y))


def as_velocity(model: Any, prediction: str, path: Path) -> Any:
    """A model that predicts x1 or noise as a velocity model, for `flows.integrate` and everything else.

    A predicted x1 leaves the velocity open at t = 1, predicted noise at t = 0: the model is called at times of at most
    0.999 and at least 0.01. Noise wants many or adaptive steps, since the first one divides the model's error by 0.01.

    Args:
        model: ``model(t, x, y)``, trained with `flows.FlowMatching` of that prediction and path.
        prediction: ``"velocity"`` (the model as it is), ``"x1"`` or ``"noise"``, the x0 of the pair.
        path: the path that it was trained on; affine, without noise of its own.

    >>> always = as_velocity(lambda t, x, y: torch.ones_like(x), "x1", flows.LinearPath())
    >>> always(torch.tensor([0.5]), torch.zeros(1, 2))
    tensor([[2., 2.]])
    """
    if not callable(model):
        raise TypeError(f"model must be called as model(t, x, y); got {type(model).__name__}")
    return model if check_prediction(prediction, path) == "velocity" else _Velocity(model, prediction, path)


__all__ = ["PREDICTIONS", "as_velocity", "check_prediction", "from_velocity", "to_velocity"]
