"""Models of a robot: their physics, their derivatives against automatic ones, and the numbers of tests/golden."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import mujoco
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sartor
from cadelac import DATA
from sartor.labels import label
from sartor.models.base import ArmDynamics, Nominal, Theta, history, rest, trainable
from sartor.models.lagrangian import CaDeLaC
from sartor.models.mjcf import from_mujoco
from sartor.models.mlp import ResidualMLP
from sartor.models.rigid_body import forward_dynamics, frame_positions, inverse_dynamics, mass_matrix
from sartor.systems import panda

# A body without joints marks the centre of mass of each link.
ARM = """
<mujoco>
  <worldbody>
    <body name="upper">
      <joint name="shoulder" axis="0 1 0" armature="0.1"/>
      <inertial mass="1.5" pos="0 0 0.2" diaginertia="0.02 0.02 0.01"/>
      <body name="upper_centre" pos="0 0 0.2"/>
      <body name="lower" pos="0 0 0.4">
        <joint name="elbow" axis="0 0.8 0.6" armature="0.05"/>
        <inertial mass="0.7" pos="0.02 0 0.1" diaginertia="0.01 0.01 0.01"/>
        <body name="lower_centre" pos="0.02 0 0.1"/>
      </body>
    </body>
  </worldbody>
</mujoco>
"""
N, NZ, H = 2, 3, 5
SIZES = {"widths": (6, 5), "num_contexts": NZ, "hidden": 4, "num_layers": 2, "history_length": H}
BODY = from_mujoco(mujoco.MjModel.from_xml_string(ARM))
KEY = jax.random.key(7)
SMALL = CaDeLaC(BODY, **SIZES, key=KEY)
ALL = [SMALL, ResidualMLP(BODY, **SIZES, key=KEY), Nominal(BODY)]
NAMES = [type(model).__name__ for model in ALL]


def numbers(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def close(value, reference, tolerance=1e-11):
    value, reference = np.asarray(value), np.asarray(reference)
    np.testing.assert_allclose(value, reference, rtol=0, atol=tolerance * max(1.0, np.abs(reference).max()))


def context_of(model, seed=4):
    return model.context(numbers(H, 3 * N, seed=seed))


# --- Sizes -----------------------------------------------------------------------------------------------------------


@functools.cache
def published():
    return CaDeLaC(from_mujoco(panda.mj_model(damping=0.0)), key=KEY)


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(eqx.filter(tree, eqx.is_inexact_array)))


def test_the_default_has_the_published_size():
    """8299 as published; Equinox has one bias in a cell of an LSTM where PyTorch has two that only act as their sum."""
    model = published()
    bias = 4 * 10  # of one of the 5 cells
    assert count(model.encoder) == 4950 - 5 * bias
    assert count([model.inertia, model.potential]) == 8299 - 4950
    assert count(eqx.filter(model, trainable(model))) == 8299 - 5 * bias == 8099
    assert model.history_length == 15
    assert jax.eval_shape(model.context, jnp.zeros((15, 21))).shape == (10,)


def test_the_robot_is_not_trained():
    for model in ALL:
        free = eqx.filter(model, trainable(model))
        assert not jax.tree.leaves(free.body)
        assert count(free) == count(model) - count(BODY)
    assert count(eqx.filter(ALL[2], trainable(ALL[2]))) == 0


def test_frozen_fields_are_not_trained_and_must_exist():
    model = published()
    free = eqx.filter(model, trainable(model, ("inertia", "encoder")))
    assert not jax.tree.leaves([free.body, free.inertia, free.encoder])
    assert count(free) == count(model.potential)
    with pytest.raises(ValueError, match="frozen names 'mass', but a CaDeLaC has .*inertia"):
        trainable(model, ("mass",))


@pytest.mark.parametrize("cls", [CaDeLaC, ResidualMLP])
@pytest.mark.parametrize("name", ["num_contexts", "hidden", "num_layers", "history_length"])
def test_sizes_below_one_are_refused(cls, name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, not 0"):
        cls(BODY, **SIZES | {name: 0}, key=KEY)


@pytest.mark.parametrize("cls", [CaDeLaC, ResidualMLP])
def test_networks_may_have_any_layers(cls):
    with pytest.raises(ValueError, match="widths must be at least 1, not 0"):
        cls(BODY, **SIZES | {"widths": (4, 0)}, key=KEY)
    for widths in ((), (3,), (4, 3, 2)):
        model = eqx.filter_eval_shape(lambda widths=widths: cls(BODY, **SIZES | {"widths": widths}, key=KEY))
        network = model.inertia if cls is CaDeLaC else model.network
        assert [layer.out_features for layer in network.layers[:-1]] == list(widths)
        residual = eqx.filter_eval_shape(cls.residual, model, *numbers(3, N), jnp.ones(NZ))
        assert residual.shape == (N,)


def test_initial_values_are_the_published_ones():
    """Xavier uniform weights and biases of 0.01 in the two networks."""
    model = published()
    for network in (model.inertia, model.potential):
        for layer in network.layers:
            bound = np.sqrt(6 / sum(layer.weight.shape))
            assert np.all(layer.bias == 0.01) and np.all(np.abs(layer.weight) <= bound)
            if layer.weight.size > 100:
                assert np.std(layer.weight) == pytest.approx(bound / np.sqrt(3), rel=0.15)
    assert not eqx.tree_equal(SMALL, CaDeLaC(BODY, **SIZES, key=jax.random.key(1)))


# --- Physics of the Lagrangian residual ------------------------------------------------------------------------------


@jax.jit
def random_physics(seed, scale, state):
    """Inertia and power of the Coriolis term of a model with random parameters."""
    leaves, structure = jax.tree.flatten(SMALL)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    draw = [scale * jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)]
    model = eqx.tree_at(lambda m: m.body, jax.tree.unflatten(structure, draw), BODY)
    q, qd, z = state[:N], state[N : 2 * N], state[2 * N :]
    M, M_dot = jax.jvp(lambda q: model.residual_mass(q, z), (q,), (qd,))
    still = jnp.zeros(N)
    coriolis = model.residual(q, qd, still, z) - model.residual(q, still, still, z)
    return M, qd @ M_dot @ qd, qd @ coriolis


states = st.lists(st.floats(-5, 5), min_size=2 * N + NZ, max_size=2 * N + NZ).map(np.array)


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**31 - 1), scale=st.floats(0.01, 3), state=states)
def test_any_network_is_a_mechanical_system(seed, scale, state):
    """The inertia is symmetric and positive definite, and Ḣ - 2 C skew: Coriolis forces have no power of their own."""
    M, change, power = random_physics(seed, scale, state)
    close(M, M.T, 1e-14)
    assert np.linalg.eigvalsh(M).min() > 0
    assert np.linalg.det(M) > 0.1 ** (2 * N)  # of L Lᵀ, whose diagonal exceeds 0.1
    close(change, 2 * power, 1e-9 * max(1.0, np.abs(M).max()))


def test_energy_is_conserved_without_input():
    """Of the robot and the residual together, over 2 s, by a Runge-Kutta method of small steps."""
    z = context_of(SMALL)

    def energy(x):
        q, qd = x[:N], x[N:]
        M = mass_matrix(BODY, q) + SMALL.residual_mass(q, z)
        places = frame_positions(BODY, q)
        height = 1.5 * places["upper_centre"][2] + 0.7 * places["lower_centre"][2]
        return 0.5 * qd @ M @ qd + 9.81 * height + SMALL.potential(jnp.concatenate([jnp.cos(q), jnp.sin(q), z]))[0]

    step = ArmDynamics(1e-3)

    @jax.jit
    def run(x):
        def advance(x, _):
            x = step(x, jnp.zeros(N), 0, Theta(SMALL, z, None))
            return x, (x, energy(x))

        return jax.lax.scan(advance, x, None, length=2000)[1], energy(x)

    (xs, energies), start = run(jnp.asarray([2.0, -0.5, 0.0, 1.0]))
    assert np.ptp(xs[:, 0]) > 0.5  # it does move
    np.testing.assert_allclose(energies, start, atol=1e-9)


# --- The residual and its derivatives --------------------------------------------------------------------------------


def euler_lagrange(q, qd, qdd, networks):
    """d/dt ∂L/∂q̇ - ∂L/∂q of L = ½ q̇ᵀ H q̇ - P, all by automatic differentiation."""
    inertia, potential, z = networks

    def lagrangian(q, qd):
        a = jnp.concatenate([jnp.cos(q), jnp.sin(q), z])
        y = inertia(a)
        L = jnp.zeros((N, N)).at[np.diag_indices(N)].set(jax.nn.softplus(y[:N]) + 0.1)
        L = L.at[np.tril_indices(N, -1)].set(y[N:])
        return 0.5 * qd @ L @ L.T @ qd - potential(a)[0]

    _, rate = jax.jvp(jax.grad(lagrangian, argnums=1), (q, qd), (qd, qdd))
    return rate - jax.grad(lagrangian)(q, qd)


def residual(q, qd, qdd, networks):
    inertia, potential, z = networks
    return eqx.tree_at(lambda m: (m.inertia, m.potential), SMALL, (inertia, potential)).residual(q, qd, qdd, z)


POINT = (*numbers(3, N, seed=5), (SMALL.inertia, SMALL.potential, numbers(NZ, seed=6)))


@functools.cache
def derivatives(fn, mode):
    """Value and derivatives in q, q̇, q̈, z and all parameters of both networks."""
    derive = {"forward": jax.jacfwd, "reverse": jax.jacrev}[mode]
    return jax.jit(lambda *args: (fn(*args), derive(fn, argnums=(0, 1, 2, 3))(*args)))(*POINT)


@pytest.mark.parametrize("mode", ["forward", "reverse"])
def test_the_residual_and_its_derivatives_are_those_of_euler_and_lagrange(mode):
    ours, plain = derivatives(residual, mode), derivatives(euler_lagrange, "forward")
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
        close(a, b)


def test_second_derivatives_of_the_residual_are_those_of_euler_and_lagrange():
    v = numbers(N, seed=8)

    def hessian(fn):
        along = lambda q, qd, qdd, z: v @ fn(q, qd, qdd, (*POINT[3][:2], z))
        return jax.jit(jax.hessian(along, argnums=(0, 1, 2, 3)))(*POINT[:3], POINT[3][2])

    for a, b in zip(jax.tree.leaves(hessian(residual)), jax.tree.leaves(hessian(euler_lagrange)), strict=True):
        close(a, b)


@eqx.filter_jit
def outputs(model, q, qd, a, z):
    """All that a model says: shared by the tests below."""
    still, torque = jnp.zeros_like(a), model.torque(q, qd, a, z)
    return {
        "residual": model.residual(q, qd, a, z),
        "residual without acceleration": model.residual(q, qd, still, z),
        "slope in the acceleration": jax.jacfwd(lambda a: model.residual(q, qd, a, z))(a),
        "residual mass": model.residual_mass(q, z),
        "torque": torque,
        "acceleration of the torque": model.acceleration(q, qd, torque, z),
        "acceleration": model.acceleration(q, qd, a, z),
        "nominal torque": inverse_dynamics(model.body, q, qd, a),
        "nominal acceleration": forward_dynamics(model.body, q, qd, a),
    }


Q, QD, QDD = numbers(3, N, seed=9)
OF_MODEL = pytest.mark.parametrize("model", ALL, ids=NAMES)


@OF_MODEL
def test_the_residual_is_linear_in_the_acceleration_with_its_mass(model):
    out = outputs(model, Q, QD, QDD, context_of(model))
    close(out["slope in the acceleration"], out["residual mass"])
    close(out["residual"], out["residual without acceleration"] + out["residual mass"] @ QDD)


@OF_MODEL
def test_torque_and_acceleration_are_inverse_to_each_other(model):
    out = outputs(model, Q, QD, QDD, context_of(model))
    close(out["torque"], out["nominal torque"] + out["residual"])
    close(out["acceleration of the torque"], QDD)


def test_the_plain_residual_is_its_network():
    model = ALL[1]
    z = context_of(model)
    out = outputs(model, Q, QD, QDD, z)
    assert z.shape == (NZ,)
    close(out["residual"], model.network(jnp.concatenate([jnp.cos(Q), jnp.sin(Q), QD, z])))
    close(out["residual mass"], np.zeros((N, N)))


def test_the_nominal_model_is_the_robot():
    model = ALL[2]
    z = model.context(rest(Q, model.history_length))
    out = outputs(model, Q, QD, QDD, z)
    assert z.shape == (0,) and model.history_length == 0
    close(out["torque"], out["nominal torque"])
    close(out["acceleration"], out["nominal acceleration"])
    close(out["residual"], np.zeros(N))


def test_derivatives_of_the_acceleration_are_differences():
    """In the state, the torque, the context, and every parameter that is trained, along one direction."""
    model = SMALL
    free, fixed = eqx.partition(model, trainable(model))
    args = (*numbers(3, N, seed=11), numbers(NZ, seed=12), free)
    d = jax.tree.map(lambda leaf: jnp.asarray(np.random.default_rng(leaf.size).normal(size=leaf.shape)), args)
    v = numbers(N, seed=13)

    def acceleration(q, qd, tau, z, free):
        model = eqx.combine(free, fixed)
        return model.acceleration(q, qd, tau, z + model.context(jnp.ones((H, 3 * N))))

    @jax.jit
    def with_derivatives(args):
        value, along = jax.jvp(acceleration, args, d)
        return value, along, jax.grad(lambda args: v @ acceleration(*args))(args)

    _, along, gradient = with_derivatives(args)
    moved = lambda size: with_derivatives(jax.tree.map(lambda leaf, d: leaf + size * d, args, d))[0]
    close(along, (moved(1e-5) - moved(-1e-5)) / 2e-5, 1e-7)
    pairs = zip(jax.tree.leaves(gradient), jax.tree.leaves(d), strict=True)
    close(sum(np.sum(np.asarray(g) * d) for g, d in pairs), v @ along, 1e-9)


@OF_MODEL
def test_backward_gradients_are_the_forward_ones(model):
    """`ArmDynamics(reverse=True)`, in the state, the control, the context and every trained number."""
    x, u, lam = numbers(2 * N, seed=1), numbers(N, seed=2), numbers(2 * N, seed=3)
    free, fixed = eqx.partition(model, trainable(model))

    @eqx.filter_jit
    def gradients(free, x, u, z):
        def value(varied, reverse):
            free, x, u, z = varied
            theta = Theta(eqx.combine(free, fixed), z, None)
            return lam @ ArmDynamics(0.05, reverse)(x, u, 0, theta)

        varied = (free, x, u, z)
        return eqx.filter_grad(value)(varied, True), eqx.filter_grad(value)(varied, False)

    backward, forward = gradients(free, x, u, context_of(model))
    for a, b in zip(jax.tree.leaves(backward), jax.tree.leaves(forward), strict=True):
        if a.size:  # the nominal robot has no context
            close(a, b)


@OF_MODEL
def test_a_step_expands_itself_as_automatic_differentiation_and_differences_do(model):
    w, lam, z = numbers(3 * N, seed=1), numbers(2 * N, seed=3), context_of(model)
    theta, dynamics = Theta(model, z, None), ArmDynamics(0.05)
    step = lambda w: dynamics(w[: 2 * N], w[2 * N :], 0, theta)

    @eqx.filter_jit
    def both(w):
        return (step(w), jax.jacfwd(step)(w)), dynamics.expand_step(w[: 2 * N], w[2 * N :], 0, theta, lam)

    h = 1e-4
    slope = lambda w: lam @ both(w)[0][1]
    differences = jnp.stack([(slope(w + h * e) - slope(w - h * e)) / (2 * h) for e in jnp.eye(3 * N)])
    expected, (x_next, J, hessian) = both(w)
    close(hessian, differences, 1e-7)
    close(x_next, expected[0])
    close(J, expected[1])


def test_single_precision_stays_single():
    def everything(model, q, qd, a):
        z = model.context(rest(q, H))
        step = ArmDynamics(0.02)(jnp.concatenate([q, qd]), a, 0, Theta(model, z, None))
        J = jax.jacfwd(model.residual, argnums=(0, 1, 2, 3))(q, qd, a, z)
        x = jnp.concatenate([q, qd])
        expansion = ArmDynamics(0.02).expand_step(x, a, 0, Theta(model, z, None), x)
        return z, model.torque(q, qd, a, z), model.acceleration(q, qd, a, z), step, J, expansion

    for model in ALL:
        single = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), model)
        outputs = eqx.filter_eval_shape(everything, single, *numbers(3, N).astype(jnp.float32))
        assert {leaf.dtype for leaf in jax.tree.leaves(outputs)} == {jnp.dtype("float32")}


# --- History and context ---------------------------------------------------------------------------------------------


def lstm(cell, rows):
    """Hochreiter and Schmidhuber's cell, in numpy: input, forget, cell and output gates in this order."""
    sigmoid = lambda a: 1 / (1 + np.exp(-a))
    h = c = np.zeros(cell.hidden_size)
    out = []
    for row in rows:
        i, f, g, o = np.split(cell.weight_ih @ row + cell.weight_hh @ h + cell.bias, 4)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        out.append(h)
    return np.array(out)


