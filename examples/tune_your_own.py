"""Tune your own controller on a plant that its model gets wrong: a cart-pole in MuJoCo, with friction."""

import jax
import jax.numpy as jnp
import mujoco
import numpy as np

import sartor
from sartor.systems import cartpole

jax.config.update("jax_enable_x64", True)
model = mujoco.MjModel.from_xml_string("""
<mujoco><option timestep="0.01" integrator="RK4"/><worldbody><body>
  <joint name="cart" type="slide" axis="1 0 0" frictionloss="1.0" damping="1.0"/>
  <geom type="box" size=".1 .1 .1" mass="1"/>
  <body>
    <joint name="pole" axis="0 1 0" damping="0.02"/>
    <geom type="capsule" size=".01" fromto="0 0 0 0 0 1" mass="0.1"/>
  </body>
</body></worldbody><actuator><motor joint="cart"/></actuator></mujoco>""")
data = mujoco.MjData(model)
START = np.array([0.3, 0.0, np.cos(0.1), np.sin(0.1), 0.0])  # position, speed, cos and sin of the angle, its rate


def plant(x, u, k):  # one step of 0.05 s; a new run begins at k = 0
    if k == 0:
        mujoco.mj_resetData(model, data)
        data.qpos[:], data.qvel[:] = [x[0], np.arctan2(x[3], x[2])], [x[1], x[4]]
    data.ctrl[:] = u
    mujoco.mj_step(model, data, 5)
    (p, angle), (v, rate) = data.qpos, data.qvel
    return np.array([p, v, np.cos(angle), np.sin(angle), rate])


def cost(xs, us):  # what counts: where the cart is, that the pole stands, and little force
    return jnp.sum(xs[:, 0] ** 2) + 20.0 * jnp.sum(1.0 - xs[:, 2]) + 1e-3 * jnp.sum(us**2)


def stage_cost(x, u, k, weights):
    return weights @ jnp.array([x[0] ** 2, x[1] ** 2, 1.0 - x[2], x[4] ** 2, u[0] ** 2])


mpc = sartor.MPC(
    sartor.Problem(
        dynamics=lambda x, u, k, weights: cartpole.dynamics(x, u, k, cartpole.default_theta()),
        stage_cost=stage_cost, terminal_cost=lambda x, weights: 10.0 * stage_cost(x, jnp.zeros(1), 0, weights),
        horizon=25, u_min=[-20.0], u_max=[20.0],
    ),
    sartor.positive(jnp.array([1.0, 0.1, 20.0, 0.1, 1e-3])),
)  # fmt: skip
# Limits of the closed loop: the cart stays within 0.42 m.
objective = sartor.Objective(cost, rows=lambda xs, us: jnp.abs(xs[:, 0]) - 0.42, penalty=100.0)
tuned = sartor.tune(mpc, plant, objective, START, 80, iterations=25, ridge=1e-2, outside=True)
merit = tuned.curve.merit
print(f"merit {merit[0]:.2f} -> {merit.min():.2f} in {tuned.curve.rollouts[-1]:.0f} runs of the plant")
print("violation at first and at the end:", tuned.curve.violation[0], tuned.curve.violation[merit.argmin()])
print("weights:", np.asarray(sartor.values(tuned.theta)))
