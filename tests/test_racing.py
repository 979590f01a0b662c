"""The racing car: tyres against their formula, track coordinates against the plane, sensitivities against differences,
and the closed loop on a plant that no model describes."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import solve_ivp

from sartor import RESULTS, SQP, error_sensitivity, racing, solve
from sartor.models.integrate import rk4
from sartor.models.vehicle import Kinematic, LinearTyre, Motion, SingleTrack, corrected, f1tenth
from sartor.problem import Problem
from sartor.systems import racing_car as car
from sartor.track_generator import named

CAR, TRACK = f1tenth(), named("fin")
THETA = car.Theta(CAR, TRACK)
LINEAR = SingleTrack(front=LinearTyre(), rear=LinearTyre())
HORIZON = 40
CORNERING = jnp.asarray([2.07, 0.05, -0.454, 3.47, 0.78, -1.07, 0.8, 3.2, -0.5])


def learned():
    model = corrected(LINEAR, 8, jax.random.key(0))
    last = lambda m: m.network.layers[-1].weight
    return eqx.tree_at(last, model, 0.3 * jax.random.normal(jax.random.key(1), last(model).shape))


VEHICLES = {"tyres": CAR, "linear": LINEAR, "kinematic": Kinematic(), "corrected": learned()}


def magic(a, B, C, D, E):
    return D * np.sin(C * np.arctan(B * a + E * (B * a - np.arctan(B * a))))


def test_pure_slip_and_pure_cornering_follow_the_magic_formula():
    along, side = CAR.rear.forces(jnp.asarray(20.0), jnp.asarray(0.05), jnp.asarray(0.0))
    assert float(along) == pytest.approx(20.0 * magic(0.05, 4.67455, 1.57920, 0.85531, 7.29611), rel=1e-6)
    assert float(side) == 0.0
    along, side = CAR.front.forces(jnp.asarray(20.0), jnp.asarray(0.0), jnp.asarray(np.deg2rad(6.0)))
    assert float(side) == pytest.approx(-20.0 * magic(6.0, 0.057084, 0.58888, 0.85324, 0.23114), rel=1e-6)
    assert float(along) == 0.0


def test_combined_slip_shares_the_grip():
    slips, angles = jnp.meshgrid(jnp.linspace(-1, 1, 21), jnp.linspace(-0.8, 0.8, 21))
    along, side = CAR.rear.forces(jnp.ones_like(slips), slips, angles)
    assert float(jnp.hypot(along, side).max()) <= 0.8603
    sliding = CAR.rear.forces(jnp.ones(2), jnp.asarray([0.0, 1.0]), jnp.full(2, 0.1))[1]
    assert abs(sliding[1]) < 0.5 * abs(sliding[0])


def test_loads_at_rest_carry_the_car_and_balance():
    front, rear = CAR.body.loads
    assert front + rear == pytest.approx(5.1 * 9.81)
    assert front * CAR.body.lf == pytest.approx(rear * CAR.body.lr)


@pytest.mark.parametrize("vehicle", VEHICLES.values(), ids=VEHICLES.keys())
def test_a_car_is_the_same_in_a_mirror(vehicle):
    motion = Motion(*map(jnp.asarray, (3.0, 0.4, -1.2, 0.8, 3.2, 0.2)))
    mirrored = motion._replace(vy=-motion.vy, r=-motion.r, steer=-motion.steer)
    there = vehicle.rates(mirrored) * jnp.asarray([1.0, -1.0, -1.0])
    np.testing.assert_allclose(there, vehicle.rates(motion), atol=1e-12)


@pytest.mark.parametrize("vehicle", VEHICLES.values(), ids=VEHICLES.keys())
def test_rates_and_slopes_are_finite_at_a_standstill(vehicle):
    still = jnp.zeros(6)
    assert np.isfinite(vehicle.rates(Motion(*still))).all()
    assert np.isfinite(jax.jacfwd(lambda v: vehicle.rates(Motion(*v)))(still)).all()


def test_a_network_adds_nothing_at_first():
    motion = Motion(*map(jnp.asarray, (3.0, 0.4, -1.2, 0.8, 3.2, 0.2)))
    np.testing.assert_array_equal(corrected(LINEAR, 8, jax.random.key(0)).rates(motion), LINEAR.rates(motion))


def test_track_coordinates_agree_with_the_plane():
    """The same drive, integrated in x, y and the heading by SciPy."""
    u = jnp.asarray([3.0, 0.1])
    x = car.rolling(0.0, 2.5)
    rates = jax.jit(lambda v, wheel, steer: CAR.rates(Motion(*v, jnp.asarray(0.8), wheel, steer)))

    def plane(t, z):
        _, _, heading, vx, vy, r, wheel, steer = z
        body = CAR.body
        pose = vx * np.cos(heading) - vy * np.sin(heading), vx * np.sin(heading) + vy * np.cos(heading), r
        actuators = (u[0] - wheel) / body.wheel_lag, (u[1] - steer) / body.steer_lag
        return [*pose, *rates(z[3:6], wheel, steer), *actuators]

    start = [*TRACK.place(x[0], x[1]), float(TRACK.heading_at(x[0])), *x[3:6], x[7], x[8]]
    steps = 15
    end = solve_ivp(plane, (0.0, steps * car.DT), start, rtol=1e-9, atol=1e-9).y[:, -1]
    step = jax.jit(lambda x: car.step(x, u, 0, THETA))
    for _ in range(steps):
        x = step(x)
    np.testing.assert_allclose(TRACK.place(x[0], x[1]), end[:2], atol=2e-4)
    assert float(TRACK.heading_at(x[0]) + x[2]) == pytest.approx(end[2], abs=1e-3)
    np.testing.assert_allclose(x[3:6], end[3:6], atol=1e-3)


def test_a_car_has_limits_and_a_control_step_of_its_own():
    slow = THETA._replace(limits=car.Limits((0.5, -0.3), (2.0, 0.3)), dt=0.02)
    low, high = car.controller(slow, HORIZON).problem.bounds
    assert low.tolist() == [[0.5, -0.3]] * HORIZON and high.tolist() == [[2.0, 0.3]] * HORIZON
    assert car.follow(CORNERING, slow, 5.0)[0] == 2.0
    u, step = jnp.asarray([3.4, 0.15]), jax.jit(lambda x, dt: car.step(x, u, 0, slow._replace(dt=dt)))
    np.testing.assert_allclose(step(CORNERING, 0.02), step(step(CORNERING, 0.01), 0.01), atol=1e-3)
    plant = _plain_plant(dt=0.02)
    np.testing.assert_allclose(_run(plant, CORNERING, u, 1), step(CORNERING, 0.02), atol=1e-3)
    with pytest.raises(ValueError, match="less than a control step"):
        _plain_plant(dt=0.02, delay=0.025)
    with pytest.raises(ValueError, match="dt must be positive"):
        _plain_plant(dt=0.0)
    with pytest.raises(ValueError, match=r"plant.dt is 0.02 s, and that of the controller's theta 0.033 s"):
        racing.race(plant, car.controller(THETA, HORIZON), CORNERING, 2, jax.random.key(0))


def _with_defects(horizon):
    """The MPC whose prediction is off by e (N, 9): parameters are (Theta, e)."""
    p = car.problem(horizon, car.LIMITS)
    return Problem(
        dynamics=lambda x, u, k, theta: p.dynamics(x, u, k, theta[0]) + theta[1][k],
        stage_cost=lambda x, u, k, theta: p.stage_cost(x, u, k, theta[0]),
        terminal_cost=lambda x, theta: p.terminal_cost(x, theta[0]), horizon=horizon, u_min=p.u_min, u_max=p.u_max,
        constraints=lambda x, u, k, theta: p.path_rows(x, u, k, theta[0]),
        terminal_constraints=lambda x, theta: p.terminal_rows(x, theta[0]), softening=p.softening,
    )  # fmt: skip


def test_sensitivities_are_central_differences_with_walls_active():
    problem, solver = _with_defects(HORIZON), SQP(tol=1e-11)
    x0 = car.rolling(8.0, 3.0)
    theta = (THETA, jnp.zeros((HORIZON, 9)))
    begin = car.first_guess(HORIZON)(x0, THETA)
    sol = solve(problem, theta, x0, guess=begin, solver=solver)
    assert np.sum(np.asarray(sol.mus.path) > 1.0) >= 2  # walls hold the plan
    S = np.asarray(error_sensitivity(problem, theta, sol))
    first = jax.jit(lambda e: solve(problem, (THETA, e), x0, guess=sol, solver=solver, throw=False).us[0])
    rng, h = np.random.default_rng(0), 1e-6
    for _ in range(4):
        e = rng.normal(size=(HORIZON, 9)) * np.asarray([1, 1, 1, 1, 1, 1, 0, 1, 1])
        slope = (first(jnp.asarray(h * e)) - first(jnp.asarray(-h * e))) / (2 * h)
        np.testing.assert_allclose(np.einsum("jki,ki->j", S, e), slope, rtol=1e-5, atol=1e-5 * np.abs(S).max())


def _plain_plant(**changes):
    nothing = dict(height=0.0, load_sensitivity=0.0, delay=1e-9)
    friction = jnp.full_like(TRACK.curvature, 0.8)
    return racing.RacingPlant(CAR, TRACK, friction, **{**nothing, **changes})


def _run(plant, x, u, steps=10):
    step, state = eqx.filter_jit(plant.step), plant.start(x)
    for _ in range(steps):
        state = step(state, u)
    return state.x


def test_a_plant_without_its_extras_is_the_model():
    u = jnp.asarray([3.4, 0.15])
    x, found = CORNERING, _run(_plain_plant(), CORNERING, u, 3)  # the wall is not reached
    small = jax.jit(lambda x: rk4(car.ode, car.DT / 4)(x, u, 0, THETA))  # the plant's own steps
    for _ in range(3 * 4):
        x = small(x)
    np.testing.assert_allclose(found, x, atol=1e-6)


@pytest.mark.parametrize(
    "changes", [{"height": 0.06}, {"height": 0.06, "load_sensitivity": 0.3}, {"delay": 0.02}, {"friction": 0.6}]
)
def test_every_extra_of_the_plant_does_something(changes):
    if "friction" in changes:
        changes = {"friction": jnp.full_like(TRACK.curvature, changes["friction"])}
    plain = _plain_plant()
    other = eqx.tree_at(lambda p: [getattr(p, name) for name in changes], plain, list(changes.values()))
    if "load_sensitivity" in changes:  # beside what the height does
        plain = eqx.tree_at(lambda p: p.height, plain, 0.06)
    u = jnp.asarray([3.4, 0.3])
    assert np.abs(_run(plain, CORNERING, u) - _run(other, CORNERING, u))[:6].max() > 1e-3


def test_braking_loads_the_front_axle():
    front, rear = racing._grips(_plain_plant(height=0.06), jnp.asarray(-4.0), jnp.asarray(0.0))
    rest = CAR.body.loads
    assert front - rest[0] == pytest.approx(5.1 * 0.06 * 4.0 / 0.33) and rear + front == pytest.approx(sum(rest))


def test_walls_push_back_and_take_speed():
    x = car.rolling(0.5, 3.0).at[1].set(0.27).at[2].set(0.5)
    plant, u = _plain_plant(), jnp.asarray([3.0, 0.0])
    step, state, depth = eqx.filter_jit(plant.step), plant.start(x), []
    for _ in range(12):
        state = step(state, u)
        depth.append(float(racing.contact(TRACK, state.x)))
    assert 0.0 < max(depth) < 0.05 and depth[-1] == 0.0 and float(jnp.hypot(*state.x[3:5])) < 2.9


def test_noise_is_measured_and_friction_is_told():
    plant = _plain_plant(noise=0.1)
    seen = plant.measure(plant.start(CORNERING), jax.random.key(0))
    assert float(seen[6]) == 0.8 and np.all(np.delete(np.asarray(seen - CORNERING), 6) != 0.0)


def test_crossings_are_between_samples():
    s = np.array([0.0, 1.0, 3.0, 2.9, 4.0])
    np.testing.assert_allclose(racing.crossings(s, np.array([0.5, 2.0, 4.0])), car.DT * np.array([0.5, 1.5, 4.0]))
    assert racing.crossings(s, np.array([4.1]))[0] == np.inf
    np.testing.assert_allclose(racing.crossings(s, np.array([2.0]), dt=0.1), 0.15)


def test_patches_are_those_of_their_seed():
    one, two = racing.patches(TRACK, 0.8, 1), racing.patches(TRACK, 0.8, 2)
    np.testing.assert_array_equal(one, racing.patches(TRACK, 0.8, 1))
    assert np.abs(one - two).max() > 0.01 and np.abs(one - 0.8).max() <= 0.45


def test_the_closed_loop_drives_fast_and_clear_of_the_walls():
    plant = eqx.tree_at(lambda p: p.friction, _plain_plant(height=0.06, delay=0.012), racing.patches(TRACK, 0.8, 0))
    ran = racing.race(plant, car.controller(THETA, 40), car.rolling(0.0, 2.0), 100, jax.random.key(0))
    assert int(jnp.sum(ran.results != RESULTS.successful)) == 0 and float(ran.contact.max()) == 0.0
    assert float(ran.xs[-1, 0]) > 8.0  # 6.6 m at the speed that it begins with


class Moved(eqx.Module):
    """A controller of which one control is moved once."""

    own: object
    at: object
    by: object

    def init(self, x):
        return self.own.init(x)

    def __call__(self, x, k, memory):
        u, memory, info = self.own(x, k, memory)
        return (
            jnp.clip(u + jnp.where(k == self.at, 1.0, 0.0) * self.by, *map(jnp.asarray, car.LIMITS)),
            memory,
            info,
        )


def test_branches_are_differences_of_whole_drives():
    plant = racing.RacingPlant(CAR, TRACK, racing.patches(TRACK, 0.8, 3))
    driver, begin, key = car.controller(THETA, HORIZON), car.rolling(0.0, 2.0), jax.random.key(0)
    step, steps_on, moments = jnp.asarray([0.05, 0.01]), 12, jnp.asarray([20, 41])
    found = racing.branches(plant, driver, begin, 60, key, moments, steps_on, step)

    def cost(at, by):
        ran = racing.race(plant, Moved(driver, jnp.asarray(at), by), begin, 60, key)
        states, us = ran.xs[at : at + steps_on], ran.us[at : at + steps_on]
        ell = jax.vmap(lambda x, u: car.stage_cost(x, u, 0, THETA))(states, us)
        beyond = np.maximum(np.asarray(jax.vmap(lambda x: car.walls(x, THETA))(states)), 0.0)
        return float(ell.sum()) + float((200.0 * beyond + 1000.0 * beyond**2).sum())

    for i, at in enumerate(moments.tolist()):
        now = cost(at, jnp.zeros(2))
        for j in range(2):
            by = step * jnp.eye(2)[j]
            ahead, behind = cost(at, by), cost(at, -by)
            if np.isfinite(found.curvature[i, j]):
                assert float(found.slope[i, j]) == pytest.approx(
                    (ahead - behind) / (2 * float(step[j])), rel=1e-5, abs=1e-4
                )
                second = (ahead - 2 * now + behind) / float(step[j]) ** 2
                assert float(found.curvature[i, j]) == pytest.approx(second, rel=1e-3, abs=1e-2)
    assert np.isfinite(found.curvature).sum() >= 2


def by_hand(vx, vy, r, friction, wheel, steer):
    """(D24) with the published tyres, in NumPy alone."""
    m, inertia, lf, lr = 5.1, 0.14583, 0.15683, 0.17317

    def tyre(load, slip, angle, slip_peak, angle_peak, side, along):
        sx, sa = slip / slip_peak, np.rad2deg(angle) / angle_peak
        rho = np.hypot(sx, sa)
        return load * sx / rho * magic(rho * slip_peak, *along), -load * sa / rho * magic(rho * angle_peak, *side)

    v_front = vx * np.cos(steer) + (vy + lf * r) * np.sin(steer)
    a_front, a_rear = np.arctan2(vy + lf * r, vx) - steer, np.arctan2(vy - lr * r, vx)
    weight = friction * m * 9.81 / (lf + lr)
    xf, yf = tyre(weight * lr, wheel / v_front - 1, a_front, 0.12260, 8.1564,
                  (0.057084, 0.58888, 0.85324, 0.23114), (2.83313, 0.68991, 0.80986, 0.00658))  # fmt: skip
    xr, yr = tyre(weight * lf, wheel / vx - 1, a_rear, 0.13232, 7.5577,
                  (0.069187, 0.59321, 0.86027, 4.28465), (4.67455, 1.57920, 0.85531, 7.29611))  # fmt: skip
    drag = 8.477e-4 + 5.926e-4 * vx + 2.761e-4 * vx**2
    side = yf * np.cos(steer) + xf * np.sin(steer)
    along = xr + xf * np.cos(steer) - yf * np.sin(steer) - drag
    return along / m + vy * r, (yr + side) / m - vx * r, (lf * side - lr * yr) / inertia


@pytest.mark.parametrize("motion", [(3.47, 0.78, -1.07, 0.8, 3.2, -0.5), (2.0, -0.2, 2.5, 0.9, 2.4, 0.3)])
def test_the_car_accelerates_as_its_equations_say(motion):
    found = CAR.rates(Motion(*map(jnp.asarray, motion)))
    np.testing.assert_allclose(found, by_hand(*motion), rtol=1e-10)


@pytest.mark.parametrize("vehicle", [CAR, LINEAR], ids=["tyres", "linear"])
def test_a_car_that_stands_stays_and_one_that_rolls_slowly_goes_on(vehicle):
    still = vehicle.rates(Motion(*map(jnp.asarray, (0.0, 0.0, 0.0, 0.8, 0.0, 0.4))))
    np.testing.assert_allclose(still, 0.0, atol=1e-6)
    slow = vehicle.rates(Motion(*map(jnp.asarray, (0.4, 0.0, 0.0, 0.8, 0.4, 0.0))))
    np.testing.assert_allclose(slow, 0.0, atol=1e-3)


def test_linear_tyres_and_wheels_that_roll():
    along, side = LinearTyre(6.0, 4.0).forces(*map(jnp.asarray, (10.0, 0.1, 0.05)))
    assert (float(along), float(side)) == pytest.approx((6.0, -2.0))
    turning = 2.0 * np.tan(0.2) / 0.33
    rates = Kinematic().rates(Motion(*map(jnp.asarray, (2.0, 0.0, turning, 0.8, 2.0, 0.2))))
    assert float(rates[0]) == 0.0 and float(rates[2]) == pytest.approx(0.0, abs=1e-12)


def test_a_delay_longer_than_a_control_step_is_refused():
    with pytest.raises(ValueError, match="delay must lie in"):
        racing.RacingPlant(CAR, TRACK, racing.patches(TRACK, 0.8, 3), delay=0.05)


def test_a_car_that_has_stood_for_a_second_is_put_back():
    plant = racing.RacingPlant(CAR, TRACK, racing.patches(TRACK, 0.8, 3))
    spun = car.rolling(3.0, 0.0).at[2].set(2.5).at[1].set(0.1)
    step, state, stood = eqx.filter_jit(plant.step), plant.start(spun), []
    for _ in range(40):
        state = step(state, jnp.asarray([0.01, -0.5]))
        stood.append(float(state.x[2]))
    assert abs(stood[28] - 2.5) < 0.3 and abs(stood[29]) < 1e-12  # along the track again
    np.testing.assert_allclose(float(state.x[0]), 3.0, atol=0.3)
