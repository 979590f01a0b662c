"""Rigid bodies against MuJoCo, and their derivatives against those of a plain recursion and differences."""

import copy
import functools
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import mujoco
import numpy as np
import pytest

from sartor.models.mjcf import from_mjcf, from_mujoco
from sartor.models.rigid_body import forward_dynamics, frame_positions, inverse_dynamics, mass_matrix
from sartor.models.torque_derivatives import torque_hessian
from sartor.systems import panda

TREES = (4, 9, 3)  # seeds; see test_the_trees_have_what_a_robot_may_have
NUM_STATES = 8


def random_tree(seed):
    """An MJCF of a tree of bodies with none, one or two joints each, and gravity along no axis."""
    rng = np.random.default_rng(seed)
    numbers = lambda *values: " ".join(f"{value:.6f}" for value in np.concatenate([np.ravel(v) for v in values]))
    parents = [-1] + [int(rng.integers(-1, i)) for i in range(1, 5)]

    def joint(body, number):
        return (
            f'<joint name="j{body}_{number}" type="{rng.choice(["hinge", "slide"])}"'
            f' axis="{numbers(rng.normal(size=3))}" pos="{numbers(0.1 * rng.normal(size=3))}"'
            f' armature="{rng.uniform(0, 0.2):.4f}" damping="{rng.uniform(0, 1):.3f}" ref="{rng.normal():.3f}"/>'
        )

    def body(i):
        joints = "".join(joint(i, number) for number in range(rng.integers(0, 3)))
        A = rng.normal(size=(3, 3))
        I = 0.01 * (A @ A.T + np.eye(3))
        I = np.trace(I) * np.eye(3) - I
        place = f'pos="{numbers(0.3 * rng.normal(size=3))}" quat="{numbers(rng.normal(size=4))}"'
        inertia = numbers(np.diag(I), I[0, 1:], I[1, 2])
        com = numbers(0.1 * rng.normal(size=3))
        return (
            f'<body name="b{i}" {place}>{joints}<inertial mass="{rng.uniform(0.5, 2):.3f}" pos="{com}"'
            f' fullinertia="{inertia}"/>{"".join(body(c) for c in range(5) if parents[c] == i)}</body>'
        )

    bodies = "".join(body(c) for c in range(5) if parents[c] == -1)
    return f"""<mujoco><compiler angle="radian"/><option gravity="1 2 -9"/><worldbody>{bodies}</worldbody></mujoco>"""


@functools.cache
def robot(name):
    """The MuJoCo model and the body of a random tree, or of the Panda with a payload ("panda") or without ("empty")."""
    if isinstance(name, int):
        mj_model = mujoco.MjModel.from_xml_string(random_tree(name))
    else:
        mj_model = panda.mj_model(panda.payloads(4)[3] if name == "panda" else None)
    return mj_model, from_mujoco(mj_model)


def states(n, seed=0):
    """q, qd, and qdd or tau, each (NUM_STATES, n)."""
    return np.random.default_rng(seed).normal(size=(3, NUM_STATES, n))


@eqx.filter_jit
@eqx.filter_vmap(in_axes=(None, 0, 0, 0))
def dynamics(body, q, qd, a):
    """Everything, with `a` as accelerations and as torques."""
    torques, M = inverse_dynamics(body, q, qd, a), mass_matrix(body, q)
    return torques, M, forward_dynamics(body, q, qd, a), frame_positions(body, q)


def assert_equal(value, reference, tolerance=1e-10):
    """To a fraction of the largest entry (at least 1)."""
    np.testing.assert_allclose(value, reference, rtol=0, atol=tolerance * max(1.0, np.abs(reference).max()))


def of_mujoco(mj_model, q, qd, a):
    """Torques, mass matrix, accelerations and places of bodies; without joint limits."""
    mj_model = copy.copy(mj_model)
    mj_model.opt.disableflags |= int(mujoco.mjtDisableBit.mjDSBL_CONSTRAINT)
    data, M = mujoco.MjData(mj_model), np.zeros((mj_model.nv, mj_model.nv))
    data.qpos[:], data.qvel[:], data.qacc[:] = q, qd, a
    mujoco.mj_inverse(mj_model, data)
    torques = data.qfrc_inverse.copy()
    data.qfrc_applied[:] = a
    mujoco.mj_forward(mj_model, data)
    mujoco.mj_fullM(mj_model, data, M)
    return torques, M, data.qacc.copy(), {mj_model.body(i).name: data.xpos[i].copy() for i in range(mj_model.nbody)}


