"""Steps of closed-loop tuning: descent along an estimated gradient, and Gauss-Newton's with an exact penalty.

    F(θ) = C(x, u) + penalty · Σ max(h(x, u), 0)                                                                  (D21)

A method is told what the plant did at θ, and proposes where to run it next.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sartor.estimators import AbstractEstimator, ControlVariate
from sartor.policy_gradient import Feedback, Rollout, cost_gradient, policy_jacobian, sensitivities
from sartor.problem import Problem, Softening
from sartor.solve import solve
from sartor.solvers.sqp import SQP

Vector = Float[Array, " n"]
Scalar = Float[Array, ""]


class Objective(NamedTuple):
    """What a closed loop is judged by: F of (D21)."""

    cost: Callable
    """cost(xs (T+1, nx), us (T, nu)) -> C."""
    rows: Callable | None = None
    """rows(xs, us) -> h in any shape, ≤ 0 where all is well."""
    penalty: float = 1e4
    """Of the sum of violations; exact if it exceeds the multipliers of the rows."""

    def excess(self, xs: Array, us: Array) -> Scalar:
        """Σ max(h, 0)."""
        return jnp.zeros((), xs.dtype) if self.rows is None else jnp.sum(jnp.maximum(self.rows(xs, us), 0.0))

    def merit(self, xs: Array, us: Array) -> Scalar:
        """F."""
        return self.cost(xs, us) + self.penalty * self.excess(xs, us)


class Score(NamedTuple):
    """What came out of a rollout."""

    merit: Scalar
    """F."""
    cost: Scalar
    """C."""
    violation: Scalar
    """Σ max(h, 0)."""
    failed: Int[Array, ""]
    """Control steps whose solve failed."""


class Answer(NamedTuple):
    """How the plant, in the eyes of the model, answers to the parameters around a rollout."""

    xs: Float[Array, "T_plus_1 nx"]
    us: Float[Array, "T nu"]
    A: Float[Array, "T nx nx"]
    B: Float[Array, "T nx nu"]
    K: Float[Array, "T nu nx"]
    direct: Float[Array, "T nu n"]
    """∂π/∂θ."""


class Change(NamedTuple):
    """What a model lacks, as measured: x_{t+1} - f(x_t, u_t) ≈ slopesᵀz + ½ zᵀ bent z, up to a constant, with
    z = (x_t, u_t) - origin."""

    slopes: Float[Array, "nz nx"]
    bent: Float[Array, "nz nz nx"]
    origin: Float[Array, " nz"]

    @property
    def A(self) -> Float[Array, "nx nx"]:
        """Of ∂f/∂x, at the origin."""
        return self.slopes[: self.slopes.shape[1]].T

    @property
    def B(self) -> Float[Array, "nx nu"]:
        """Of ∂f/∂u, at the origin."""
        return self.slopes[self.slopes.shape[1] :].T

    def along(self, xs: Array, us: Array) -> tuple[Float[Array, "T nx nx"], Float[Array, "T nx nu"]]:
        """Of ∂f/∂x and ∂f/∂u along a rollout."""
        z = jnp.concatenate([xs[:-1], us], 1) - self.origin
        lacking = self.slopes.T + jnp.einsum("ijx,tj->txi", self.bent, z)
        return lacking[..., : xs.shape[1]], lacking[..., xs.shape[1] :]


class AbstractMethod(eqx.Module):
    """Where to go next."""

    def perturbation(self, v: Vector) -> Vector | None:
        """Where a second rollout is made, relative to θ, for a random v of length 1; None: nowhere."""
        return None

    def slope(self, merit: Scalar, there: Scalar) -> Scalar:
        """What the two rollouts tell."""
        return jnp.zeros_like(merit)

    def init(self, flat: Vector) -> Any:
        """Memory before the first step."""
        raise NotImplementedError

    def look(
        self, objective: Objective, flat: Vector, build: Callable, rollout: Rollout, along: Feedback, change: "Change"
    ) -> Any:
        """What of the derivatives at a new θ is kept."""
        raise NotImplementedError

    def takes(self, before: Score, after: Score, memory: Any) -> Bool[Array, ""]:
        """Whether a candidate takes the place of θ; one whose merit is not finite never does."""
        return after.merit < before.merit

    def step(self, objective: Objective, now: "Now", memory: Any) -> tuple[Vector, Any]:
        """The step from θ to the next candidate, and the memory."""
        raise NotImplementedError


class Now(NamedTuple):
    """All that a step may depend on."""

    k: Int[Array, ""]
    """Number of the iteration, from 0."""
    flat: Vector
    """θ."""
    local: Any
    """Of `look` at θ."""
    score: Score
    """At θ."""
    candidate: Score
    """At the last candidate."""
    taken: Bool[Array, ""]
    """Whether that is θ."""
    v: Vector
    slope: Scalar
    change: Change


class DescentMemory(NamedTuple):
    """Of `Descent`."""

    estimator: Any
    factor: Scalar  # of the rate


class Descent(AbstractMethod):
    """θ ← θ - factor · rate(k) · scales² g, with g an estimate of the gradient.

    References: Zuliani, Balta, Lygeros, 2026, eqs. (8) to (10).
    """

    estimator: AbstractEstimator = ControlVariate()
    """Of the gradient; some need a second rollout in every iteration."""
    rate: float | Callable = eqx.field(static=True, default=1e-4)
    """A number, or rate(k)."""
    distance: float = eqx.field(static=True, default=1e-5)
    """δ of the second rollout, θ + δ scales v."""
    scales: Any = 1.0
    """Of the parameters, a number or (n,) in the order of the leaves: one unit of θ/scale is one step of all."""
    monotone: bool = eqx.field(static=True, default=True)
    """Whether a candidate that is not better is refused, and the factor halved; it grows by a fifth otherwise.
    False, as published: all are taken, and the factor stays 1."""

    def perturbation(self, v: Vector) -> Vector | None:
        """δ scales v."""
        return self.distance * self.scales * v if self.estimator.perturbs else None

    def slope(self, merit: Scalar, there: Scalar) -> Scalar:
        """(F(θ + δ scales v) - F(θ))/δ."""
        return (there - merit) / self.distance

    def init(self, flat: Vector) -> DescentMemory:
        """Nothing is known of the estimates."""
        return DescentMemory(self.estimator.init(flat), jnp.ones((), flat.dtype))

    def look(
        self, objective: Objective, flat: Vector, build: Callable, rollout: Rollout, along: Feedback, change: Change
    ) -> Vector:
        """The model-based direction (D20) of the merit."""
        dA, dB = change.along(rollout.xs, rollout.us)
        along = along._replace(A=along.A + dA, B=along.B + dB)
        slopes = jax.grad(objective.merit, (0, 1))(rollout.xs, rollout.us)
        return cost_gradient(build, flat, rollout, along, slopes)

    def takes(self, before: Score, after: Score, memory: Any) -> Bool[Array, ""]:
        """Any, if not `monotone`."""
        return after.merit < before.merit if self.monotone else jnp.asarray(True)

    def step(self, objective: Objective, now: Now, memory: DescentMemory) -> tuple[Vector, DescentMemory]:
        """Against the estimate."""
        g, kept = self.estimator(now.k, self.scales * now.local, now.v, now.slope, memory.estimator)
        factor = memory.factor
        if self.monotone:
            factor = jnp.where(now.taken, jnp.minimum(1.2 * factor, 1e6), 0.5 * factor)
            factor = jnp.where(now.k == 0, 1.0, factor)
        rate = self.rate(now.k) if callable(self.rate) else self.rate
        return -factor * rate * self.scales * g, DescentMemory(kept, factor)


class Damping(NamedTuple):
    """Memory of `GaussNewton`."""

    damping: Scalar
    sizes: Vector  # largest diagonal of the Hessian so far
    merit: Scalar  # before the last step
    decrease: Scalar  # that it promised
    refused: Int[Array, ""]  # candidates in a row
    kicked: Bool[Array, ""]  # whether the last step was one at random


class GaussNewton(AbstractMethod):
    """The step δ that minimises  gᵀδ + ½ δᵀ(H + λD)δ + penalty · Σ max(h + Jδ, 0),  all of the model.

    H = (∂τ/∂θ)ᵀ ∂²C/∂τ² (∂τ/∂θ) over the trajectory τ = (x, u), D the largest diagonal of H so far. A candidate that is
    not better is refused and λ grows; λ falls where the model predicts well. Where the set of active rows changes the
    policy has kinks, at which no step may be taken any more: after `patience` refusals in a row θ moves at random, each
    parameter by `kick` of its size or so, and goes on from there if the merit has not grown by more than a quarter.
    """

    damping: float = eqx.field(static=True, default=1e-1)
    """λ at first."""
    patience: int = eqx.field(static=True, default=4)
    """Refusals in a row before a step at random; 0: there is none."""
    kick: float = eqx.field(static=True, default=0.02)
    """Size of that step, relative to the parameters."""
    capacity: int = eqx.field(static=True, default=400)
    """Rows that a step looks at: those with the largest h."""

    def init(self, flat: Vector) -> Damping:
        """λ, and nothing known."""
        nothing = jnp.zeros((), flat.dtype)
        never = jnp.asarray(False)
        return Damping(nothing + self.damping, jnp.zeros_like(flat), nothing, nothing, jnp.asarray(0), never)

    def takes(self, before: Score, after: Score, memory: Damping) -> Bool[Array, ""]:
        """Only if it is better, or not much worse after a step at random."""
        return after.merit < before.merit + jnp.where(memory.kicked, 0.25 * jnp.abs(before.merit), 0.0)

    def look(
        self, objective: Objective, flat: Vector, build: Callable, rollout: Rollout, along: Feedback, change: Change
    ) -> Answer:
        """Derivatives of all that the sensitivities of the trajectory are made of."""
        direct = policy_jacobian(build, flat, rollout, along)
        return Answer(rollout.xs, rollout.us, along.A, along.B, along.K, direct)

    def step(self, objective: Objective, now: Now, memory: Damping) -> tuple[Vector, Damping]:
        """By one quadratic program."""
        g, H, h, J = _quadratic(objective, now.local, now.change, self.capacity)
        refused = jnp.where(now.taken, 0, memory.refused + 1)
        kicked = (self.patience > 0) & (refused >= max(self.patience, 1))
        sizes = jnp.maximum(memory.sizes, jnp.diagonal(H))
        damping = jnp.where(kicked | memory.kicked, self.damping, _next_damping(now, memory))
        curvature = H + jnp.diag(damping * sizes + (1e-6 * damping + 1e-9) * jnp.max(sizes))
        scale = 1.0 / jnp.sqrt(jnp.diagonal(curvature))
        step, decrease = _penalised_qp(scale * g, scale[:, None] * curvature * scale, h, J * scale, objective.penalty)
        random = self.kick * jnp.sqrt(now.v.size) * (jnp.abs(now.flat) + 0.1 * jnp.mean(jnp.abs(now.flat))) * now.v
        step = scale * step
        step = jnp.where(kicked, random, jnp.where(jnp.isfinite(step), step, 0.0))
        return step, Damping(damping, sizes, now.score.merit, decrease, jnp.where(kicked, 0, refused), kicked)


def _next_damping(now: Now, memory: Damping) -> Scalar:
    """λ grows after a candidate that was refused or much worse than promised, and falls after one that was as promised,
    though not right after a refusal, which would only be repeated."""
    share = (memory.merit - now.candidate.merit) / jnp.maximum(memory.decrease, jnp.finfo(now.flat.dtype).tiny)
    factor = jnp.where(share > 0.75, jnp.where(memory.refused == 0, 0.2, 1.0), jnp.where(share < 0.25, 2.0, 1.0))
    factor = jnp.where(now.k == 0, 1.0, jnp.where(now.taken, factor, 5.0))
    return jnp.clip(factor * memory.damping, 1e-8, 1e8)


class _QP(NamedTuple):
    """Parameters of a problem of one stage."""

    g: Vector
    H: Float[Array, "n n"]
    h: Float[Array, " m"]
    J: Float[Array, "m n"]


def _quadratic(objective: Objective, answer: Answer, change: Change, capacity: int) -> tuple[Array, ...]:
    """Gradient and Gauss-Newton Hessian of the cost in θ, and the rows with the largest values and their Jacobian."""
    xs, us, A, B, K, direct = answer
    dA, dB = change.along(xs, us)
    tangents = sensitivities(A + dA, B + dB, K, direct)
    by_theta = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, -1, 0), tangents)
    slopes = jax.grad(objective.cost, (0, 1))
    g, bent = jax.vmap(lambda tangent: jax.jvp(lambda *at: (objective.cost(*at), slopes(*at)), (xs, us), tangent)[1])(
        by_theta
    )
    H = jnp.einsum("itx,jtx->ij", by_theta[0], bent[0]) + jnp.einsum("itu,jtu->ij", by_theta[1], bent[1])
    if objective.rows is None:
        return g, H, jnp.zeros(0, g.dtype), jnp.zeros((0, g.size), g.dtype)
    rows = lambda *at: objective.rows(*at).ravel()  # pyright: ignore
    h, J = rows(xs, us), jax.vmap(lambda tangent: jax.jvp(rows, (xs, us), tangent)[1])(by_theta).T
    largest = jax.lax.top_k(h, min(capacity, h.size))[1]
    return g, 0.5 * (H + H.T), h[largest], J[largest]


def _penalised_qp(g: Array, H: Array, h: Array, J: Array, penalty: float) -> tuple[Vector, Scalar]:
    """The minimiser of gᵀδ + ½ δᵀHδ + penalty Σ max(h + Jδ, 0), and how far it lies below δ = 0."""
    value = lambda d: g @ d + 0.5 * d @ H @ d + penalty * jnp.sum(jnp.maximum(h + J @ d, 0.0))
    problem = Problem(
        dynamics=lambda x, u, k, qp: x,
        stage_cost=lambda x, u, k, qp: qp.g @ u + 0.5 * u @ qp.H @ u,
        terminal_cost=lambda x, qp: 0.5 * x @ x,
        horizon=1, u_min=jnp.full(g.size, -jnp.inf), u_max=jnp.full(g.size, jnp.inf),
        constraints=lambda x, u, k, qp: qp.h + qp.J @ u if h.size else None,
        softening=Softening(penalty, 0.0),
    )  # fmt: skip
    sol = solve(problem, _QP(g, H, h, J), jnp.zeros(1, g.dtype), solver=SQP(tol=1e-7), throw=False)
    step = jnp.where(jnp.isfinite(sol.us[0]), sol.us[0], 0.0)
    return step, value(jnp.zeros_like(g)) - value(step)
