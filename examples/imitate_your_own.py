"""Learn the cost of your own controller from its log: the log of a closed loop in, weights and goal out."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import sartor

jax.config.update("jax_enable_x64", True)


class Cost(NamedTuple):
    """Weights of (position - goal)², speed² and force², and the goal [m]."""

    weights: Any
    goal: Any


def dynamics(x, u, k, theta):  # a cart of 1.2 kg, 0.1 s
    return jnp.array([x[0] + 0.1 * x[1], x[1] + 0.1 * u[0] / 1.2])


def cost(x, u, k, theta):
    return theta.weights @ jnp.array([(x[0] - theta.goal) ** 2, x[1] ** 2, u[0] ** 2])


def terminal_cost(x, theta):
    return 10.0 * cost(x, jnp.zeros(1), 0, theta)


problem = sartor.Problem(
    dynamics=dynamics, stage_cost=cost, terminal_cost=terminal_cost, horizon=15, u_min=[-1.0], u_max=[1.0]
)
expert = sartor.MPC(problem, Cost(jnp.array([1.0, 0.2, 0.05]), jnp.array(0.5)))
plant = lambda x, u, k: dynamics(x, u, k, None)
logs = [sartor.simulate(plant, expert, jnp.array(x0), 25) for x0 in ([2.0, 0.0], [-1.0, 1.0], [0.0, -1.0])]

# Of a closed loop only the first control of each plan is known: the states that were measured, and what was done.
pairs = [np.stack([log.xs[:-1], log.xs[1:]], 1) for log in logs]
demonstrations = sartor.Demonstrations(np.concatenate([log.us[:, None] for log in logs]), np.concatenate(pairs))

# A cost times a number makes the same plans: the weight of the position stays 1, and the others are learned.
theta = Cost((1.0, sartor.positive(1.0), sartor.positive(1.0)), 0.0)
theta_of = lambda theta, _: Cost(jnp.stack([jnp.asarray(w) for w in theta.weights]), theta.goal)
learned = sartor.imitate(
    problem, theta, demonstrations, sartor.Learning(epochs=30, patience=5), optimiser=sartor.LevenbergMarquardt(),
    learn=lambda theta: (theta.weights[1], theta.weights[2], theta.goal), theta_of=theta_of,
)  # fmt: skip
found = sartor.values(learned.theta)
print("imitation loss:", learned.curve.train[0], "->", learned.curve.train[-1])
print("weights:", [float(w) for w in found.weights], "goal:", float(found.goal))
