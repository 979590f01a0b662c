"""A cart-pole on which mpc.pytorch's gradient is wrong.

The loss is sum(xs^2) + sum(us^2), the gradient that in (g, m_cart, m_pole, half pole). The exact one comes
from differences of solutions that IPOPT converges to 1e-12, and mpc.pytorch is started from that solution.
Its backward pass drops the second derivatives of the dynamics in state and control and, with its own
Jacobians (AUTO_DIFF), also the mixed ones with the parameters.

    python benchmarks/cartpole_gradient.py
"""

import numpy as np

from peers.casadi_nlp import CasadiNLP
from peers.mpc_pytorch import MPCPytorch
from problems import cartpole, rollout

ANGLE, RATE = 2.5, 1.0  # [rad] from upright, [rad/s]


def exact_gradient(solver: CasadiNLP, x0: np.ndarray, theta: np.ndarray, guess: tuple) -> np.ndarray:
    """Central differences of fourth order of the loss at the solution, steps of 1e-4 of each parameter."""
    gradient = np.zeros_like(theta)
    for i, h in enumerate(1e-4 * theta):
        offsets = h * np.array([-2, -1, 1, 2])[:, None] * np.eye(len(theta))[i]
        solution = solver.solve(np.tile(x0, (4, 1)), theta + offsets, [np.repeat(g, 4, axis=0) for g in guess])
        losses = np.sum(solution.xs**2, axis=(1, 2)) + np.sum(solution.us**2, axis=(1, 2))
        gradient[i] = losses @ np.array([1, -8, 8, -1]) / (12 * h)
    return gradient


def main() -> None:
    problem = cartpole()
    x0 = np.array([0.0, 0.0, np.cos(ANGLE), np.sin(ANGLE), RATE])
    us = np.zeros((1, problem.horizon, 1))
    ipopt = CasadiNLP(problem, "ipopt", tolerance=1e-12)
    solution = ipopt.solve(x0[None], problem.theta[None], (rollout(problem, x0[None], us, problem.theta), us))
    guess = solution.xs, solution.us
    rows = {"exact (differences)": exact_gradient(ipopt, x0, problem.theta, guess)}
    for method in ("AUTO_DIFF", "ANALYTIC"):
        gradient = MPCPytorch(problem, grad_method=method).gradient(x0[None], problem.theta[None], guess)
        rows[f"mpc.pytorch {method}"] = gradient.thetas[0]
    print(f"x0 = {x0.tolist()}, theta = {problem.theta.tolist()}, N = {problem.horizon}")
    print(f"{'':24s}{'g':>12s}{'m_cart':>12s}{'m_pole':>12s}{'half pole':>12s}{'norm':>12s}")
    for name, row in rows.items():
        print(f"{name:24s}" + "".join(f"{value:12.4f}" for value in (*row, np.linalg.norm(row))))


if __name__ == "__main__":
    main()
