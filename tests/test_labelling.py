"""Labels of all samples of logs: in chunks what each sample gets alone, with the failures marked."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
import pytest

import sartor
from sartor import labelling
from sartor.data import Log
from sartor.labelling import SOLVER, label_samples, references_ahead
from sartor.models.base import ArmDynamics, Nominal, Theta
from sartor.models.mjcf import from_mujoco
from sartor.samples import windows
from sartor.sensitivity import trajectory_error
from sartor.solution import guess
from sartor.systems import arm

DT, N = 0.02, 3
MODEL = Nominal(
    from_mujoco(
        mujoco.MjModel.from_xml_string(
            """<mujoco><worldbody><body><joint name="turn" axis="0 1 0"/>
            <inertial mass="1" pos="0.5 0 0" diaginertia="0.1 0.1 0.1"/></body></worldbody></mujoco>"""
        )
    )
)
PROBLEM = arm.problem(ArmDynamics(DT), Q=[900.0, 9.0], R=[0.1], u_min=[-30.0], u_max=[30.0], dt=DT, horizon=N)
OPTIONS = {"curvature": "gauss_newton"}  # compiles in a third of the time
FIELDS = ("S", "du0_de", "du0_dx0", "dJ_du0", "Lambda")


@functools.cache
def log():
    """A pendulum under torques of a sine, its model's own rollout, and a reference beside it."""
    step = jax.jit(lambda x, u: PROBLEM.dynamics(x, u, 0, Theta(MODEL, jnp.zeros(0), None)))
    us, xs = 3.0 * np.sin(0.3 * np.arange(22))[:, None], [np.zeros(2)]
    for u in us:
        xs.append(np.asarray(step(xs[-1], u)))
    xs = np.array(xs)
    return Log(xs, us, xs + 0.05 * np.cos(np.arange(23))[:, None], DT)


@functools.cache
def labelled():
    samples = windows([log()], MODEL, N)
    seen = []
    refs = references_ahead([log()], samples, N)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(labelling, "_CHUNK", 16)
        found = label_samples(PROBLEM, MODEL, samples, refs, monitor=lambda *progress: seen.append(progress), **OPTIONS)
    return samples, refs, found, seen


