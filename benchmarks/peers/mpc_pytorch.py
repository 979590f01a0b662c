"""mpc.pytorch (`mpc` 0.0.6): box-constrained iLQR on whole batches, and its derivative.

mpc.pytorch counts T states and T controls and its last control moves nothing. Here T = N + 1: the last
control costs 1/2 |u - u_ref|^2_r alone, its optimum is u_ref, and it is dropped from the answer: the problem
is the same. It has bounds on the control only. `util.bdiag` is replaced at import: it indexes with bytes,
which torch 2 takes as integers, and the backward pass does not run with it.
"""

import contextlib
import functools
import io
import time

import numpy as np

from peers import Gradient, PeerUnavailable, Trajectories
from problems import Problem, linear_matrices

try:
    import torch
    from mpc import util
    from mpc.mpc import MPC, GradMethods, LinDx, QuadCost
except ImportError as error:
    raise PeerUnavailable(f"mpc.pytorch cannot be imported: {error}") from error

util.bdiag = torch.diag_embed


class MPCPytorch:
    """mpc.pytorch on one problem; a linear one is given as its `LinDx`, the others as a module.

    Args:
        eps: It stops when no full step is longer than this (its own examples use 1e-2 to 1e-4).
        max_steps: Limit on iLQR iterations.
        decay, max_line_search: Step lengths tried are decay^i, i < max_line_search.
        tolerance: On the projected gradient, below which a sample counts as converged. Its own criterion
            mixes the samples of a batch (`full_du_norm` is a view across them): one of them spoils all.
        grad_method: Jacobians of the dynamics one row and stage at a time ("AUTO_DIFF", as in its authors'
            experiments), or all at once by `torch.func` ("ANALYTIC", some twice as fast).
        threads: Threads of torch, for the whole process.
    """

    def __init__(
        self,
        problem: Problem,
        eps: float = 1e-7,
        max_steps: int = 100,
        decay: float = 0.2,
        max_line_search: int = 10,
        tolerance: float = 1e-5,
        grad_method: str = "AUTO_DIFF",
        threads: int = 1,
    ):
        if problem.x_max is not None:
            raise PeerUnavailable("mpc.pytorch has no bounds on the state")
        start = time.perf_counter()
        torch.set_num_threads(threads)
        self.name = "mpc.pytorch"
        self.problem, self.tolerance = problem, tolerance
        self.qp_failures = 0  # box QPs given up after 20 Newton steps, over all calls
        self._cost = _quadratic_cost(problem)
        self._options = {
            "lqr_iter": max_steps,
            "eps": eps,
            "back_eps": eps,
            "linesearch_decay": decay,
            "max_linesearch_iter": max_line_search,
            "grad_method": GradMethods[grad_method],
            "exit_unconverged": False,
            "detach_unconverged": False,
            "verbose": -1,
        }
        self.setup_seconds = time.perf_counter() - start

    def solve(self, x0s: np.ndarray, thetas: np.ndarray, guess: tuple | None = None) -> Trajectories:
        """Solve the batch at once; of a guess it takes the controls only."""
        _, _, trajectories = self._forward(x0s, torch.tensor(thetas), guess)
        return trajectories

    def gradient(self, x0s: np.ndarray, thetas: np.ndarray, guess: tuple | None = None) -> Gradient:
        """The derivative that mpc.pytorch computes, also where it did not converge."""
        parameters = torch.tensor(thetas, requires_grad=True)
        xs, us, trajectories = self._forward(x0s, parameters, guess)
        start = time.perf_counter()
        with self._counting_failures():
            (xs.square().sum() + us.square().sum()).backward()
        return Gradient(parameters.grad.numpy(), trajectories, time.perf_counter() - start)

    def _forward(self, x0s: np.ndarray, thetas: torch.Tensor, guess: tuple | None):
        """The solution as tensors, without the last control, and as numpy arrays."""
        problem, batch, n = self.problem, len(x0s), self.problem.horizon
        start = time.perf_counter()
        u_ref = torch.tensor(problem.u_ref)
        u_init = u_ref.expand(n + 1, batch, problem.nu).clone()
        if guess is not None:
            u_init[:n] = torch.tensor(guess[1]).transpose(0, 1)
        box = [torch.tensor(bound).expand(n + 1, batch, problem.nu) for bound in (problem.u_min, problem.u_max)]
        solver = _CountingMPC(problem.nx, problem.nu, n + 1, *box, u_init=u_init, n_batch=batch, **self._options)
        with self._counting_failures():
            xs, us, _ = solver(torch.tensor(x0s), self._cost, _dynamics(problem, thetas))
        seconds = time.perf_counter() - start
        us = us[:n]
        trajectories = Trajectories(
            xs=xs.detach().transpose(0, 1).numpy(),
            us=us.detach().transpose(0, 1).numpy(),
            iterations=np.full(batch, solver.iterations),
            converged=self._projected_gradient(x0s, us.detach(), thetas.detach()) < self.tolerance,
            seconds=seconds,
        )
        return xs, us, trajectories

    def _projected_gradient(self, x0s: np.ndarray, us: torch.Tensor, thetas: torch.Tensor) -> np.ndarray:
        """(batch,) largest entry of |u - clip(u - dJ/du)|, u (N, batch, nu), J the cost of the rollout."""
        problem, us = self.problem, us.clone().requires_grad_()
        C, c = self._cost
        dynamics, x, total = _Dynamics(problem, thetas), torch.tensor(x0s), 0.0
        for k, u in enumerate([*us, torch.tensor(problem.u_ref).expand(len(x0s), -1)]):
            tau = torch.cat([x, u], dim=-1)
            total = total + (0.5 * tau @ C[k] * tau + tau * c[k]).sum()
            x = dynamics(x, u)
        (slope,) = torch.autograd.grad(total, us)
        move = us - (us - slope).clamp(torch.tensor(problem.u_min), torch.tensor(problem.u_max))
        return move.detach().abs().amax(dim=(0, 2)).numpy()

    @contextlib.contextmanager
    def _counting_failures(self):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            yield
        self.qp_failures += printed.getvalue().count("pnqp warning")