def test_the_context_is_that_of_stacked_lstms():
    past = numbers(H, 3 * N, seed=16)
    for model in ALL[:2]:
        rows = np.asarray(past)
        for cell in jax.tree.map(np.asarray, model.encoder.cells, is_leaf=eqx.is_array):
            rows = lstm(cell, rows)
        readout = model.encoder.readout
        close(model.context(past), readout.weight @ rows[-1] + readout.bias)


def log_of(model, z, dt, num_steps, num_fine=8):
    """A log at a control step dt of a robot that is what the model says, integrated in finer steps."""
    fine = ArmDynamics(dt / num_fine)
    us = jnp.stack([jnp.sin(jnp.arange(num_steps) * dt * w) for w in (3.0, 5.0)], 1)

    def advance(x, u):
        x = jax.lax.scan(lambda x, _: (fine(x, u, 0, Theta(model, z, None)), None), x, None, length=num_fine)[0]
        return x, x

    x0 = jnp.asarray([0.3, -0.4, 0.5, 0.2])
    return jnp.concatenate([x0[None], jax.lax.scan(advance, x0, us)[1]]), us


@eqx.filter_jit
def past_of(model, z, dt, num_steps):
    """A log, its history, and the residual torques of the model at the same points."""
    xs, us = log_of(model, z, dt, num_steps)
    past, qdd = history(BODY, xs, us, dt), (xs[1:, N:] - xs[:-1, N:]) / dt
    residuals = jax.vmap(lambda x, a: model.residual(x[:N], x[N:], a, z))(past[:, : 2 * N], qdd)
    return xs, past, residuals


