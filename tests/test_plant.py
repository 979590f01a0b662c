"""The plants against MuJoCo stepped by hand, against closed formulas, and against themselves."""

import copy
from pathlib import Path

import mujoco
import numpy as np
import pytest
from scipy.integrate import solve_ivp

from sartor.plant import MAX_SPEED, Plants, end_effector
from sartor.systems import panda

LIMITED = '<actuator><motor joint="hinge" ctrlrange="-2 2"/></actuator>'
STRONG = '<actuator><motor joint="hinge"/></actuator>'


def pendulum(damping=0.0, timestep=0.001, actuator=LIMITED, mass=1.0, options=""):
    """A point mass on a massless rod of 1 m, hanging at q = 0."""
    return mujoco.MjModel.from_xml_string(f"""
        <mujoco><option timestep="{timestep}" integrator="RK4" gravity="0 0 -9.81"/>
        <compiler inertiafromgeom="false"/><worldbody><body name="mass">
          <joint name="hinge" axis="0 1 0" damping="{damping}" {options}/>
          <inertial pos="0 0 -1" mass="{mass}" diaginertia="1e-9 1e-9 1e-9"/>
          <geom size="0.1" pos="0 0 -1" contype="0" conaffinity="0"/>
        </body></worldbody>{actuator}</mujoco>""")


def arms(count=4, seed=0):
    """Pandas with different payloads in random states, some of them beyond their joint limits."""
    rng = np.random.default_rng(seed)
    plants = Plants([panda.mj_model(payload) for payload in panda.payloads(count)], panda.DT)
    low, high = np.asarray(panda.Q_MIN), np.asarray(panda.Q_MAX)
    q = np.clip(rng.uniform(low - 0.3, high + 0.3, (count, 7)), low - 0.01, high + 0.01)
    plants.reset(np.concatenate([q, rng.uniform(-2, 2, (count, 7))], axis=1))
    return plants


def torques(num_steps, count=4, seed=1):
    return np.random.default_rng(seed).uniform(-1, 1, (num_steps, count, 7)) * panda.U_MAX


def run(plants, us):
    return np.stack([plants.step(u) for u in us])


# --- Physics ---------------------------------------------------------------------------------------------------------


def test_a_pendulum_follows_its_equation():
    """q̈ = u - g sin q - d q̇, with a torque that changes at the control instants only."""
    plants = Plants([pendulum(), pendulum(damping=0.3)], dt=0.1)
    plants.reset([[1.0, 0.0], [-2.0, 1.0]])
    us = np.random.default_rng(0).uniform(-2, 2, (15, 2, 1))
    xs = run(plants, us)
    for i, damping in enumerate((0.0, 0.3)):
        x = np.array([[1.0, 0.0], [-2.0, 1.0]])[i]
        for u, seen in zip(us[:, i, 0], xs[:, i], strict=True):
            slope = lambda t, x, u=u, d=damping: [x[1], u - 9.81 * np.sin(x[0]) - d * x[1]]
            x = solve_ivp(slope, (0, 0.1), x, rtol=1e-10, atol=1e-10).y[:, -1]
            np.testing.assert_allclose(seen, x, atol=1e-6)


def test_energy_is_kept_without_damping_and_input():
    plants = Plants([pendulum()], dt=0.01)
    energy = lambda x: 0.5 * x[1] ** 2 - 9.81 * np.cos(x[0])
    start = energy(plants.reset([[2.5, 0.0]])[0])
    assert max(abs(energy(x[0]) - start) for x in run(plants, np.zeros((200, 1, 1)))) < 1e-6


def test_a_step_is_mujoco_with_the_control_held():
    plants, us = arms(), torques(5)
    models = [panda.mj_model(payload) for payload in panda.payloads(4)]
    for i, mj_model in enumerate(models):
        data = mujoco.MjData(mj_model)
        data.qpos[:], data.qvel[:] = plants.xs[i, :7], plants.xs[i, 7:]
        plants_i = plants.repeat([i])
        for u in us[:, i]:
            data.ctrl[:] = u
            for substep in range(10):
                mujoco.mj_step(mj_model, data)
                if substep == 0:
                    qdd = data.qacc.copy()
            np.testing.assert_array_equal(plants_i.step(u[None])[0], np.concatenate([data.qpos, data.qvel]))
            np.testing.assert_array_equal(plants_i.qdd[0], qdd)