# --- Values ----------------------------------------------------------------------------------------------------------


def test_the_trees_have_what_a_robot_may_have():
    models = [robot(seed)[0] for seed in TREES]
    assert all(4 <= m.nv <= 7 for m in models)
    assert any(np.any(m.body_jntnum == 2) for m in models)  # several joints of a body
    assert any(np.any((m.body_jntnum == 0) & (m.body_parentid > 0)) for m in models)  # a body fixed to a moving one
    assert any(np.any((m.body_jntnum == 0)[1:] & (m.body_parentid == 0)[1:]) for m in models)  # or to the world
    assert any(len(set(m.body_parentid[1:])) < m.nbody - 1 for m in models)  # branches
    for kind in (mujoco.mjtJoint.mjJNT_HINGE, mujoco.mjtJoint.mjJNT_SLIDE):
        assert any(np.any(m.jnt_type == int(kind)) for m in models)
    assert all(np.all(m.dof_damping > 0) and np.all(m.dof_armature > 0) and np.all(m.qpos0 != 0) for m in models)


@pytest.mark.parametrize("name", [*TREES, "panda", "empty"])
def test_it_is_the_robot_of_mujoco(name):
    mj_model, body = robot(name)
    q, qd, a = states(mj_model.nq)
    torques, M, accelerations, places = dynamics(body, q, qd, a)
    assert len(places) > 0 and body.nq == mj_model.nv
    for i in range(NUM_STATES):
        torques_i, M_i, accelerations_i, places_i = of_mujoco(mj_model, q[i], qd[i], a[i])
        assert_equal(torques[i], torques_i)
        assert_equal(M[i], M_i)
        assert_equal(accelerations[i], accelerations_i)
        for frame, place in places.items():
            assert_equal(place[i], places_i[frame])


def test_the_mass_matrix_is_symmetric_and_positive_definite():
    for name in (*TREES, "panda"):
        q, qd, a = states(robot(name)[1].nq)
        M = np.asarray(dynamics(robot(name)[1], q, qd, a)[1])
        assert_equal(M, M.swapaxes(1, 2), 1e-14)
        assert np.linalg.eigvalsh(M).min() > 0


def test_joints_are_those_of_the_file():
    mj_model, body = robot("panda")
    assert body.names == tuple(f"joint{i}" for i in range(1, 8)) and body.parents == (-1, 0, 1, 2, 3, 4, 5)
    assert not any(body.slides)
    np.testing.assert_array_equal(body.dampings, panda.DAMPING)
    assert body.masses.sum() == pytest.approx(mj_model.body_mass[2:].sum())  # all but the base


def test_the_panda_has_its_published_numbers():
    resting = np.zeros((NUM_STATES, 7))
    q = np.tile(panda.START, (NUM_STATES, 1))
    torques, M, _, places = dynamics(robot("empty")[1], q, resting, resting)
    np.testing.assert_allclose(torques[0], [0, -16.8211, -0.3686, 22.8678, 0.6088, 2.5992, 0.0007], atol=6e-5)
    diagonal = [0.9336, 1.7400, 1.1787, 1.1303, 0.1273, 0.1540, 0.1067]
    np.testing.assert_allclose(np.diag(M[0]), diagonal, atol=6e-5)
    np.testing.assert_allclose([M[0, 0, 2], M[0, 1, 3], M[0, 3, 5], M[0, 1, 5]], [0.8792, -0.7768, 0.1661, -0.1136],
                               atol=6e-5)  # fmt: skip
    np.testing.assert_allclose(places["end_effector"][0], [0.4555, 0, 0.4268], atol=6e-5)
    loaded = from_mujoco(panda.mj_model(panda.Payload(4.0, (0.0, 0.0, 0.0))))
    torques = dynamics(loaded, q, resting, resting)[0]
    np.testing.assert_allclose(torques[0], [0, -34.6965, -0.3686, 42.5901, 0.6088, 7.2729, 0.0007], atol=6e-5)


def test_a_robot_without_gravity():
    xml = random_tree(TREES[0]).replace('<option gravity="1 2 -9"/>', '<option><flag gravity="disable"/></option>')
    mj_model = mujoco.MjModel.from_xml_string(xml)
    body = from_mujoco(mj_model)
    np.testing.assert_array_equal(body.gravity, 0.0)
    q, qd, a = states(mj_model.nq)
    assert_equal(dynamics(body, q, qd, a)[0][0], of_mujoco(mj_model, q[0], qd[0], a[0])[0])