def test_a_nominal_robot_leaves_nothing_out_in_the_limit_of_small_steps():
    errors = []
    for dt in (0.02, 0.01):
        xs, past, _ = past_of(ALL[2], jnp.zeros(0), jnp.asarray(dt), 20)
        assert past.shape == (20, 3 * N)
        close(past[:, : 2 * N], (xs[1:] + xs[:-1]) / 2)
        errors.append(np.abs(past[:10, 2 * N :]).max())
    assert errors[0] < 5e-2  # of 10 Nm
    assert errors[1] < errors[0] / 3  # second order: about a fourth


def test_the_history_shows_what_the_nominal_robot_leaves_out():
    """The residual torques of the model that made the log, as far as the midpoint is exact."""
    _, past, residuals = past_of(SMALL, context_of(SMALL), jnp.asarray(0.01), 20)
    close(past[:, 2 * N :], residuals, 5e-3)
    assert np.abs(residuals).max() > 0.1


def test_a_resting_robot_has_left_nothing_out():
    past = rest(Q, H)
    assert past.shape == (H, 3 * N)
    np.testing.assert_array_equal(past, np.tile(np.concatenate([Q, np.zeros(2 * N)]), (H, 1)))

    @jax.jit
    def of_log(q):
        """The log of a robot that rests, with the torques that hold it."""
        still = jnp.zeros(N)
        xs = jnp.tile(jnp.concatenate([q, still]), (H + 1, 1))
        return history(BODY, xs, jnp.tile(inverse_dynamics(BODY, q, still, still), (H, 1)), 0.02)

    close(of_log(Q), past)