def test_qdd_is_the_acceleration_under_the_control():
    """Inverse dynamics of it, in the state before the step, gives the applied torque back."""
    mj_model = panda.mj_model(panda.Payload(2.0, (0.1, 0.0, 0.2)))
    plants, data = Plants([mj_model], panda.DT), mujoco.MjData(mj_model)
    plants.reset([[*panda.START, *np.linspace(-1, 1, 7)]])
    for u in torques(3, 1):
        data.qpos[:], data.qvel[:] = plants.xs[0, :7], plants.xs[0, 7:]
        plants.step(u)
        data.qacc[:] = plants.qdd[0]
        mujoco.mj_inverse(mj_model, data)
        np.testing.assert_allclose(data.qfrc_inverse, u[0], atol=1e-9)


def test_controls_are_clipped_and_time_counts():
    free = Plants([pendulum(actuator=STRONG)] * 2, dt=0.1)
    limited = Plants([pendulum()] * 2, dt=0.1)
    for _ in range(3):
        np.testing.assert_array_equal(limited.step([[50.0], [-3.0]]), free.step([[2.0], [-2.0]]))
    np.testing.assert_array_equal(limited.us, [[2.0], [-2.0]])
    assert limited.time == pytest.approx(0.3) and limited.u_max.tolist() == [[2.0]] * 2 and np.isinf(free.u_min).all()
    limited.reset(np.zeros((2, 2)))
    assert limited.time == 0.0 and not limited.us.any() and not limited.qdd.any()


def test_plants_begin_in_the_posture_of_the_model():
    np.testing.assert_array_equal(Plants([pendulum(options='ref="90"')], dt=0.1).xs, [[np.pi / 2, 0.0]])


# --- Batches, threads, branches --------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_threads", [1, 3, 8])
def test_a_plant_does_the_same_in_any_batch_on_any_number_of_threads(num_threads):
    plants, us = arms(), torques(20)
    models = [panda.mj_model(payload) for payload in panda.payloads(4)]
    other = Plants(models[::-1], panda.DT, num_threads)
    other.reset(plants.xs[::-1])
    np.testing.assert_array_equal(run(plants, us), run(other, us[:, ::-1])[:, ::-1])


def at_limits(plants):
    low, high = np.asarray(panda.Q_MIN), np.asarray(panda.Q_MAX)
    return ((plants.xs[:, :7] < low) | (plants.xs[:, :7] > high)).any()


def test_a_restored_branch_repeats_the_original_to_the_last_bit():
    """Also where joint limits act, whose forces depend on the warm start of the solver."""
    plants, us = arms(), torques(60)
    run(plants, us[:30])
    assert at_limits(plants)
    state = plants.snapshot()
    kept = copy.deepcopy(state)
    xs, qdd = run(plants, us[30:]), plants.qdd
    run(plants, -us)  # elsewhere, and with another history
    plants.restore(state)
    assert plants.time == pytest.approx(30 * panda.DT)
    np.testing.assert_array_equal(plants.xs, kept.xs)
    np.testing.assert_array_equal(plants.us, np.clip(us[29], -np.asarray(panda.U_MAX), panda.U_MAX))
    np.testing.assert_array_equal(run(plants, us[30:]), xs)
    np.testing.assert_array_equal(plants.qdd, qdd)
    for field, before in zip(state, kept, strict=True):
        np.testing.assert_array_equal(field, before)


def test_copies_go_on_as_the_original_and_leave_it_alone():
    plants, us = arms(), torques(50)
    run(plants, us[:30])
    chosen = [2, 0, 2]
    copies = plants.repeat(chosen)
    assert len(copies) == 3 and copies.time == plants.time
    seen = run(copies, us[30:, chosen])
    np.testing.assert_array_equal(seen, run(plants, us[30:])[:, chosen])
    again = plants.repeat(chosen)
    again.restore(plants.snapshot().take([0, 0, 0]))
    np.testing.assert_array_equal(again.xs, plants.xs[[0, 0, 0]])


