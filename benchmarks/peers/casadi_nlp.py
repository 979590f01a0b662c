"""CasADi with IPOPT or fatrop: multiple shooting with exact second derivatives, one sample after another.

The variables are x_0, u_0, x_1, u_1, ..., x_N and the constraints of a stage follow its dynamics; that is the
order in which fatrop finds the stages by itself.
"""

import shutil
import time

import numpy as np

from peers import PeerUnavailable, Trajectories
from problems import Problem

try:
    import casadi as ca
except ImportError as error:
    raise PeerUnavailable(f"casadi cannot be imported: {error}") from error


def step_function(problem: Problem) -> ca.Function:
    """`Problem.step` as a function (x, u, theta) -> x_next."""
    x, u, theta = (ca.SX.sym(s, n) for s, n in (("x", problem.nx), ("u", problem.nu), ("p", len(problem.theta))))
    step = problem.step(ca.vertsplit(x), ca.vertsplit(u), ca.vertsplit(theta), ca)
    return ca.Function("step", [x, u, theta], [ca.vertcat(*step)])


class CasadiNLP:
    """IPOPT or fatrop on the multiple-shooting problem; with `jit`, its functions are compiled by gcc -O2."""

    def __init__(
        self,
        problem: Problem,
        plugin: str = "ipopt",
        jit: bool = False,
        tolerance: float = 1e-8,
        max_steps: int = 500,
    ):
        if not ca.has_nlpsol(plugin):
            raise PeerUnavailable(f"casadi {ca.__version__} has no plugin {plugin!r}; reinstall it after acados")
        if jit and shutil.which("gcc") is None:
            raise PeerUnavailable("casadi's jit needs gcc")
        start = time.perf_counter()
        self.name = f"CasADi {plugin}" + (" (jit)" if jit else "")
        self.problem = problem
        nlp, self._lower, self._upper, equality = _transcribe(problem)
        options = {
            f"{plugin}.tol": tolerance,
            f"{plugin}.max_iter": max_steps,
            f"{plugin}.print_level": 0,
            "print_time": False,
            "expand": not jit,
        }
        if plugin == "ipopt":
            options |= {"ipopt.sb": "yes", "ipopt.bound_relax_factor": 0.0}
        if plugin == "fatrop":
            options |= {"structure_detection": "auto", "equality": equality}
        if jit:
            options |= {
                "jit": True,
                "compiler": "shell",
                "jit_options": {"compiler": "gcc", "flags": ["-O2"], "verbose": False},
            }
        self._solver = ca.nlpsol("solver", plugin, nlp, options)
        self.setup_seconds = time.perf_counter() - start

    def solve(self, x0s: np.ndarray, thetas: np.ndarray, guess: tuple | None = None) -> Trajectories:
        """Solve sample by sample; without a guess, from x_k = x_0 and u_k = u_ref."""
        problem, batch = self.problem, len(x0s)
        n, nx = problem.horizon, problem.nx
        if guess is None:
            xs, us = np.repeat(x0s[:, None], n + 1, axis=1), np.tile(problem.u_ref, (batch, n, 1))
        else:
            xs, us = guess
        starts = np.concatenate([np.concatenate([xs[:, :-1], us], axis=2).reshape(batch, -1), xs[:, -1]], axis=1)
        solutions, stats, seconds = [], [], 0.0
        for x0, theta, start in zip(x0s, thetas, starts, strict=True):
            begin = time.perf_counter()
            solution = self._solver(x0=start, p=np.concatenate([x0, theta]), lbg=self._lower, ubg=self._upper)
            seconds += time.perf_counter() - begin
            solutions.append(np.asarray(solution["x"]).ravel())
            stats.append(self._solver.stats())
        w = np.stack(solutions)
        stages = w[:, :-nx].reshape(batch, n, nx + problem.nu)
        return Trajectories(
            xs=np.concatenate([stages[:, :, :nx], w[:, None, -nx:]], axis=1),
            us=stages[:, :, nx:],
            iterations=np.array([stat["iter_count"] for stat in stats]),
            converged=np.array([stat["success"] for stat in stats]),
            seconds=seconds,
        )


def _transcribe(problem: Problem) -> tuple[dict, np.ndarray, np.ndarray, list[bool]]:
    """The nonlinear program, bounds on its constraints, and which of these are equalities."""
    n, nx, nu, step = problem.horizon, problem.nx, problem.nu, step_function(problem)
    x0, theta = ca.MX.sym("x0", nx), ca.MX.sym("theta", len(problem.theta))
    xs = [ca.MX.sym(f"x{k}", nx) for k in range(n + 1)]
    us = [ca.MX.sym(f"u{k}", nu) for k in range(n)]
    bounded = [] if problem.x_max is None else list(np.flatnonzero(np.isfinite(problem.x_max)))
    g, lower, upper = [], [], []

    def constrain(expression, low, high):
        g.append(expression)
        lower.append(np.broadcast_to(low, expression.numel()))
        upper.append(np.broadcast_to(high, expression.numel()))

    for k in range(n + 1):
        if k < n:
            constrain(xs[k + 1] - step(xs[k], us[k], theta), 0.0, 0.0)
        if k == 0:
            constrain(xs[0] - x0, 0.0, 0.0)
        if k < n:
            constrain(us[k], problem.u_min, problem.u_max)
        if k > 0 and bounded:
            constrain(xs[k][bounded], -problem.x_max[bounded], problem.x_max[bounded])

    low, high = np.concatenate(lower), np.concatenate(upper)
    variables = [v for k in range(n) for v in (xs[k], us[k])] + [xs[n]]
    nlp = {
        "x": ca.vertcat(*variables),
        "p": ca.vertcat(x0, theta),
        "f": _cost(problem, xs, us, theta),
        "g": ca.vertcat(*g),
    }
    return nlp, low, high, list(low == high)


def _cost(problem: Problem, xs: list, us: list, theta: ca.MX) -> ca.MX:
    """The cost of the module docstring of `problems`, as an expression."""
    x_ref = ca.vertcat(*problem.x_ref(np.array(ca.vertsplit(theta), dtype=object)))

    def half_square(vector, weights):
        return 0.5 * ca.dot(ca.DM(weights), vector**2)

    total = problem.offset + half_square(xs[-1] - x_ref, problem.q_terminal)
    for x, u in zip(xs[:-1], us, strict=True):
        total += half_square(x - x_ref, problem.q) + half_square(u - problem.u_ref, problem.r)
    return total
