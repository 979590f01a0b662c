"""Gradients of a closed loop's cost from one rollout at θ, and one at θ + δv with v uniform on the unit sphere.

    d = model-based direction (D20),   s = (C(θ + δv) - C(θ))/δ,   n = number of parameters

All estimators have one interface and can be compared on the same rollouts and directions. Those called unbiased
estimate the gradient of the cost smoothed over a ball, E ∇C(θ + δw): E[n (a·v) v] = a for every vector a.

References: Zuliani, Balta, Lygeros, Policy Optimization for Unknown Systems using Differentiable MPC, 2026, eqs. (8)
to (10); Suh, Simchowitz, Zhang, Tedrake, Do Differentiable Simulators Give Better Policy Gradients?, 2022.
"""

from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

Vector = Float[Array, " n"]
Scalar = Float[Array, ""]


class AbstractEstimator(eqx.Module):
    """An estimator of the gradient; what it remembers goes from one iteration to the next."""

    @property
    def perturbs(self) -> bool:
        """Whether it needs the second rollout."""
        return True

    def init(self, d: Vector) -> Any:
        """Memory before the first iteration."""
        return ()

    def __call__(self, k: Any, d: Vector, v: Vector, s: Scalar, memory: Any) -> tuple[Vector, Any]:
        """The estimate at iteration k, and the memory.

        Args:
            k: Number of the iteration, from 0.
            d: Model-based direction.
            v: Direction of the perturbation, of length 1.
            s: Slope measured along it.
            memory: From the iteration before.
        """
        raise NotImplementedError


class Model(AbstractEstimator):
    """g = d: one rollout an iteration, biased by the model."""

    @property
    def perturbs(self) -> bool:
        """No."""
        return False

    def __call__(self, k: Any, d: Vector, v: Vector, s: Scalar, memory: Any) -> tuple[Vector, Any]:
        """d."""
        return d, memory


class Zeroth(AbstractEstimator):
    """g = n s v: unbiased, with a variance of (n - 1)|∇C|²."""

    def __call__(self, k: Any, d: Vector, v: Vector, s: Scalar, memory: Any) -> tuple[Vector, Any]:
        """n s v."""
        return v.size * s * v, memory


class Hybrid(AbstractEstimator):
    """g = η_k d + (1 - η_k) n s v,   η_k = (k + 1)^-γ: as published."""

    gamma: float = 0.5
    """γ."""

    def __call__(self, k: Any, d: Vector, v: Vector, s: Scalar, memory: Any) -> tuple[Vector, Any]:
        """η_k d + (1 - η_k) n s v."""
        eta = (k + 1.0) ** -self.gamma
        return eta * d + (1.0 - eta) * v.size * s * v, memory


class Errors(NamedTuple):
    """Discounted sums over past iterations."""

    of_model: Scalar
    """(s - d·v)²: n times their mean is |∇C - d|²."""
    of_slope: Scalar
    """s²: n times their mean is |∇C|²."""


class InverseVariance(AbstractEstimator):
    """g = α d + (1 - α) n s v with α = e_0/(e_0 + e_1): e_1 = |∇C - d|², and e_0 = (n - 1)|∇C|², the variance of n s v.

    Both are measured by the slopes of past iterations, so that α does not depend on v; α = 1 at first.
    """

    forgetting: float = 0.9
    """Weight of an iteration relative to the one after it."""

    def init(self, d: Vector) -> Errors:
        """Nothing is known."""
        return Errors(jnp.zeros((), d.dtype), jnp.zeros((), d.dtype))

    def __call__(self, k: Any, d: Vector, v: Vector, s: Scalar, memory: Errors) -> tuple[Vector, Errors]:
        """α d + (1 - α) n s v."""
        alpha = _share(memory, v.size)
        mixed = alpha * d + (1.0 - alpha) * v.size * s * v
        return mixed, _remember(memory, self.forgetting, d, v, s)


class Alpha(AbstractEstimator):
    """Alpha-order gradient: the α of `InverseVariance`, but at most such that |α (d - ḡ)| + ε ≤ γ, and 0 for ε > γ.

    ḡ is the discounted mean of n s v, ε three times its standard error, γ `tolerance` times |ḡ|. (Suh et al. take a
    Bernstein bound for ε over many samples of one iteration, and a fixed γ.)
    """

    forgetting: float = 0.9
    """As of `InverseVariance`."""
    tolerance: float = 1.0
    """Bias that is tolerated, relative to the estimate."""

    def init(self, d: Vector) -> tuple[Errors, Vector, Scalar]:
        """Nothing is known."""
        nothing = jnp.zeros((), d.dtype)
        return Errors(nothing, nothing), jnp.zeros_like(d), nothing

    def __call__(self, k: Any, d: Vector, v: Vector, s: Scalar, memory: Any) -> tuple[Vector, Any]:
        """α d + (1 - α) n s v."""
        errors, total, count = memory
        mean = total / jnp.maximum(count, 1e-9)
        variance = (v.size - 1) * v.size * errors.of_slope / jnp.maximum(count, 1e-9)
        gamma, epsilon = self.tolerance * jnp.linalg.norm(mean), 3.0 * jnp.sqrt(variance / jnp.maximum(count, 1e-9))
        most = (gamma - epsilon) / jnp.maximum(jnp.linalg.norm(d - mean), jnp.finfo(d.dtype).tiny)
        alpha = jnp.clip(most, 0.0, _share(errors, v.size))
        zeroth = v.size * s * v
        kept = self.forgetting * total + zeroth, self.forgetting * count + 1.0
        return alpha * d + (1.0 - alpha) * zeroth, (_remember(errors, self.forgetting, d, v, s), *kept)


class Regression(NamedTuple):
    """Discounted sums over past iterations, of which β is the quotient."""

    products: Scalar
    squares: Scalar


class ControlVariate(AbstractEstimator):
    """g = β d + n (s - β d·v) v: unbiased for every β, so that nothing has to decay; variance (n - 1)|∇C - β d|².

    β is the regression of the slopes of past iterations on d·v, hence independent of v; 1 at first.
    """

    forgetting: float = 0.9
    """Weight of an iteration relative to the one after it."""

    def init(self, d: Vector) -> Regression:
        """β = 1 with the weight of no iteration."""
        return Regression(jnp.zeros((), d.dtype), jnp.zeros((), d.dtype))

    def __call__(self, k: Any, d: Vector, v: Vector, s: Scalar, memory: Regression) -> tuple[Vector, Regression]:
        """β d + n (s - β d·v) v."""
        known = memory.squares > 0
        beta = jnp.where(known, memory.products / jnp.where(known, memory.squares, 1.0), 1.0)
        p = jnp.vdot(d, v)
        kept = Regression(self.forgetting * memory.products + s * p, self.forgetting * memory.squares + p**2)
        return beta * d + v.size * (s - beta * p) * v, kept


def _share(errors: Errors, n: int) -> Scalar:
    """e_0/(e_0 + e_1); 1 while nothing is known."""
    variance, bias = (n - 1) * errors.of_slope, errors.of_model
    known = variance + bias > 0
    return jnp.where(known, variance / jnp.where(known, variance + bias, 1.0), 1.0)


def _remember(errors: Errors, forgetting: float, d: Vector, v: Vector, s: Scalar) -> Errors:
    return Errors(forgetting * errors.of_model + (s - jnp.vdot(d, v)) ** 2, forgetting * errors.of_slope + s**2)