# --- The golden arm --------------------------------------------------------------------------------------------------


@functools.cache
def golden_model():
    """The robot and the networks of tests/golden; contexts are given there, so the encoder does not matter."""
    text = lambda values: " ".join(repr(float(value)) for value in np.ravel(values))
    bodies = "".join(
        f'''<body pos="{text(DATA["nom_frame_pos"][i])}" quat="{text(DATA["nom_frame_quat_wxyz"][i])}">
        <joint axis="0 0 1" armature="{text(DATA["armature"])}"/>
        <inertial mass="{text(DATA["nom_mass"][i])}" pos="{text(DATA["nom_com"][i])}"
         fullinertia="{text(DATA["nom_inertia"][i])}"/>'''
        for i in range(7)
    )
    xml = f"<mujoco><worldbody>{bodies}{'</body>' * 7}</worldbody></mujoco>"
    body = from_mujoco(mujoco.MjModel.from_xml_string(xml))
    layers = lambda m: [*m.inertia.layers, *m.potential.layers]
    places = lambda m: [leaf for layer in layers(m) for leaf in (layer.weight, layer.bias)]
    values = [
        jnp.asarray(DATA[f"net_{network}_{kind}{i}"])
        for network in ("inertia", "potential")
        for i in (1, 2, 3)
        for kind in "Wb"
    ]
    return eqx.tree_at(lambda m: (m.body, *places(m)), published(), (body, *values))