def test_forward_dynamics_is_the_inverse_of_inverse_dynamics():
    body = robot("panda")[1]
    q, qd, a = states(7)
    torques = dynamics(body, q, qd, a)[0]
    assert_equal(dynamics(body, q, qd, torques)[2], a)


def test_robots_batch():
    """A batch of payloads is the payloads one by one."""
    bodies = [robot(name)[1] for name in ("panda", "empty")]
    q, qd, a = states(7)
    many = jax.tree.map(lambda *leaves: jnp.stack(leaves), *bodies)
    together = eqx.filter_jit(eqx.filter_vmap(dynamics, in_axes=(0, None, None, None)))(many, q, qd, a)
    for i, body in enumerate(bodies):
        one = dynamics(body, q, qd, a)
        for x, y in zip(jax.tree.leaves(together), jax.tree.leaves(one), strict=True):
            assert_equal(x[i], y, 1e-12)


# --- Derivatives -----------------------------------------------------------------------------------------------------


def plain_inverse_dynamics(body, q, qd, qdd):
    """Newton and Euler, from link to link, in the frames of the links."""
    seen = []
    for i, parent in enumerate(body.parents):
        z, slide = body.axes[i], body.slides[i]
        K = jnp.asarray([[0.0, -z[2], z[1]], [z[2], 0.0, -z[0]], [-z[1], z[0], 0.0]])
        turn = jnp.eye(3) + jnp.sin(q[i]) * K + (1 - jnp.cos(q[i])) * K @ K
        E = (body.rotations[i] @ (jnp.eye(3) if slide else turn)).T
        p = body.positions[i] + (body.rotations[i] @ z * q[i] if slide else 0.0)
        w, wd, a = (jnp.zeros(3), jnp.zeros(3), -body.gravity) if parent < 0 else seen[parent][:3]
        a = E @ (a + jnp.cross(wd, p) + jnp.cross(w, jnp.cross(w, p)))
        w, wd = E @ w, E @ wd
        if slide:
            a = a + z * qdd[i] + 2 * jnp.cross(w, z * qd[i])
        else:
            w, wd = w + z * qd[i], wd + z * qdd[i] + jnp.cross(w, z * qd[i])
        c, I, m = body.coms[i], body.inertias[i], body.masses[i]
        force = m * (a + jnp.cross(wd, c) + jnp.cross(w, jnp.cross(w, c)))
        seen.append((w, wd, a, E, p, force, I @ wd + jnp.cross(w, I @ w) + jnp.cross(c, force)))
    forces, moments, torques = [s[5] for s in seen], [s[6] for s in seen], []
    for i in reversed(range(body.nq)):
        E, p, parent = seen[i][3], seen[i][4], body.parents[i]
        torques.append(body.axes[i] @ (forces[i] if body.slides[i] else moments[i]))
        if parent >= 0:
            passed = E.T @ forces[i]
            forces[parent] = forces[parent] + passed
            moments[parent] = moments[parent] + E.T @ moments[i] + jnp.cross(p, passed)
    return jnp.stack(torques[::-1]) + body.armatures * qdd + body.dampings * qd


TREE = TREES[0]
PHYSICAL = ("positions", "masses", "coms", "inertias", "armatures", "dampings", "gravity")


def leaves_of(body):
    """What may be changed in a body at will: not axes and rotations, which are to stay of length 1."""
    return {name: getattr(body, name) for name in PHYSICAL}


def with_leaves(body, leaves):
    return eqx.tree_at(lambda b: [getattr(b, name) for name in leaves], body, list(leaves.values()))


@functools.cache
def compiled(which):
    """Derivatives in (q, qd, a) and the leaves of the body of the tree, each compiled once."""
    body = robot(TREE)[1]

    def fn(q, qd, a, leaves):
        return {"inverse": inverse_dynamics, "plain": plain_inverse_dynamics, "forward": forward_dynamics}[
            which.split()[0]
        ](with_leaves(body, leaves), q, qd, a)

    derivative = {"jacfwd": jax.jacfwd, "jacrev": jax.jacrev}
    for word in which.split()[1:]:
        fn = derivative[word](fn, argnums=(0, 1, 2, 3))
    return jax.jit(fn)