def test_a_branch_with_another_control_goes_elsewhere():
    plants = arms()
    branches = plants.repeat([1, 1])
    us = np.zeros((2, 7))
    us[1, 3] = 1.0
    xs = branches.step(us)
    assert np.abs(xs[0] - xs[1]).max() > 1e-3


def test_what_is_handed_out_cannot_be_changed_and_does_not_change():
    plants = Plants([pendulum()], dt=0.1)
    controls, start = np.ones((1, 1)), np.array([[1.0, 0.0]])
    plants.reset(start)
    start[:] = 5.0
    before, kept = plants.xs, plants.xs.copy()
    plants.step(controls)
    controls[:] = 5.0
    assert plants.us[0, 0] == 1.0
    np.testing.assert_array_equal(before, kept)
    for array in (plants.xs, plants.us, plants.qdd, plants.diverged):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


# --- Divergence ------------------------------------------------------------------------------------------------------


HUGE = 1e9


def diverging():
    """Three pendulums; the one in the middle is so light that MuJoCo refuses its acceleration under `HUGE`."""
    plants = Plants([pendulum(actuator=STRONG, mass=mass) for mass in (1.0, 1e-3, 1.0)], dt=0.01, num_threads=2)
    plants.reset([[0.5, 0.0], [0.6, 0.1], [0.7, 0.2]])
    plants.step(np.ones((3, 1)))
    return plants


