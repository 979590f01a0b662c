"""Times of mpc.pytorch, where `mpc` and `torch` are installed: it is a peer, not a dependency.

It counts as many states as controls, so that N stages are N + 1 of its own, the last one without effect on a state.
"""

import contextlib
import io
import time

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from mpc import util  # pyright: ignore[reportMissingImports]
from mpc.mpc import MPC, GradMethods, QuadCost  # pyright: ignore[reportMissingImports]

from sartor.systems import pendulum

util.bdiag = torch.diag_embed  # its own indexes with bytes, which torch 2 takes as integers


class _Pendulum(torch.nn.Module):
    """The swing-up of `sartor.systems.pendulum`, as mpc.pytorch wants it."""

    def __init__(self, thetas: torch.Tensor):
        super().__init__()
        self.thetas = thetas

    def forward(self, x: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        g, m, l = self.thetas.unbind(1)
        count = x.shape[0] // g.shape[0]  # it stacks stages along the batch
        g, m, l = (p.repeat(count) for p in (g, m, l))
        torque = u[:, 0].clamp(-2.0, 2.0)
        rate = x[:, 2] + pendulum.DT * (1.5 * g / l * x[:, 1] + 3.0 * torque / (m * l**2))
        angle = torch.atan2(x[:, 1], x[:, 0]) + pendulum.DT * rate
        return torch.stack([torch.cos(angle), torch.sin(angle), rate], 1)

    def grad_input(self, x: torch.Tensor, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Jacobians of all stages at once: its faster way."""
        one = lambda x, u, thetas: _Pendulum(thetas[None])(x[None], u[None])[0]
        thetas = self.thetas.repeat(x.shape[0] // self.thetas.shape[0], 1)
        return torch.func.vmap(torch.func.jacrev(one, (0, 1)))(x, u, thetas)


def timed(x0s: np.ndarray, thetas: np.ndarray, iterations: int, horizon: int, repeats: int) -> dict[str, float]:
    """Medians of the time of a solve, and of one with its gradient [s]."""
    stages, batch = horizon + 1, len(x0s)
    weights = torch.tensor([*pendulum.WEIGHTS, pendulum.PENALTY], dtype=torch.float64)
    C = torch.diag(weights).expand(stages, batch, 4, 4).contiguous()
    c = torch.zeros(stages, batch, 4, dtype=torch.float64)
    c[:, :, 0] = -pendulum.WEIGHTS[0]
    limit = torch.full((stages, batch, 1), 2.0, dtype=torch.float64)
    controller = MPC(
        3, 1, stages, u_lower=-limit, u_upper=limit, lqr_iter=iterations, grad_method=GradMethods.ANALYTIC, eps=1e-9,
        exit_unconverged=False, detach_unconverged=False, verbose=-1,
    )  # fmt: skip
    start, solves, gradients = torch.tensor(x0s), [], []
    for _ in range(repeats + 1):
        parameters = torch.tensor(thetas, requires_grad=True)
        with contextlib.redirect_stdout(io.StringIO()):
            begun = time.perf_counter()
            _, us, _ = controller(start, QuadCost(C, c), _Pendulum(parameters))
            solved = time.perf_counter()
            us.square().sum().backward()
        gradients.append(time.perf_counter() - begun)
        solves.append(solved - begun)
    return {"solve": float(np.median(solves[1:])), "both": float(np.median(gradients[1:]))}
