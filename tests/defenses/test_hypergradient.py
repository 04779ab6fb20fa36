"""The implicit hypergradient against exact gradients of quadratics, in float64."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from smi.defenses.hypergradient import BilevelProblem, hypergradient
from smi.errors import InputError

D, P = 5, 3  # sizes of δ and θ


class Quadratic:
    """L2 = ½ δᵀAδ − δᵀBθ, L1 = ½‖δ − c‖² + ½‖θ‖²; ``A`` is positive definite."""

    def __init__(self) -> None:
        rng = torch.Generator().manual_seed(3)
        draw = torch.randn(D, D, generator=rng, dtype=torch.float64)
        self.a = draw @ draw.T / D + torch.eye(D, dtype=torch.float64)
        self.b = torch.randn(D, P, generator=rng, dtype=torch.float64)
        self.c = torch.randn(D, generator=rng, dtype=torch.float64)
        self.theta = torch.randn(P, generator=rng, dtype=torch.float64).requires_grad_()

    def inner(self, delta: Tensor, theta: Sequence[Tensor]) -> Tensor:
        return delta @ self.a @ delta / 2 - delta @ self.b @ theta[0]

    def outer(self, delta: Tensor, theta: Sequence[Tensor]) -> Tensor:
        return (delta - self.c).square().sum() / 2 + theta[0].square().sum() / 2

    def solution(self, theta: Tensor, radius: float | None) -> Tensor:
        """The minimiser over the ball, by projected gradient steps run to convergence."""
        delta = torch.zeros(D, dtype=torch.float64)
        for _ in range(4000):
            delta = delta - 0.1 * (self.a @ delta - self.b @ theta)
            if radius is not None and delta.norm() > radius:
                delta = delta * radius / delta.norm()
        return delta

    def exact(self, radius: float | None) -> Tensor:
        """dL1(δ*(θ), θ)/dθ by central differences of the solved problem."""
        columns, step = torch.eye(P, dtype=torch.float64), 1e-5
        theta = self.theta.detach()

        def value(at: Tensor) -> Tensor:
            return self.outer(self.solution(at, radius), [at])

        return torch.stack([(value(theta + step * e) - value(theta - step * e)) / (2 * step) for e in columns])


@pytest.fixture
def problem() -> Quadratic:
    return Quadratic()


def test_the_reference_is_the_closed_form_inside_the_ball(problem: Quadratic) -> None:
    theta = problem.theta.detach()
    solution = torch.linalg.solve(problem.a, problem.b @ theta)
    closed = theta + problem.b.T @ torch.linalg.solve(problem.a, solution - problem.c)
    torch.testing.assert_close(problem.exact(None), closed, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("products", ["differences", "autograd"])
@pytest.mark.parametrize("share", [None, 3.0, 0.6, 0.2], ids=["no ball", "interior", "boundary", "deep boundary"])
def test_hypergradient_converges_to_the_exact_gradient(problem: Quadratic, products: str, share: float | None) -> None:
    free = problem.solution(problem.theta.detach(), None).norm().item()
    radius = None if share is None else share * free
    setting = BilevelProblem(problem.inner, problem.outer, radius, products=products)
    delta = problem.solution(problem.theta.detach(), radius)
    (found,) = hypergradient(setting, delta, [problem.theta], iterations=400)
    torch.testing.assert_close(found, problem.exact(radius), rtol=1e-6, atol=1e-7)


def test_leaving_the_projection_out_is_wrong_at_the_boundary(problem: Quadratic) -> None:
    radius = 0.4 * problem.solution(problem.theta.detach(), None).norm().item()
    delta = problem.solution(problem.theta.detach(), radius)
    (found,) = hypergradient(BilevelProblem(problem.inner, problem.outer, None), delta, [problem.theta], iterations=400)
    assert (found - problem.exact(radius)).norm() > 0.1 * problem.exact(radius).norm()


def test_five_iterations_are_better_than_none(problem: Quadratic) -> None:
    delta, exact = problem.solution(problem.theta.detach(), None), problem.exact(None)
    setting = BilevelProblem(problem.inner, problem.outer, None)
    errors = [
        (hypergradient(setting, delta, [problem.theta], iterations=n)[0] - exact).norm().item() for n in (0, 5, 50)
    ]
    assert errors[0] > errors[1] > errors[2]


def test_differences_equal_autograd_on_a_network() -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(16, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)
    ).double()
    theta, names = list(net.parameters()), [n for n, _ in net.named_parameters()]
    x, y = torch.rand(12, 1, 4, 4, dtype=torch.float64), torch.arange(12) % 3
    delta = torch.randn(1, 1, 4, 4, dtype=torch.float64) * 0.1

    def loss(sign: float) -> object:
        def value(d: Tensor, weights: Sequence[Tensor]) -> Tensor:
            out = torch.func.functional_call(net, dict(zip(names, weights, strict=True)), (x + d,))
            return sign * torch.nn.functional.cross_entropy(out, y) + 1e-3 * d.square().sum()

        return value

    found = {
        products: hypergradient(BilevelProblem(loss(-1), loss(1), 0.05, products=products, step=1e-4), delta, theta)  # type: ignore[arg-type]
        for products in ("differences", "autograd")
    }
    for difference, exact in zip(found["differences"], found["autograd"], strict=True):
        torch.testing.assert_close(difference, exact, rtol=1e-5, atol=1e-9)


def test_unknown_products_are_refused(problem: Quadratic) -> None:
    with pytest.raises(InputError, match="differences, autograd"):
        BilevelProblem(problem.inner, problem.outer, None, products="magic")
