"""Closed loops with MuJoCo plants: against a plain loop, and against what training makes of their logs."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import mujoco
import numpy as np
import pytest

import sartor
from sartor.models.base import ArmDynamics, Theta, history, rest
from sartor.models.mjcf import from_mujoco
from sartor.models.mlp import ResidualMLP
from sartor.plant import Plants
from sartor.samples import windows
from sartor.tracking import Tracker, follow, track

DT, N, STEPS, LENGTH = 0.02, 5, 30, 3
ARM = """
<mujoco>
  <option timestep="0.002"/>
  <worldbody>
    <body>
      <joint name="shoulder" axis="0 1 0" armature="0.1"/>
      <inertial mass="1.5" pos="0 0 0.2" diaginertia="0.02 0.02 0.01"/>
      <body pos="0 0 0.4">
        <joint name="elbow" axis="0 1 0" armature="0.05"/>
        <inertial mass="{mass}" pos="0 0 0.1" diaginertia="0.01 0.01 0.01"/>
      </body>
    </body>
  </worldbody>
  <actuator>
    <motor joint="shoulder" ctrlrange="-40 40"/>
    <motor joint="elbow" ctrlrange="-20 20"/>
  </actuator>
</mujoco>
"""


def arm(mass=0.7):
    return mujoco.MjModel.from_xml_string(ARM.format(mass=mass))


BODY = from_mujoco(arm())
RANDOM = ResidualMLP(
    BODY, widths=(4,), num_contexts=2, hidden=3, num_layers=1, history_length=LENGTH, key=jax.random.key(0)
)
# Without a residual, and so the true model of a plant that is the nominal robot.
TRUE = eqx.tree_at(
    lambda m: (m.network.layers[-1].weight, m.network.layers[-1].bias), RANDOM, replace_fn=jnp.zeros_like
)
Q = jnp.asarray([1000.0, 1000.0, 10.0, 10.0])


def error(x, reference):
    return 0.5 * jnp.sum(Q * (x - reference) ** 2)


PROBLEM = sartor.Problem(
    dynamics=ArmDynamics(DT),
    stage_cost=lambda x, u, k, theta: DT * (error(x, theta.reference[k]) + 0.5e-3 * jnp.sum(u**2)),
    terminal_cost=lambda x, theta: error(x, theta.reference[N]),
    horizon=N,
    u_min=[-40.0, -20.0],
    u_max=[40.0, 20.0],
)
TRACKER = Tracker(PROBLEM, TRUE, DT)


def references(count=2, rows=STEPS + N + 1):
    """Smooth motions that begin at rest, of another size for each plant."""
    t = DT * np.arange(rows)
    size = 0.5 + 0.3 * np.arange(count)[:, None, None]
    q = np.stack([0.5 * (1 - np.cos(4 * t)), np.sin(3 * t) ** 2], 1)
    qd = np.stack([2 * np.sin(4 * t), 3 * np.sin(6 * t)], 1)
    return np.concatenate([size * q, size * qd], 2) + np.array([0.3, -0.2, 0, 0])


def plants(count=2):
    return Plants([arm()] * count, DT, num_threads=1)


@functools.cache
def tracked(name="true"):
    tracker = eqx.tree_at(lambda t: t.model, TRACKER, {"true": TRUE, "random": RANDOM}[name])
    return track(plants(), tracker, references(), STEPS)


def same(a, b):
    return all(np.array_equal(x.xs, y.xs) and np.array_equal(x.us, y.us) for x, y in zip(a.logs, b.logs, strict=True))


# --- Control ---------------------------------------------------------------------------------------------------------


def test_the_true_model_tracks():
    run = tracked()
    assert np.all(run.failed == 0) and not run.diverged.any()
    for log in run.logs:
        assert np.abs(log.xs - log.refs)[:, :2].max() < 0.01
        assert np.ptp(log.xs[:, 0]) > 0.2
        assert np.all(np.abs(log.us) < [40, 20])


def test_trackers_that_differ_in_numbers_alone_share_what_is_compiled():
    seen = []

    def dynamics(x, u, k, theta):
        seen.append(k)
        return ArmDynamics(DT)(x, u, k, theta)

    problem = sartor.Problem(
        dynamics=dynamics, stage_cost=PROBLEM.stage_cost, terminal_cost=PROBLEM.terminal_cost, horizon=N,
        u_min=[-40.0, -20.0], u_max=[40.0, 20.0],
    )  # fmt: skip

    def traced(tracker):
        before, x = len(seen), jnp.asarray(references()[:, 0])
        tracker.controller()(TRACKER.begin(x), x, references()[:, : N + 1], True)
        return len(seen) > before

    assert traced(Tracker(problem, TRUE, DT)) and not traced(Tracker(problem, RANDOM, DT))
    assert traced(Tracker(problem, TRUE, DT, cutoff=2.0))


def test_a_wrong_model_tracks_worse():
    cost = lambda run: sum(np.sum((log.xs - log.refs) ** 2) for log in run.logs)
    assert cost(tracked("random")) > 1.5 * cost(tracked())


def test_logs_hold_what_happened():
    run, refs = tracked(), references()
    assert run.contexts.shape == (2, STEPS, 2)
    for i, log in enumerate(run.logs):
        assert log.xs.shape == (STEPS + 1, 4) and log.us.shape == log.qdds.shape == (STEPS, 2)
        assert log.dt == DT and log.environment == i
        np.testing.assert_array_equal(log.refs, refs[i, : STEPS + 1])
        np.testing.assert_array_equal(log.xs[0], [*refs[i, 0, :2], 0, 0])  # at rest on the reference
        again = plants(1)
        again.reset(log.xs[:1])
        for t in range(STEPS):
            np.testing.assert_array_equal(again.step(log.us[t : t + 1])[0], log.xs[t + 1])
            np.testing.assert_array_equal(again.qdd[0], log.qdds[t])


@eqx.filter_jit
def plain_step(model, sol, x, refs, past):
    """One real-time iteration, by `sartor.solve`."""
    z = model.context(past)
    solver = sartor.SQP(curvature="gauss_newton", real_time=True)
    return sartor.solve(PROBLEM, Theta(model, z, refs), x, solver=solver, guess=sol, throw=False), z


@eqx.filter_jit
def plain_history(xs, us):
    return history(BODY, xs, us, DT)


def test_the_loop_is_the_plain_one():
    """Measure, look back, solve from the plan before, apply: for one robot after the other."""
    run, refs = tracked("random"), references()
    for i in range(2):
        plant = plants(1)
        x = plant.reset([[*refs[i, 0, :2], 0, 0]])[0]
        past = np.asarray(rest(jnp.asarray(x[:2]), LENGTH))
        sol = sartor.guess(np.tile(x, (N + 1, 1)), np.zeros((N, 2)))
        for t in range(STEPS):
            np.testing.assert_allclose(x, run.logs[i].xs[t], atol=1e-7)
            sol, z = plain_step(RANDOM, sol, x, refs[i, t : t + N + 1], past)
            np.testing.assert_allclose(z, run.contexts[i, t], atol=1e-8)
            np.testing.assert_allclose(sol.us[0], run.logs[i].us[t], atol=1e-6)
            x_next = plant.step(sol.us[None, 0])[0]
            newest = plain_history(np.stack([x, x_next]), np.asarray(sol.us)[None, 0])
            past, x, sol = np.concatenate([past[1:], newest]), x_next, sartor.shift(sol)


def test_training_sees_the_past_that_the_controller_saw():
    """The contexts of the loop are those of the windows of its logs: one definition of the history."""
    for run in (tracked("random"), dithered(0)):
        samples = windows(run.logs, RANDOM, 1)
        contexts = jax.jit(jax.vmap(RANDOM.context))(samples.history.astype(float))
        np.testing.assert_allclose(contexts, run.contexts.reshape(-1, 2), atol=1e-6)
    assert np.ptp(contexts, axis=0).min() > 1e-4


# --- Dither, failures, many models -----------------------------------------------------------------------------------


@functools.cache
def dithered(seed, dither=2.0):
    tracker = eqx.tree_at(lambda t: t.model, TRACKER, RANDOM)
    return track(plants(), tracker, references(), STEPS, dither=dither, seed=seed, environments=(5, 3))


def test_dither_is_part_of_the_log_and_the_same_for_the_same_seed():
    run = dithered(0)
    dithered.cache_clear()
    assert same(run, dithered(0)) and not same(run, dithered(1))
    assert [log.environment for log in run.logs] == [5, 3]
    noise = np.concatenate([a.us - b.us for a, b in zip(run.logs, tracked("random").logs, strict=True)])
    assert 1.0 < noise.std() < 6.0  # the controller answers it
    assert same(dithered(0, 0.0), tracked("random"))


def test_dither_does_not_go_beyond_the_motors():
    for log in dithered(0, 100.0).logs:
        assert np.all(np.abs(log.us) <= [40, 20]) and np.any(np.abs(log.us) == [40, 20])


def test_failed_solves_are_counted_and_the_others_go_on():
    refs = references()
    refs[1, 12 : 12 + 3] = np.nan
    run = track(plants(), TRACKER, refs, STEPS)
    assert run.failed[0] == 0 and run.failed[1] == 3 + N  # step t sees rows t to t + N
    np.testing.assert_array_equal(run.logs[0].xs, tracked().logs[0].xs)
    assert np.isfinite(run.logs[1].xs).all() and np.isfinite(run.logs[1].us).all()
    assert np.abs(run.logs[1].xs - references()[1, : STEPS + 1])[-1, :2].max() < 0.05  # it has caught up


def test_each_plant_may_have_a_model_of_its_own_and_a_filtered_context():
    """z_t = z_{t-1} + gain (context(history_t) - z_{t-1}), from the context of rest; no filter is a gain of 1."""
    other = eqx.tree_at(lambda m: m.encoder, RANDOM, jax.tree.map(lambda leaf: 2.0 * leaf, RANDOM.encoder))
    models = jax.tree.map(lambda *leaves: jnp.stack(leaves), TRUE, other)
    run = track(plants(), Tracker(PROBLEM, models, DT, cutoff=2.0, per_plant=True), references(), STEPS)
    np.testing.assert_allclose(run.logs[0].xs, tracked().logs[0].xs, atol=1e-7)  # whose context does not matter
    assert np.abs(run.logs[1].xs - tracked().logs[1].xs).max() > 1e-3
    gain = 1.0 - np.exp(-2.0 * np.pi * 2.0 * DT)
    for i, model in enumerate((RANDOM, other)):
        raw = np.asarray(jax.jit(jax.vmap(model.context))(windows(run.logs[i : i + 1], model, 1).history.astype(float)))
        z, expected = raw[0], []
        for new in raw:
            z = z + gain * (new - z)
            expected.append(z)
        np.testing.assert_allclose(run.contexts[i], expected, atol=1e-6)


def test_follow_runs_any_controller():
    seen, refs = [], references()

    def torques(t, xs):
        seen.append(t)
        return 50.0 * (refs[:, t, :2] - xs[:, :2]) - 5.0 * xs[:, 2:]

    run = follow(plants(), torques, refs, 10, environments=(7, 8))
    assert seen == list(range(10)) and run.contexts.shape == (2, 10, 0) and np.all(run.failed == 0)
    assert [log.environment for log in run.logs] == [7, 8]
    for i, log in enumerate(run.logs):
        expected = 50.0 * (refs[i, :10, :2] - log.xs[:10, :2]) - 5.0 * log.xs[:10, 2:]
        np.testing.assert_allclose(log.us, expected)


def test_progress_is_reported():
    seen = []
    track(plants(), TRACKER, references(), 3, monitor=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize("shape", [(2, STEPS + N, 4), (1, STEPS + N + 1, 4), (2, STEPS + N + 1, 2), (STEPS + N + 1, 4)])
def test_references_of_a_wrong_shape_are_refused(shape):
    with pytest.raises(
        ValueError, match=r"refs must have shape \(2, 36, 4\), \(plants, steps \+ horizon \+ 1, states\)"
    ):
        track(plants(), TRACKER, np.zeros(shape), STEPS)