def point(seed=3):
    return tuple(states(robot(TREE)[1].nq, seed)[:, 0])


def test_inverse_dynamics_is_the_plain_recursion():
    body = robot(TREE)[1]
    assert_equal(compiled("inverse")(*point(), leaves_of(body)), compiled("plain")(*point(), leaves_of(body)))


@pytest.mark.parametrize("mode", ["jacfwd", "jacrev"])
def test_derivatives_of_inverse_dynamics_are_those_of_the_plain_recursion(mode):
    leaves = leaves_of(robot(TREE)[1])
    ours, plain = (compiled(kind)(*point(), leaves) for kind in (f"inverse {mode}", "plain jacfwd"))
    symmetric = lambda J: J + J.swapaxes(-1, -2)  # an inertia has no other part
    ours[3]["inertias"], plain[3]["inertias"] = symmetric(ours[3]["inertias"]), symmetric(plain[3]["inertias"])
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
        assert_equal(a, b)


def test_the_derivative_in_the_accelerations_is_the_mass_matrix():
    body = robot(TREE)[1]
    J = compiled("inverse jacfwd")(*point(), leaves_of(body))[2]
    assert_equal(J, dynamics(body, *(np.tile(v, (NUM_STATES, 1)) for v in point()))[1][0])


def differences(fn, args, index, step=1e-5):
    """Central differences in entry `index` of the arguments, the new axis last."""
    columns = []
    for i in range(args[index].size):
        d = np.zeros(args[index].size)
        d[i] = step
        moved = [
            [a if j != index else np.asarray(a) + sign * d.reshape(a.shape) for j, a in enumerate(args)]
            for sign in (1, -1)
        ]
        ahead, behind = (fn(*m) for m in moved)
        columns.append(jax.tree.map(lambda x, y: (x - y) / (2 * step), ahead, behind))
    return jax.tree.map(lambda *c: np.stack(c, -1), *columns)


def test_second_derivatives_are_differences_of_first_ones():
    leaves = leaves_of(robot(TREE)[1])
    args = (*point(), leaves)
    first = lambda *args: compiled("inverse jacfwd")(*args)[:3]
    second = second_derivatives()
    for index in range(3):
        J = differences(first, args, index)
        for row in range(3):
            assert_equal(second[row][index], J[row], 1e-7)


@pytest.mark.parametrize("name", [*TREES, "panda"])
def test_second_derivatives_of_torques_are_automatic_ones(name):
    """Branches, slides and several joints of a body included."""
    body = robot(name)[1]
    q, qd, qdd = (a[0] for a in states(body.nq, 3))
    sigma = states(body.nq, 4)[0][0]

    @eqx.filter_jit
    def both(q, qd, qdd):
        power = lambda *motion: sigma @ inverse_dynamics(body, *motion)
        return torque_hessian(body, q, qd, qdd, sigma), jax.hessian(power, (0, 1, 2))(q, qd, qdd)

    found, automatic = both(q, qd, qdd)
    assert_equal(found.q_q, automatic[0][0])
    assert_equal(found.q_qd, automatic[0][1])
    assert_equal(found.q_qdd, automatic[0][2])
    assert_equal(found.qd_qd, automatic[1][1])


@functools.cache
def second_derivatives():
    body = robot(TREE)[1]
    fn = lambda q, qd, a: inverse_dynamics(body, q, qd, a)
    return jax.jit(jax.jacfwd(jax.jacrev(fn, argnums=(0, 1, 2)), argnums=(0, 1, 2)))(*point())


@pytest.mark.parametrize("mode", ["jacfwd", "jacrev"])
def test_derivatives_of_forward_dynamics_are_differences(mode):
    leaves = leaves_of(robot(TREE)[1])
    args = (*point(), leaves)
    J = compiled(f"forward {mode}")(*args)
    for index in range(3):
        assert_equal(J[index], differences(compiled("forward"), args, index), 1e-7)
    changed = lambda masses: compiled("forward")(*point(), leaves | {"masses": masses})
    assert_equal(J[3]["masses"], differences(changed, (np.asarray(leaves["masses"]),), 0), 1e-7)


def test_nothing_is_differentiated_that_is_not_asked_for():
    """A derivative in q̇ alone, with everything else constant, is that column of all of them."""
    body = robot(TREE)[1]
    q, qd, a = point()
    J = jax.jit(jax.jacfwd(lambda qd: inverse_dynamics(body, q, qd, a)))(qd)
    assert_equal(J, compiled("inverse jacfwd")(q, qd, a, leaves_of(body))[1])


