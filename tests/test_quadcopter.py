"""The quadcopter of the tuning experiment: its physics, its identified models, and that a run leaves its report."""

import casadi
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sartor import report, report_tuning
from sartor.experiments import quadcopter_tuning
from sartor.experiments.quadcopter_models import LEVELS, identified
from sartor.files import read_json
from sartor.systems import quadcopter


def test_hovering_is_an_equilibrium_and_more_thrust_lifts():
    goal = jnp.asarray(quadcopter.GOAL)
    np.testing.assert_allclose(quadcopter.ode(goal, jnp.full(4, quadcopter.HOVER)), 0.0, atol=1e-12)
    assert quadcopter.ode(goal, jnp.full(4, 1.01 * quadcopter.HOVER))[5] > 0


@pytest.mark.parametrize("rotors, axis, sign", [((3, 1), 9, 1), ((2, 0), 10, 1), ((1, 0), 11, 1)])
def test_rotors_turn_it_the_way_they_should(rotors, axis, sign):
    """Faster rotor 4 than 2 rolls, 3 than 1 pitches; rotors 2 and 4 yaw against 1 and 3."""
    more, less = rotors
    u = np.full(4, quadcopter.HOVER)
    u[more] += 5.0
    u[less] -= 5.0
    assert sign * quadcopter.ode(jnp.asarray(quadcopter.GOAL), jnp.asarray(u))[axis] > 0


def test_identified_models_are_the_more_wrong_the_farther_the_data_go():
    true = np.hstack(quadcopter.linearised())
    off = [np.linalg.norm(np.hstack(identified(LEVELS[level])) - true) for level in ("small", "medium", "large")]
    assert off[0] < off[1] < off[2]
    again = identified.__wrapped__(LEVELS["small"])
    np.testing.assert_array_equal(again[0], identified(LEVELS["small"])[0])


@pytest.mark.slow
def test_the_bound_is_that_of_ipopt(tmp_path):
    quadcopter_tuning.bound(tmp_path / "bound.json", None)
    mine = read_json(tmp_path / "bound.json")
    assert mine["successful"] and mine["cost"] == pytest.approx(_by_ipopt(), rel=1e-6)


def _by_ipopt():
    """The same trajectory by direct multiple shooting in CasADi, equations written once more."""
    q, opti = quadcopter, casadi.Opti()
    T, goal = q.NUM_STEPS, np.array(q.GOAL)
    x, u = opti.variable(12, T + 1), opti.variable(4, T)
    J, P = q.INERTIA, q.terminal_weight(*q.linearised())

    def step(x, u):
        v, (roll, pitch, yaw), w = x[3:6], (x[6], x[7], x[8]), x[9:12]
        cr, sr, cp, sp, cy, sy = (f(a) for a in (roll, pitch, yaw) for f in (casadi.cos, casadi.sin))
        lift = q.THRUST * casadi.sumsqr(u) / q.MASS
        spin, arm = -u[0] + u[1] - u[2] + u[3], q.ARM * q.THRUST
        rate = casadi.vertcat(
            v, lift * (cy * sp * cr + sy * sr) - q.DRAG / q.MASS * v[0],
            lift * (sy * sp * cr - cy * sr) - q.DRAG / q.MASS * v[1],
            lift * cp * cr - q.GRAVITY - q.DRAG / q.MASS * v[2],
            w[0] + sr * sp / cp * w[1] + cr * sp / cp * w[2], cr * w[1] - sr * w[2], (sr * w[1] + cr * w[2]) / cp,
            ((J[1] - J[2]) * w[1] * w[2] - q.ROTOR_INERTIA * w[1] * spin + arm * (u[3] ** 2 - u[1] ** 2)) / J[0],
            ((J[2] - J[0]) * w[0] * w[2] + q.ROTOR_INERTIA * w[0] * spin + arm * (u[2] ** 2 - u[0] ** 2)) / J[1],
            ((J[0] - J[1]) * w[0] * w[1] + q.TWIST * (-u[0] ** 2 + u[1] ** 2 - u[2] ** 2 + u[3] ** 2)) / J[2],
        )  # fmt: skip
        return x + q.DT * rate

    weights, limits, cost = np.array(q.STATE_WEIGHTS), np.array(q.LIMITS), 0
    opti.subject_to(x[:, 0] == np.array(q.X0))
    for k in range(T):
        opti.subject_to(x[:, k + 1] == step(x[:, k], u[:, k]))
        opti.subject_to(opti.bounded(0.0, u[:, k], q.U_MAX))
        opti.subject_to(opti.bounded(-limits, x[3:, k + 1], limits))
        cost += casadi.dot(weights, (x[:, k] - goal) ** 2) + q.CONTROL_WEIGHT * casadi.sumsqr(u[:, k] - q.HOVER)
    last = x[:, T] - goal
    opti.minimize(cost + last.T @ P @ last)
    share = np.minimum(np.linspace(0.0, 2.0, T + 1), 1.0)
    opti.set_initial(x, np.outer(np.array(q.X0), 1 - share) + np.outer(goal, share))
    opti.set_initial(u, q.HOVER)
    opti.solver("ipopt", {"print_time": False}, {"print_level": 0, "max_iter": 500})
    return float(opti.solve().value(opti.f))


