"""The Panda against published numbers, MuJoCo, and the properties that its references are to have."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sartor
from cadelac import DATA
from cadelac import problem as plain_problem
from sartor.plant import Plants, end_effector
from sartor.systems import panda

# Environment: offset [m], mass [kg], rounded; drawn with the published order and seed.
EVALUATION = {
    100: (-0.059, 0.258, -0.240, 3.78), 101: (0.222, -0.028, -0.104, 0.93), 102: (0.069, -0.280, -0.291, 1.72),
    103: (-0.259, -0.149, -0.167, 1.01), 104: (-0.221, -0.293, -0.231, 2.47), 105: (0.285, 0.294, -0.055, 0.65),
    106: (0.083, -0.006, 0.294, 0.26), 107: (0.170, -0.127, -0.155, 2.65), 108: (-0.152, 0.100, 0.010, 1.70),
    109: (0.033, -0.128, 0.124, 1.66), 110: (-0.084, 0.197, 0.255, 0.18), 111: (-0.160, -0.091, 0.189, 3.94),
    112: (0.281, 0.243, -0.122, 3.97), 113: (-0.150, -0.236, 0.271, 0.93), 114: (0.114, -0.265, 0.138, 3.53),
    115: (-0.137, -0.073, -0.075, 3.00), 116: (-0.157, -0.197, -0.030, 1.22), 117: (0.204, -0.157, 0.001, 3.77),
    118: (0.080, 0.220, 0.264, 3.00), 119: (0.120, 0.281, 0.297, 1.81),
}  # fmt: skip


def at_start(payload=None):
    mj_model = panda.mj_model(payload)
    data = mujoco.MjData(mj_model)
    data.qpos[:] = panda.START
    mujoco.mj_forward(mj_model, data)
    return mj_model, data


def mass_matrix(mj_model, data):
    rows = np.zeros((7, 7))
    for row, unit in zip(rows, np.eye(7), strict=True):
        mujoco.mj_mulM(mj_model, data, row, unit)
    return rows


# --- The robot -------------------------------------------------------------------------------------------------------


def test_the_empty_hand_has_the_published_dynamics():
    mj_model, data = at_start()
    np.testing.assert_allclose(data.qfrc_bias, [0, -16.8211, -0.3686, 22.8678, 0.6088, 2.5992, 0.0007], atol=6e-5)
    M = mass_matrix(mj_model, data)
    np.testing.assert_allclose(M.diagonal(), [0.9336, 1.7400, 1.1787, 1.1303, 0.1273, 0.1540, 0.1067], atol=6e-5)
    np.testing.assert_allclose([M[0, 2], M[1, 3], M[3, 5], M[1, 5]], [0.8792, -0.7768, 0.1661, -0.1136], atol=6e-5)
    np.testing.assert_allclose(end_effector(mj_model, [panda.START]), [[0.4555, 0, 0.4268]], atol=6e-5)


def test_four_kilograms_weigh_as_published():
    _, data = at_start(panda.Payload(4.0, (0.0, 0.0, 0.0)))
    np.testing.assert_allclose(data.qfrc_bias, [0, -34.6965, -0.3686, 42.5901, 0.6088, 7.2729, 0.0007], atol=6e-5)


def test_the_empty_hand_is_the_nominal_chain_of_the_golden_data():
    """Link 7 there has hand and fingers in it."""
    mj_model = panda.mj_model()
    links = [mj_model.body(f"link{i}").id for i in range(1, 8)]
    np.testing.assert_allclose(mj_model.body_mass[links[:6]], DATA["nom_mass"][:6])
    np.testing.assert_allclose(mj_model.body_subtreemass[links[6]], DATA["nom_mass"][6])
    np.testing.assert_allclose(mj_model.body_ipos[links[:6]], DATA["nom_com"][:6])
    np.testing.assert_array_equal(mj_model.dof_armature, DATA["armature"])


@settings(deadline=None, max_examples=20)
@given(st.floats(0.01, 4.0), st.tuples(*[st.integers(-300, 300)] * 3), st.integers(0, 1000))
def test_a_payload_adds_the_weight_and_the_kinetic_energy_of_a_small_box(mass, millimetres, seed):
    """∂/∂q of m g z of its centre, and ½ m |v|² + ½ 0.001 |w|², from the kinematics of the hand alone."""
    offset = tuple(0.001 * i for i in millimetres)  # MuJoCo takes an offset of less than a micrometre for none
    rng = np.random.default_rng(seed)
    q, qd = rng.uniform(panda.Q_MIN, panda.Q_MAX), rng.uniform(-2, 2, 7)
    bias, energy = [], []
    for payload in (None, panda.Payload(mass, offset)):
        mj_model = panda.mj_model(payload)
        data = mujoco.MjData(mj_model)
        data.qpos[:] = q
        mujoco.mj_forward(mj_model, data)
        bias.append(data.qfrc_bias.copy())
        energy.append(0.5 * qd @ mass_matrix(mj_model, data) @ qd)
    hand = mj_model.body("end_effector").id
    centre = data.xpos[hand] + data.xmat[hand].reshape(3, 3) @ offset
    jacp, jacr = np.zeros((3, 7)), np.zeros((3, 7))
    mujoco.mj_jac(mj_model, data, jacp, jacr, centre, hand)
    np.testing.assert_allclose(bias[1] - bias[0], mass * 9.81 * jacp[2], atol=1e-10)
    added = 0.5 * mass * np.sum((jacp @ qd) ** 2) + 0.5 * 0.001 * np.sum((jacr @ qd) ** 2)
    assert energy[1] - energy[0] == pytest.approx(added, abs=1e-10)


def test_limits_and_friction_of_the_joints():
    mj_model = panda.mj_model()
    np.testing.assert_array_equal(mj_model.jnt_range, np.transpose([panda.Q_MIN, panda.Q_MAX]))
    for limits in (mj_model.actuator_ctrlrange, mj_model.actuator_forcerange):
        np.testing.assert_array_equal(limits, np.transpose([np.negative(panda.U_MAX), panda.U_MAX]))
    assert mj_model.opt.timestep == 0.002 and mj_model.opt.integrator == mujoco.mjtIntegrator.mjINT_IMPLICITFAST
    assert (mj_model.dof_damping == 1.0).all() and (panda.mj_model(damping=0.0).dof_damping == 0.0).all()
    np.testing.assert_array_equal(mj_model.key("start").qpos, panda.START)


def test_nothing_collides():
    mj_model = panda.mj_model(panda.Payload(1.0, (0.0, 0.0, 0.0)))
    assert not mj_model.geom_contype.any() and not mj_model.geom_conaffinity.any()


def test_only_a_payload_is_drawn():
    box = panda.mj_model(panda.Payload(1.0, (0.1, 0.2, 0.3))).geom("ee_box")
    assert panda.mj_model().geom("ee_box").group > 2 and box.group == 0
    np.testing.assert_array_equal(box.pos, [0.1, 0.2, 0.3])


@pytest.mark.parametrize(
    "mass, offset", [(0.0, (0, 0, 0)), (-1.0, (0, 0, 0)), (np.nan, (0, 0, 0)), (1.0, (0, np.inf, 0))]
)
def test_a_payload_without_mass_is_refused(mass, offset):
    with pytest.raises(ValueError, match="payload must have a positive mass"):
        panda.mj_model(panda.Payload(mass, offset))


# --- Payloads --------------------------------------------------------------------------------------------------------


def test_payloads_are_those_of_the_published_draws():
    drawn = panda.payloads()
    assert len(drawn) == 130
    for i, row in EVALUATION.items():
        np.testing.assert_allclose(drawn[i].offset, row[:3], atol=6e-4)
        assert drawn[i].mass == pytest.approx(row[3], abs=6e-3)


def test_a_longer_list_begins_with_the_shorter_one():
    assert panda.payloads(30) == panda.payloads(60)[:30] != panda.payloads(30, seed=1)


# --- References ------------------------------------------------------------------------------------------------------

REFERENCES = panda.references(0, 100)


def test_references_start_at_rest_in_the_start_posture():
    q, qd, qdd = panda.reference_at(REFERENCES, [0.0])
    np.testing.assert_allclose(q, np.tile(panda.START, (100, 1, 1)), atol=1e-14)
    np.testing.assert_allclose([qd, qdd], 0.0, atol=1e-13)


def test_derivatives_agree_with_differences():
    times, h = np.linspace(0.0, 12.0, 50), 1e-5
    before, now, after = (panda.reference_at(REFERENCES, times + shift) for shift in (-h, 0.0, h))
    for i in (0, 1):
        np.testing.assert_allclose((after[i] - before[i]) / (2 * h), now[i + 1], atol=1e-8)


def test_references_repeat_after_ten_seconds():
    times = np.linspace(0.0, 10.0, 23)
    for first, second in zip(*(panda.reference_at(REFERENCES, t) for t in (times, times + 10.0)), strict=True):
        np.testing.assert_allclose(first, second, atol=1e-12)


def test_references_stay_within_their_limits_and_use_them():
    """Root mean squares as computed for the published generator, by another program."""
    q, qd, qdd = panda.reference_at(REFERENCES, 0.01 * np.arange(1001))
    assert (q >= panda.Q_MIN).all() and (q <= panda.Q_MAX).all() and np.abs(qd).max() <= 2.0
    rms = lambda a: np.sqrt(np.mean(a**2, axis=(0, 1)))
    np.testing.assert_allclose(rms(qd), [0.49, 0.59, 0.78, 0.42, 0.77, 0.65, 0.77], rtol=0.12)
    np.testing.assert_allclose(rms(qdd), [0.8, 1.2, 1.6, 1.0, 1.6, 1.3, 1.6], rtol=0.12)
    np.testing.assert_allclose(q.std(axis=(0, 1)), [0.43, 0.47, 0.62, 0.30, 0.61, 0.53, 0.61], rtol=0.15)


def test_about_one_in_320_draws_is_accepted():
    drawn = panda._draw(np.random.default_rng(0), 10_000)
    coarse = panda._select(drawn, panda._within_limits(drawn, np.arange(0.0, 10.0, 0.1), 2.0))
    accepted = panda._within_limits(coarse, 0.01 * np.arange(1000), 2.0).sum()
    assert 10_000 / 320 / 2 < accepted < 2 * 10_000 / 320


def test_seeds_reproduce_and_a_longer_batch_begins_with_the_shorter_one():
    for few, many in zip(panda.references(0, 7), REFERENCES, strict=True):
        np.testing.assert_array_equal(few, many[:7])
    assert not np.array_equal(panda.references(1, 1).A, REFERENCES.A[:1])
    rng = np.random.default_rng(0)
    first, second = panda.references(rng, 1), panda.references(rng, 1)
    np.testing.assert_array_equal(first.A, REFERENCES.A[:1])
    assert not np.array_equal(first.A, second.A)


def test_too_few_accepted_references_are_an_error():
    with pytest.raises(ValueError, match=r"only 0 of 3 references were accepted in 60 tries: .* v_max \(0.1 rad/s\)"):
        panda.references(0, 3, v_max=0.1, max_tries=20)


def test_sampled_references_are_those_at_the_control_instants():
    rows = panda.sample_reference(REFERENCES, 500)
    assert rows.shape == (100, 513, 14)
    q, qd, _ = panda.reference_at(REFERENCES, 0.02 * np.arange(513))
    np.testing.assert_array_equal(rows, np.concatenate([q, qd], axis=-1))
    np.testing.assert_allclose(rows[:, 500:], rows[:, :13], atol=1e-11)  # wraps to its beginning
    one = panda.Reference(*(part[3] for part in REFERENCES))
    np.testing.assert_allclose(panda.sample_reference(one, 5, horizon=2), rows[3, :8], atol=1e-14)


def test_a_perfect_model_tracks_a_reference():
    """Computed torque with a little feedback, on two payloads that the motors can hold."""
    payloads = [panda.payloads()[i] for i in (101, 110)]
    models = [panda.mj_model(payload) for payload in payloads]
    plants, reference = Plants(models, panda.DT), panda.Reference(*(part[:2] for part in REFERENCES))
    refs, qdd = panda.sample_reference(reference, 250, 0), panda.reference_at(reference, 0.02 * np.arange(250))[2]
    xs = [plants.reset(refs[:, 0])]
    for k in range(250):
        us = np.zeros((2, 7))
        for mj_model, x, r, a, u in zip(models, xs[-1], refs[:, k], qdd[:, k], us, strict=True):
            data, error = mujoco.MjData(mj_model), r - x
            data.qpos[:], data.qvel[:], data.qacc[:] = x[:7], x[7:], a + 100 * error[:7] + 20 * error[7:]
            mujoco.mj_inverse(mj_model, data)
            u[:] = data.qfrc_inverse
        xs.append(plants.step(us))
    J = np.einsum("btx,x->b", (np.stack(xs, axis=1) - refs) ** 2, np.asarray(panda.WEIGHTS)) / 250
    assert (J < 1.0).all() and not plants.diverged.any()


# --- The control problem ---------------------------------------------------------------------------------------------


class Theta(NamedTuple):
    reference: jax.Array
    z: jax.Array | None = None


def double_integrator(x, u, k, theta):
    return jnp.concatenate([x[:7] + panda.DT * x[7:], x[7:] + panda.DT * u])


def test_the_cost_is_the_published_one():
    """Against the cost of the golden data, and what it was there."""
    problem = panda.problem(double_integrator)
    assert problem.horizon == 12
    np.testing.assert_array_equal(problem.u_max, DATA["u_max"])
    np.testing.assert_array_equal(problem.u_min, -DATA["u_max"])
    np.testing.assert_array_equal(panda.WEIGHTS, DATA["Q"])
    np.testing.assert_array_equal(panda.PENALTY, DATA["R"])
    for i in range(3):
        xs, us, reference = (jnp.asarray(DATA[name][i]) for name in ("xs", "us", "ref"))
        cost = sartor.total_cost(problem, Theta(reference), xs, us)
        assert cost == pytest.approx(float(DATA["cost"][i]), rel=1e-12)
        assert cost == pytest.approx(float(sartor.total_cost(plain_problem(), (None, reference), xs, us)), rel=1e-14)


def test_a_reference_of_another_length_is_refused():
    problem = panda.problem(double_integrator, horizon=5)
    with pytest.raises(ValueError, match=r"theta.reference must have shape \(6, 14\), not \(13, 14\)"):
        problem.terminal_cost(jnp.zeros(14), Theta(jnp.zeros((13, 14))))


def test_equal_problems_compile_once():
    same = [jax.tree.structure(panda.problem(double_integrator, horizon=n)) for n in (3, 3, 4)]
    assert same[0] == same[1] != same[2]
