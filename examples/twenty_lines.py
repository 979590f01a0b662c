"""Plan with bounds for a cart of unknown mass, differentiate the plan, and ask which prediction errors matter."""

import jax
import jax.numpy as jnp

import sartor

jax.config.update("jax_enable_x64", True)


def dynamics(x, u, k, theta):  # a cart with unknown mass, 0.1 s
    return jnp.array([x[0] + 0.1 * x[1], x[1] + 0.1 * u[0] / theta])


problem = sartor.Problem(
    dynamics=dynamics,
    stage_cost=lambda x, u, k, theta: x @ x + 0.1 * u @ u,
    terminal_cost=lambda x, theta: 10.0 * x @ x,
    horizon=20,
    u_min=[-1.0],
    u_max=[1.0],
)
x0s = jnp.array([[1.0, 0.0], [2.0, 0.0], [0.0, 3.0]])
plan = lambda mass, x0: sartor.solve(problem, mass, x0).us
print(jax.vmap(plan, (None, 0))(1.0, x0s)[:, 0])  # first controls
print(jax.jacrev(plan)(jnp.array(1.0), x0s[0])[:3, 0])  # how the plan answers to the mass
print(sartor.label(problem, 1.0, x0s[0]).S[:3])  # what errors of the prediction matter