def test_a_diverged_plant_is_frozen_and_flagged_and_the_others_go_on(capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plants, alone = diverging(), Plants([pendulum(actuator=STRONG)], dt=0.01)
    alone.reset([[0.5, 0.0]])
    alone.step([[1.0]])
    last, qdd = plants.xs, plants.qdd
    plants.step([[1.0], [HUGE], [2 * MAX_SPEED / 0.01]])
    assert plants.diverged.tolist() == [False, True, True]
    np.testing.assert_array_equal(plants.xs[1:], last[1:])
    np.testing.assert_array_equal(plants.qdd[1:], qdd[1:])
    assert np.isfinite(plants.snapshot().integration).all()
    np.testing.assert_array_equal(plants.xs[0], alone.step([[1.0]])[0])
    plants.step([[1.0], [np.nan], [0.0]])  # controls of frozen plants do not matter
    np.testing.assert_array_equal(plants.xs[1:], last[1:])
    np.testing.assert_array_equal(plants.xs[0], alone.step([[1.0]])[0])
    assert not list(Path().iterdir()) and capfd.readouterr() == ("", ""), "MuJoCo wrote a log"


@pytest.mark.parametrize("u, diverges", [(0.5 * MAX_SPEED / 0.01, False), (2 * MAX_SPEED / 0.01, True), (1e15, True)])
def test_a_plant_diverges_at_an_impossible_speed_or_a_control_that_mujoco_ignores(u, diverges):
    plants = Plants([pendulum(actuator=STRONG)], dt=0.01)
    plants.step([[u]])
    assert plants.diverged.tolist() == [diverges]


def test_a_diverged_plant_lives_again_after_a_reset_or_an_older_snapshot():
    plants = diverging()
    state = plants.snapshot()
    expected = plants.repeat([0, 1, 2]).step(np.ones((3, 1)))
    plants.step([[1.0], [HUGE], [1.0]])
    frozen = plants.repeat([1, 0])
    assert frozen.diverged.tolist() == [True, False]
    plants.restore(state)
    assert not plants.diverged.any()
    np.testing.assert_array_equal(plants.step(np.ones((3, 1))), expected)
    plants.step([[1.0], [HUGE], [1.0]])
    plants.reset(np.zeros((3, 2)))
    plants.step(np.zeros((3, 1)))
    assert not plants.diverged.any()


# --- Input -----------------------------------------------------------------------------------------------------------


def test_bad_input_is_named():
    plants = Plants([pendulum()] * 3, dt=0.1)
    with pytest.raises(ValueError, match=r"us is not finite for plant 0, 2"):
        plants.step([[np.nan], [0.0], [np.inf]])
    assert plants.time == 0.0
    with pytest.raises(ValueError, match=r"us must have shape \(3, 1\)"):
        plants.step([[0.0]])
    with pytest.raises(ValueError, match=r"xs must have shape \(3, 2\)"):
        plants.reset(np.zeros((3, 1)))
    with pytest.raises(ValueError, match="xs is not finite for plant 1"):
        plants.reset([[0, 0], [0, np.nan], [0, 0]])
    with pytest.raises(ValueError, match="state is one of 3 plants with 1 joints, but here are 1 with 1"):
        plants.repeat([0]).restore(plants.snapshot())
    with pytest.raises(ValueError, match="indices"):
        plants.repeat([])
    with pytest.raises(ValueError, match="num_threads"):
        Plants([pendulum()], dt=0.1, num_threads=0)


@pytest.mark.parametrize("dt", [0.0, -0.1, 0.0015, 0.0004, np.nan, np.inf])
def test_dt_is_a_multiple_of_the_timestep(dt):
    with pytest.raises(ValueError, match="dt must be a multiple of the timestep"):
        Plants([pendulum()], dt)


def xml(joints, actuators):
    body = f'<worldbody><body>{joints}<geom size="0.1"/></body></worldbody>'
    return mujoco.MjModel.from_xml_string(f"<mujoco>{body}<actuator>{actuators}</actuator></mujoco>")


TWO = '<joint name="a"/><joint name="b" type="slide"/>'
WRONG = {
    "no joints": (lambda: mujoco.MjModel.from_xml_string("<mujoco/>"), "fixed base"),
    "free base": (lambda: xml("<freejoint/>", ""), "fixed base"),
    "ball": (lambda: xml('<joint type="ball"/>', ""), "fixed base"),
    "motor missing": (lambda: xml(TWO, '<motor joint="a"/>'), "has 2 joints but 1 actuators"),
    "order": (
        lambda: xml(TWO, '<motor name="m" joint="b"/><motor joint="a"/>'),
        r"actuator 0 \('m'\) .* joint 0 \('a'\)",
    ),
    "gear": (lambda: xml(TWO, '<motor joint="a"/><motor joint="b" gear="50"/>'), "actuator 1 .* with gear 1"),
    "servo": (lambda: xml(TWO, '<motor joint="a"/><position joint="b"/>'), "actuator 1 .* is not the <motor>"),
    "filter": (
        lambda: xml(TWO, '<general joint="a" dyntype="filter" dynprm="1"/><motor joint="b"/>'),
        "actuator 0 .* is not the <motor>",
    ),
}  # fmt: skip


@pytest.mark.parametrize("make, match", WRONG.values(), ids=WRONG)
def test_a_model_that_is_no_arm_with_motors_is_refused(make, match):
    with pytest.raises(ValueError, match=match):
        Plants([make()], dt=0.002)


def test_models_that_do_not_go_together_are_refused():
    with pytest.raises(ValueError, match="mj_models is empty"):
        Plants([], dt=0.1)
    with pytest.raises(ValueError, match=r"number of joints: \[1, 7\]"):
        Plants([pendulum(), panda.mj_model()], dt=0.1)
    with pytest.raises(ValueError, match="differ in their timestep"):
        Plants([pendulum(), pendulum(timestep=0.002)], dt=0.1)


# --- Positions -------------------------------------------------------------------------------------------------------


def test_positions_of_a_body():
    mj_model = xml(TWO, '<motor joint="a"/><motor joint="b"/>')
    with pytest.raises(ValueError, match="no body is named 'end_effector': choose one of"):
        end_effector(mj_model, np.zeros((1, 2)))
    with pytest.raises(ValueError, match=r"qs must have shape \(T, 7\)"):
        end_effector(panda.mj_model(), np.zeros(7))
    turn = np.zeros((2, 7)) + panda.START
    turn[1, 0] += np.pi / 2  # about the vertical axis
    (x, y, z), turned = end_effector(panda.mj_model(), turn)
    np.testing.assert_allclose(turned, [-y, x, z], atol=1e-9)
    np.testing.assert_array_equal(end_effector(panda.mj_model(), turn, "link1"), [[0, 0, 0.333]] * 2)