def test_the_panda_is_the_golden_robot():
    """But for the hand and fingers on the last link, which are rounded there."""
    ours, golden = published().body, golden_model().body
    for name in ("axes", "positions", "rotations", "masses", "coms", "inertias", "armatures", "dampings", "gravity"):
        np.testing.assert_allclose(getattr(ours, name), getattr(golden, name), atol=1e-6)


@functools.cache
def golden_motion():
    """Along the golden trajectories: accelerations at first, states reached, and costates taken back a step."""

    @eqx.filter_jit
    @eqx.filter_vmap(in_axes=(None, 0, 0, 0, 0))
    def move(model, xs, us, z, pi):
        step = lambda x, u: ArmDynamics(0.02)(x, u, 0, Theta(model, z, None))

        def one(x, u, pi):
            x_next, back = jax.vjp(step, x, u)
            return x_next, back(pi)

        return model.acceleration(xs[0, :7], xs[0, 7:], us[0], z), *jax.vmap(one)(xs[:-1], us, pi)

    return move(golden_model(), *(DATA[name] for name in ("xs", "us", "z", "pi")))


def test_the_arm_moves_as_the_golden_one():
    qdd, x_next, _ = golden_motion()
    close(qdd, DATA["check_qdd_x0_u0"], 1e-12)
    close(x_next[:, 0], DATA["check_F_x0_u0"], 1e-12)
    close(x_next, DATA["xs"][:, 1:], 1e-8)