class _CountingMPC(MPC):
    """MPC that counts its iterations, which it otherwise keeps to itself."""

    iterations = 0

    def solve_lqr_subproblem(self, *args, no_op_forward=False, **kwargs):
        self.iterations += not no_op_forward
        return super().solve_lqr_subproblem(*args, no_op_forward=no_op_forward, **kwargs)


class _Dynamics(torch.nn.Module):
    """`Problem.step` on a batch of states and controls, each sample with its own parameters."""

    def __init__(self, problem: Problem, thetas: torch.Tensor):
        super().__init__()
        self.problem, self.thetas = problem, thetas

    def forward(self, x: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        thetas = self.thetas.repeat(len(x) // len(self.thetas), 1)
        return _step(self.problem, x, u, thetas)

    def grad_input(self, x: torch.Tensor, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Jacobians in x and u of all stages and samples at once."""
        thetas = self.thetas.repeat(len(x) // len(self.thetas), 1)
        jacobian = torch.func.jacrev(functools.partial(_step, self.problem), argnums=(0, 1))
        return torch.func.vmap(jacobian)(x, u, thetas)


def _step(problem: Problem, x: torch.Tensor, u: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
    return torch.stack(problem.step(x.unbind(-1), u.unbind(-1), theta.unbind(-1), torch), dim=-1)


def _dynamics(problem: Problem, thetas: torch.Tensor):
    if not problem.is_linear:
        return _Dynamics(problem, thetas)
    stage = torch.cat(linear_matrices(problem, thetas), dim=-1)
    return LinDx(stage.expand(problem.horizon, *stage.shape), None)


def _quadratic_cost(problem: Problem) -> QuadCost:
    """1/2 tau' C tau + c' tau for every stage, tau = (x, u); the state reference must not depend on theta."""
    n, nx = problem.horizon, problem.nx
    weights = np.tile(np.concatenate([problem.q, problem.r]), (n + 1, 1))
    weights[n, :nx] = problem.q_terminal
    reference = np.concatenate([problem.x_ref(problem.theta), problem.u_ref])
    weights = torch.tensor(weights)
    return QuadCost(torch.diag_embed(weights), -weights * torch.tensor(reference))