@pytest.mark.slow
def test_a_smoke_run_leaves_a_report_and_is_not_done_again(tmp_path):
    config = quadcopter_tuning.Config(preset="smoke", workers=0)
    quadcopter_tuning.run(config, tmp_path)
    rows = read_json(tmp_path / "trials.json")["rows"]
    assert {row["method"] for row in rows} == {"hybrid.25", "gauss_newton.corrected"}
    assert all(len(row["merit"]) == len(row["taken"]) == len(row["rollouts"]) for row in rows)
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "trials").iterdir()}
    quadcopter_tuning.run(config, tmp_path)
    assert stamps == {path: path.stat().st_mtime_ns for path in (tmp_path / "trials").iterdir()}
    assert "gauss_newton.corrected" in report.page(report_tuning.REPORT, tmp_path).read_text()


def test_the_table_counts_what_it_says():
    def row(method, seed, merit, taken, violation):
        return {"level": "small", "method": method, "seed": seed, "data": 0, "time": 2.0, "rollouts": [2, 4, 6],
                "merit": merit, "taken": taken, "violation": violation}  # fmt: skip

    rows = [
        row("hybrid.25", 0, [40.0, 22.0, 500.0], [1, 1, 1], [0.0, 0.0, 0.3]),
        row("hybrid.25", 1, [40.0, None, 20.0], [1, 0, 1], [0.0, None, 0.0]),
        row("gauss_newton.exact", 0, [40.0, 10.5, 10.0], [1, 1, 1], [0.0, 0.0, 0.0]),
    ]
    grid = report_tuning._summary({"optimum": {"cost": 10.0}, "rows": rows})
    hybrid, exact = (dict(zip(grid.header, line, strict=True)) for line in grid.rows)
    assert hybrid["lowest merit: mean"] == "21.0" and hybrid["above exact [%]"] == "+110.00"
    assert hybrid["seeds that diverge"] == "1" and hybrid["refused"] == "1"
    assert hybrid["last violation: worst"] == "0.3" and hybrid["rollouts to the hybrid's lowest"] == "14 (1 of 2)"
    assert exact["rollouts to the hybrid's lowest"] == "12 (1 of 1)"


def test_a_gain_stabilises_the_true_system():
    A, B = quadcopter.linearised()
    P = quadcopter.terminal_weight(A, B)
    gain = np.linalg.solve(quadcopter.CONTROL_WEIGHT * np.eye(4) + B.T @ P @ B, B.T @ P @ A)
    assert np.abs(np.linalg.eigvals(A - B @ gain)).max() < 1.0
    x = jnp.asarray(quadcopter.GOAL).at[0].add(0.3)
    step = jax.jit(lambda x: quadcopter.plant_step(x, quadcopter.HOVER - gain @ (x - jnp.asarray(quadcopter.GOAL))))
    for _ in range(80):
        x = step(x)
    assert np.linalg.norm(x - np.array(quadcopter.GOAL)) < 0.05