# --- Single precision ------------------------------------------------------------------------------------------------


def test_single_precision_stays_single_beside_double():
    body = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), robot("panda")[1])
    q, qd, a = states(7).astype(np.float32)

    def everything(q, qd, a):
        J = jax.jacfwd(forward_dynamics, argnums=(1, 2, 3))(body, q, qd, a)
        return inverse_dynamics(body, q, qd, a), mass_matrix(body, q), J, frame_positions(body, q)

    assert not re.search(r"f64\[\d", str(jax.make_jaxpr(everything)(q[0], qd[0], a[0])))  # but numbers, such as 0.5
    single, double = dynamics(body, q, qd, a), dynamics(robot("panda")[1], *(v.astype(float) for v in (q, qd, a)))
    for x, y in zip(jax.tree.leaves(single), jax.tree.leaves(double), strict=True):
        assert x.dtype == jnp.float32
        assert_equal(x, y, 3e-4)


# --- What is refused -------------------------------------------------------------------------------------------------

BODY = "<body name='b' {body}><joint name='odd' {joint}/><geom size='0.1'/>{more}</body>"


def model(body="", joint="", more="", option="", rest=""):
    xml = BODY.format(body=body, joint=joint, more=more)
    return mujoco.MjModel.from_xml_string(f"<mujoco><option {option}/><worldbody>{xml}</worldbody>{rest}</mujoco>")


SECOND = "<body><joint name='other'/><geom size='0.1'/></body>"
MOTOR = "<actuator><motor joint='odd' {}/></actuator>"
TENDON = "<tendon><fixed {}><joint joint='odd' coef='1'/></fixed></tendon>"


@pytest.mark.parametrize(
    "parts, message",
    [
        ({"joint": "type='ball'"}, "joint 'odd' is neither a hinge nor a slide.*fix the base or replace a ball"),
        ({"joint": "type='free'"}, "joint 'odd' is neither a hinge nor a slide.*fix the base"),
        (
            {"more": SECOND, "rest": "<equality><joint joint1='odd' joint2='other'/></equality>"},
            "equality constraints.*cut the loop",
        ),
        ({"joint": "stiffness='3'"}, "springs.*set it to 0"),
        ({"joint": "frictionloss='0.1'"}, "dry friction.*set it to 0"),
        ({"body": "gravcomp='1'"}, "gravity compensation.*set it to 0"),
        ({"option": "density='1.2'"}, "fluid.*set both to 0"),
        ({"option": "viscosity='0.1'"}, "fluid.*set both to 0"),
        ({"joint": "damping='1 0.5'"}, "damping"),
        ({"joint": "stiffness='0 3'"}, "springs.*set it to 0"),
        *[({"rest": MOTOR.format(f"{kind}='2'")}, "actuators with armature") for kind in ("armature", "damping")],
        *[({"rest": TENDON.format(f"{kind}='2'")}, "tendons") for kind in ("stiffness", "damping")],
        *[({"rest": TENDON.format(f"{kind}='2'")}, "tendons") for kind in ("armature", "frictionloss")],
    ],
    ids=str,
)
def test_what_the_equation_leaves_out_is_refused(parts, message):
    with pytest.raises(ValueError, match=message):
        from_mujoco(model(**parts))


def test_a_model_without_joints_is_refused():
    with pytest.raises(ValueError, match="the model has no joint: there is nothing to control"):
        from_mujoco(mujoco.MjModel.from_xml_string("<mujoco><worldbody><geom size='1'/></worldbody></mujoco>"))


def test_files_are_read_and_named_in_errors(tmp_path):
    path = tmp_path / "arm.xml"
    path.write_text(random_tree(TREES[0]))
    assert eqx.tree_equal(from_mjcf(path), robot(TREES[0])[1])
    path.write_text("<mujoco><worldbody><body><freejoint/><geom size='0.1'/></body></worldbody></mujoco>")
    with pytest.raises(ValueError, match=r"arm\.xml: joint '0' is neither a hinge nor a slide"):
        from_mjcf(str(path))
    path.write_text("<mujoco><worldbody>")
    with pytest.raises(ValueError, match=r"arm\.xml"):
        from_mjcf(path)
