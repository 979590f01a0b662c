"""sartor on the problems of `problems`: the interface of the peers, and what only we can report.

Every function is compiled ahead of time for one batch size, so that compiling and running are timed apart. The
derivative is that of sum(xs^2) + sum(us^2) in theta, as for the peers.
"""

import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import sartor
from peers import Gradient, Trajectories
from problems import Problem, linear_matrices
from sartor import systems

jax.config.update("jax_enable_x64", True)


class Compiled(NamedTuple):
    """A compiled function, and what compiling it took."""

    call: Callable
    first_seconds: float
    """Tracing, lowering and compiling."""
    cpu_seconds: float
    """The same as processor time of this process: other load on the machine changes it little."""
    bytes: int
    """Arguments, results and temporaries, as the compiler plans them."""


class Sartor:
    """One solver of sartor on one problem."""

    def __init__(
        self,
        problem: Problem,
        solver: Any,
        name: str | None = None,
        derivative: Literal["implicit", "unroll"] = "implicit",
    ):
        start = time.perf_counter()
        self.name = name or f"sartor {type(solver).__name__}"
        self.problem, self.ocp, self.to_theta = problem, *as_sartor(problem)
        self._options = {"solver": solver, "derivative": derivative, "throw": False}
        self._compiled: dict[tuple, Compiled] = {}
        self.setup_seconds = time.perf_counter() - start

    def solve(self, x0s: np.ndarray, thetas: np.ndarray, guess: tuple | None = None) -> Trajectories:
        """Solve the batch; see `peers`."""
        sol, seconds = self.timed("forward", x0s, thetas, guess)
        return _trajectories(sol, seconds)

    def gradient(self, x0s: np.ndarray, thetas: np.ndarray, guess: tuple | None = None) -> Gradient:
        """Solution and derivative; the time of the backward pass is the difference to a solve without it."""
        _, alone = self.timed("forward", x0s, thetas, guess)
        (sol, slopes), both = self.timed("both", x0s, thetas, guess)
        return Gradient(np.asarray(slopes), _trajectories(sol, alone), both - alone)

    def timed(self, kind: Literal["forward", "both"], x0s: Any, thetas: Any, guess: Any = None) -> tuple[Any, float]:
        """The result of the compiled function, and its time with the data already on the device."""
        inputs = jax.block_until_ready(_on_device(x0s, thetas, guess))
        call = self.compiled(kind, x0s, thetas, guess).call
        start = time.perf_counter()
        result = jax.block_until_ready(call(*inputs))
        return result, time.perf_counter() - start

    def compiled(self, kind: Literal["forward", "both"], x0s: Any, thetas: Any, guess: Any = None) -> Compiled:
        """`forward` gives solutions, `both` solutions and derivatives; compiled once for each batch size."""
        key = kind, len(x0s), guess is None
        if key not in self._compiled:
            function = self._solve_one if kind == "forward" else jax.grad(self._loss, argnums=1, has_aux=True)
            if kind == "both":
                function = _swap(function)
            self._compiled[key] = compile_ahead(jax.vmap(function), *_on_device(x0s, thetas, guess))
        return self._compiled[key]

    def _solve_one(self, x0: jax.Array, p: jax.Array, guess: tuple | None) -> sartor.Solution:
        start = None if guess is None else sartor.guess(*guess)
        return sartor.solve(self.ocp, self.to_theta(p), x0, guess=start, **self._options)

    def _loss(self, x0: jax.Array, p: jax.Array, guess: tuple | None) -> tuple[jax.Array, sartor.Solution]:
        sol = self._solve_one(x0, p, guess)
        return jnp.sum(sol.xs**2) + jnp.sum(sol.us**2), sol


def as_sartor(problem: Problem) -> tuple[sartor.Problem, Callable]:
    """The same problem out of `sartor.systems`, and the map from the vector theta to its parameters."""
    if problem.is_linear:
        ocp = systems.linear.problem(problem.horizon, nu=problem.nu)
        return ocp, lambda p: systems.linear.Theta(*linear_matrices(problem, p))
    system = systems.SYSTEMS[problem.name]
    if problem.name == "quadrotor":
        return system.problem(problem.horizon), lambda p: system.Theta(*p[:4], goal=p[4:])
    return system.problem(problem.horizon), lambda p: system.Theta(*p)


def compile_ahead(function: Callable, *inputs: Any) -> Compiled:
    """Trace, lower and compile for these inputs."""
    start, cpu = time.perf_counter(), time.process_time()
    call = jax.jit(function).lower(*inputs).compile()
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    plan = call.memory_analysis()
    names = ("argument_size_in_bytes", "output_size_in_bytes", "temp_size_in_bytes")
    return Compiled(call, seconds, cpu, sum(int(getattr(plan, name, 0)) for name in names))


def real_time_step(problem: Problem, max_inner_steps: int) -> Callable:
    """(x0, p, sol) -> solution of one real-time iteration from `shift(sol)`, Gauss-Newton."""
    ocp, to_theta = as_sartor(problem)
    solver = sartor.SQP(real_time=True, curvature="gauss_newton", max_inner_steps=max_inner_steps)
    return lambda x0, p, sol: sartor.solve(ocp, to_theta(p), x0, solver=solver, guess=sartor.shift(sol), throw=False)


def projected_gradient(problem: Problem, x0s: np.ndarray, us: np.ndarray, thetas: np.ndarray) -> np.ndarray:
    """(batch,) largest entry of |u - clip(u - dJ/du)| of the rolled-out controls, by the adjoint of sartor.

    It is zero exactly where the KKT conditions of a problem with bounds on controls alone hold.
    """
    ocp, to_theta = as_sartor(problem)

    def residual(x0, us, p):
        theta = to_theta(p)
        slope = jax.grad(lambda us: sartor.total_cost(ocp, theta, sartor.rollout(ocp, theta, x0, us), us))(us)
        return jnp.max(jnp.abs(us - jnp.clip(us - slope, ocp.u_min, ocp.u_max)))

    return np.asarray(jax.jit(jax.vmap(residual))(x0s, us, thetas))


def _swap(function: Callable) -> Callable:
    def swapped(*inputs):
        slope, sol = function(*inputs)
        return sol, slope

    return swapped


def _on_device(*inputs: Any) -> Any:
    return jax.tree.map(jnp.asarray, inputs)


def _trajectories(sol: sartor.Solution, seconds: float) -> Trajectories:
    xs, us, steps, good = map(np.asarray, (sol.xs, sol.us, sol.stats.num_steps, sol.successful))
    return Trajectories(xs, us, steps, good, seconds)