def test_golden_trajectories_are_stationary_for_the_costates_there():
    """∂L/∂x_k = 0 and ∂L/∂u_k = 0: the derivatives of the model, against another program's."""
    xs, us, pi = DATA["xs"], DATA["us"], DATA["pi"]
    _, _, (slope_x, slope_u) = golden_motion()
    cost_x, cost_u = 0.02 * DATA["Q"] * (xs - DATA["ref"])[:, :-1], 0.02 * DATA["R"] * us
    size = np.abs(pi).max()
    close((cost_x + slope_x)[:, 1:] / size, pi[:, :-1] / size, 1e-7)
    close((cost_u + slope_u) / size, -DATA["lam_u"] / size, 1e-7)


@pytest.fixture(scope="module")
def golden_labels():
    """Labels of some samples, of which one has an active bound in stage 0, by one compiled function."""
    active = np.flatnonzero(DATA["n_active_u0"] > 0)[:1]
    which = np.concatenate([np.flatnonzero(DATA["n_active_u0"] == 0)[:3], active])
    problem, model = panda.problem(ArmDynamics(0.02)), golden_model()

    def one(z, reference, x0):
        start = sartor.guess(reference.at[0].set(x0), jnp.zeros((12, 7)))
        return label(problem, Theta(model, z, reference), x0, guess=start)

    data = {name: DATA[name][which] for name in ("z", "ref", "x0", "du0_de", "dJdu0", "lam_u")}
    return data, jax.jit(jax.vmap(one))(*(jnp.asarray(data[name]) for name in ("z", "ref", "x0")))


@pytest.mark.slow  # for compiling the exact curvature of the arm, a minute
def test_error_sensitivities_are_the_golden_ones(golden_labels):
    data, found = golden_labels
    assert np.all(found.result == sartor.RESULTS.successful)
    size = np.abs(data["du0_de"]).max((1, 2, 3), keepdims=True)
    close(found.du0_de / size, data["du0_de"] / size, 1e-5)


@pytest.mark.slow
def test_action_sensitivities_are_the_golden_ones(golden_labels):
    """The mean magnitude of the slopes at ±0.1 Nm; where a bound is active its multiplier, which is their mean."""
    data, found = golden_labels
    slopes = np.diagonal(data["dJdu0"], axis1=1, axis2=3)  # (sample, sign, joint)
    bound = np.abs(data["lam_u"][:, 0]) > 1e-8
    assert bound.any() and not bound[:3].any()
    expected = np.where(bound, np.abs(data["lam_u"][:, 0]), np.abs(slopes).mean(1))
    np.testing.assert_allclose(found.dJ_du0, expected, rtol=2e-4, atol=1e-6 * np.abs(expected).max())
