"""Other solvers of the same problems, with numpy arrays in and out.

Every peer is constructed once for a `problems.Problem` and then has

    name                                what to print in a table
    setup_seconds                       time of its construction, code generation and compilation included
    solve(x0s, thetas, guess=None)      -> Trajectories, for x0s (batch, nx) and thetas (batch, ntheta)

with `guess` a pair (xs, us), and where it can differentiate

    gradient(x0s, thetas, guess=None)   -> Gradient of sum(xs^2) + sum(us^2) in thetas, sample by sample.

Without a guess a solver starts from u_ref, and from x_k = x_0 where it needs states. Importing a module of
this package raises `PeerUnavailable` where its solver is not installed, and so may constructing a peer.

To install them, in this order (mpc asks for numpy < 2 and runs with 2; the acados wheel brings a casadi
without solvers that overwrites the real one, which therefore comes last):

    uv pip install torch==2.13.0 comma-deps-acados
    uv pip install --no-deps mpc==0.0.6
    uv pip install --reinstall-package casadi casadi
"""

from typing import NamedTuple

import numpy as np


class PeerUnavailable(Exception):
    """The peer cannot be used here; the message says why."""


class Trajectories(NamedTuple):
    """Solutions of a batch."""

    xs: np.ndarray
    """(batch, N+1, nx) states."""
    us: np.ndarray
    """(batch, N, nu) controls."""
    iterations: np.ndarray
    """(batch,) iterations of the outermost loop."""
    converged: np.ndarray
    """(batch,) whether the solver says that its tolerance is reached."""
    seconds: float
    """Time inside the solver, without the copying of data in and out."""


class Gradient(NamedTuple):
    """Derivative of the loss sum(xs^2) + sum(us^2) of each sample."""

    thetas: np.ndarray
    """(batch, ntheta) derivative in the parameters."""
    trajectories: Trajectories
    """The solutions; `seconds` is the time of the forward pass."""
    backward_seconds: float
    """Time of the backward pass."""