@pytest.mark.parametrize("size, expected", [(1, 16), (20, 32), (512, 512), (513, 272), (980, 496), (5000, 512)])
def test_chunks_are_of_one_size_and_of_whole_groups(size, expected):
    chunks = labelling._chunks(size)
    assert {len(chunk) for chunk in chunks} == {expected} and len(chunks) == -(-size // 512)
    np.testing.assert_array_equal(np.concatenate(chunks)[:size], np.arange(size))


def test_references_are_those_over_the_horizon_of_each_sample():
    samples, refs, *_ = labelled()
    assert refs.shape == (20, N + 1, 2)
    np.testing.assert_array_equal(refs[5], log().refs[5:9])
    with pytest.raises(ValueError, match=r"logs\[0\] has no reference"):
        references_ahead([log()._replace(refs=None)], samples, N)


def test_every_sample_gets_what_it_gets_alone():
    samples, refs, found, seen = labelled()
    assert seen == [(16, 20), (20, 20)]  # two chunks, the last of them filled up
    assert found["ok"].all() and all(len(value) == 20 for value in found.values())

    @jax.jit
    def alone(x0, us, xs, refs):
        start = guess(jnp.concatenate([x0[None], xs]), us)
        return sartor.label(PROBLEM, Theta(MODEL, jnp.zeros(0), refs), x0, solver=SOLVER, guess=start, **OPTIONS)

    for i in (0, 7, 19):
        expected = alone(*(jnp.asarray(a[i]) for a in (samples.x0, samples.us, samples.xs, refs)))
        for name in FIELDS:
            np.testing.assert_allclose(found[name][i], getattr(expected, name), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found["A"][i], expected.A[0], rtol=1e-5)
        np.testing.assert_allclose(found["B"][i], expected.B[0], rtol=1e-5)
        by_trajectory = trajectory_error(expected.A, expected.du0_de)
        np.testing.assert_allclose(found["du0_derror"][i], by_trajectory, rtol=1e-5, atol=1e-6)


def test_the_feedback_and_the_jacobians_of_a_label_are_derivatives():
    """`du0_dx0`, A and B by central differences of the first control and of the model."""
    samples, refs, found, _ = labelled()
    theta = lambda refs: Theta(MODEL, jnp.zeros(0), refs)
    x0, r = jnp.asarray(samples.x0[4]), jnp.asarray(refs[4])
    start = guess(jnp.concatenate([x0[None], samples.xs[4]]), jnp.asarray(samples.us[4]))
    plan = jax.jit(lambda x: sartor.solve(PROBLEM, theta(r), x, guess=start, throw=False))
    differences = lambda fn, x: np.stack([(fn(x + e) - fn(x - e)) / 2e-5 for e in 1e-5 * np.eye(len(x))], -1)
    feedback = differences(lambda x: plan(x).us[0], x0)
    np.testing.assert_allclose(found["du0_dx0"][4], feedback, rtol=1e-2)  # Gauss-Newton
    u0 = plan(x0).us[0]
    step = jax.jit(lambda x, u: PROBLEM.dynamics(x, u, 0, theta(None)))
    np.testing.assert_allclose(found["A"][4], differences(lambda x: step(x, u0), x0), atol=1e-6)
    np.testing.assert_allclose(found["B"][4], differences(lambda u: step(x0, u), u0), atol=1e-6)


def test_labels_do_not_depend_on_how_far_the_solves_go():
    samples, refs, found, _ = labelled()
    further = dataclasses.replace(SOLVER, tol=1e-9)
    again = label_samples(PROBLEM, MODEL, samples, refs, solver=further, **OPTIONS)
    for name in FIELDS:
        np.testing.assert_allclose(found[name], again[name], rtol=1e-6, atol=1e-6 * np.abs(again[name]).max())


def test_options_that_a_label_refuses_are_refused_for_many():
    samples, refs, *_ = labelled()
    for options, message in (({"combine": "sigend"}, "combine must be"), ({"method": "x"}, "method must be")):
        with pytest.raises(ValueError, match=message):
            label_samples(PROBLEM, MODEL, samples, refs, **options)


def of_sample(number):
    samples, refs, *_ = labelled()
    return Theta(MODEL, jnp.zeros(0), jnp.asarray(refs[number])), jnp.asarray(samples.x0[number])


def test_dynamics_expand_themselves_without_their_first_stage_too():
    theta, x0 = of_sample(4)
    solver = sartor.SQP(curvature="gauss_newton")
    sol = sartor.solve(PROBLEM, theta, x0, solver=solver)
    found = [
        sartor.action_sensitivity(PROBLEM, theta, x0, sol, eps=1e-3, method=method, solver=solver)
        for method in ("resolve", "curvature")
    ]
    np.testing.assert_allclose(*found, rtol=1e-3)


@pytest.mark.slow
def test_dynamics_that_expand_themselves_differentiate_through_the_iterations():
    theta, x0 = of_sample(4)
    options = {"solver": sartor.SQP(max_steps=6), "throw": False}
    plan = lambda derivative: jax.jacrev(
        lambda x0: sartor.solve(PROBLEM, theta, x0, derivative=derivative, **options).us
    )  # fmt: skip
    np.testing.assert_allclose(jax.jit(plan("unroll"))(x0), jax.jit(plan("implicit"))(x0), rtol=1e-6, atol=1e-7)


def test_a_sample_that_fails_is_marked_and_leaves_its_neighbours_alone():
    samples, refs, found, _ = labelled()
    broken = samples._replace(x0=np.where(np.arange(20)[:, None] == 3, np.nan, samples.x0))
    again = label_samples(PROBLEM, MODEL, broken, refs, **OPTIONS)
    np.testing.assert_array_equal(again["ok"], np.arange(20) != 3)
    assert np.isnan(again["S"][3]).all()
    np.testing.assert_allclose(again["S"][again["ok"]], found["S"][again["ok"]], rtol=1e-5)


def test_full_steps_that_do_not_converge_are_not_called_labels():
    few = sartor.SQP(curvature="gauss_newton", tol=1e-7, max_steps=1, line_search=False)
    theta = Theta(MODEL, jnp.zeros(0), jnp.asarray(log().refs[: N + 1] + 1.0))
    sol = sartor.solve(PROBLEM, theta, jnp.asarray(log().xs[0]), solver=few, throw=False)
    assert sol.result == sartor.RESULTS.not_converged


def test_samples_at_another_rate_and_both_readings_at_once_are_refused():
    samples, refs, *_ = labelled()
    with pytest.raises(ValueError, match=r"samples are 0.04 s apart, but the problem's steps take 0.02 s"):
        label_samples(PROBLEM, MODEL, samples._replace(dt=2 * samples.dt), refs)
    with pytest.raises(ValueError, match="leave out error"):
        label_samples(PROBLEM, MODEL, samples, refs, error="trajectory")
