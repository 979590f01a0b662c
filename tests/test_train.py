"""Training: what a sample is, what the loss is, and that interruptions leave no trace."""

import dataclasses
import errno
import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import mujoco
import numpy as np
import pytest

from sartor.data import Log
from sartor.models.base import AbstractModel, ArmDynamics, Theta, history, rest
from sartor.models.links import RigidBody
from sartor.models.mjcf import from_mujoco
from sartor.models.mlp import ResidualMLP
from sartor.samples import TorqueSamples, windows
from sartor.train import Config, fit, inverse_errors, losses, mean_loss, optimise, pretrain, rollout_loss, torque_loss
from sartor.weights import Elementwise, constant

DT = 0.02
BODY = from_mujoco(
    mujoco.MjModel.from_xml_string(
        """<mujoco><worldbody><body><joint name="turn" axis="0 0 1" armature="0.5"/>
        <inertial mass="1" pos="0.5 0 0" diaginertia="0.1 0.1 0.1"/></body></worldbody></mujoco>"""
    )
)
INERTIA = 0.5 + 0.1 + 0.25


class Offset(AbstractModel):
    """A turntable with a constant torque, to be learned: the next state is linear in it."""

    body: RigidBody
    torque_offset: jax.Array
    history_length: int = eqx.field(static=True, default=2)

    def context(self, history):
        return jnp.zeros(0, history.dtype)

    def residual(self, q, qd, qdd, z):
        return self.torque_offset

    def residual_mass(self, q, z):
        return jnp.zeros((1, 1), q.dtype)


OFFSET = Offset(BODY, jnp.zeros(1))


def log_of(offset, num_steps, environment=0, seed=0):
    """A log of a turntable with a constant torque, in closed form."""
    us = np.random.default_rng((seed, environment)).normal(size=(num_steps, 1))
    a = (us - offset) / INERTIA
    qd = np.concatenate([[[0.0]], np.cumsum(a * DT, 0)])
    q = 0.3 + np.concatenate([[[0.0]], np.cumsum(DT * qd[:-1] + 0.5 * DT**2 * a, 0)])
    return Log(np.concatenate([q, qd], 1), us, None, DT, environment)


@functools.cache
def samples(num_steps=2, offsets=(1.0, 3.0)):
    logs = [log_of(offset, 20, environment) for environment, offset in enumerate(offsets)]
    return windows(logs, OFFSET, num_steps)


def ones(samples, num_steps=2):
    return constant(np.ones(2), samples.size, num_steps, "qd")


CONFIG = Config(epochs=4, batch=8, learning_rate=0.05)


def run(**options):
    """The training that the tests below share, with the same compiled step."""
    if not options:
        return plain_run()
    return fit(OFFSET, samples(), ones(samples()), options.pop("config", CONFIG), **options)


@functools.cache
def plain_run():
    return fit(OFFSET, samples(), ones(samples()), CONFIG)


def same(a, b):
    """In every bit."""
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        np.asarray(x).tobytes() == np.asarray(y).tobytes()
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


# --- Samples ---------------------------------------------------------------------------------------------------------


def test_a_window_is_a_state_with_its_past_and_what_came_after():
    logs = [log_of(1.0, 7, environment=4), log_of(2.0, 5, environment=9)]
    w = windows(logs, OFFSET, 3)
    assert w.size == 5 + 3
    np.testing.assert_array_equal(w.run, [0] * 5 + [1] * 3)
    np.testing.assert_array_equal(w.step, [0, 1, 2, 3, 4, 0, 1, 2])
    np.testing.assert_array_equal(w.environment, [4] * 5 + [9] * 3)
    seen = [np.asarray(eqx.filter_jit(history)(BODY, log.xs, log.us, DT)) for log in logs]
    for x0, us, xs, past, run, t, *_ in zip(*w, strict=True):
        log = logs[run]
        np.testing.assert_array_equal(x0, log.xs[t])
        np.testing.assert_array_equal(us, log.us[t : t + 3])
        np.testing.assert_array_equal(xs, log.xs[t + 1 : t + 4])
        rolling = np.asarray(rest(jnp.asarray(log.xs[0, :1]), 2))
        np.testing.assert_allclose(past, np.concatenate([rolling, seen[run][:t]])[-2:], rtol=1e-6, atol=1e-6)


def test_the_history_shows_what_is_left_out():
    w = windows([log_of(1.5, 7)], OFFSET, 1)
    np.testing.assert_allclose(w.history[2:, :, 2], 1.5, atol=1e-6)
    np.testing.assert_array_equal(w.history[0, :, 2], 0.0)


def test_a_log_that_begins_in_motion_gives_samples_once_its_history_is_whole():
    log = log_of(1.0, 9)
    moving = log._replace(xs=log.xs[3:], us=log.us[3:])
    assert np.abs(moving.xs[0, 1]) > 0.02
    later, whole = windows([moving], OFFSET, 2), windows([log], OFFSET, 2)
    np.testing.assert_array_equal(later.step, [2, 3, 4])
    np.testing.assert_allclose(later.history, whole.history[5:], rtol=1e-6, atol=1e-6)  # the past that was recorded
    with pytest.raises(ValueError, match=r"logs\[0\] has 3 control steps: .*begins in motion, 2 before it"):
        windows([moving._replace(xs=moving.xs[:4], us=moving.us[:3])], OFFSET, 2)


def test_logs_of_different_rates_are_refused():
    with pytest.raises(ValueError, match="different control steps"):
        windows([log_of(1.0, 9), log_of(1.0, 9)._replace(dt=2 * DT)], OFFSET, 2)
    with pytest.raises(ValueError, match="stride must be at least 1"):
        windows([log_of(1.0, 9)], OFFSET, 2, stride=0)


def test_a_stride_skips_samples_and_take_chooses_some():
    whole, some = windows([log_of(1.0, 9)], OFFSET, 2), windows([log_of(1.0, 9)], OFFSET, 2, stride=3)
    np.testing.assert_array_equal(some.step, [0, 3, 6])
    assert same(whole.take(np.array([0, 3, 6])), some)


def test_logs_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"logs\[1\] has 2 control steps: a sample needs 3"):
        windows([log_of(1.0, 9), log_of(1.0, 2)], OFFSET, 3)
    two = Log(np.zeros((6, 4)), np.zeros((5, 2)), None, DT)
    with pytest.raises(ValueError, match=r"logs\[0\] has 2 joints, but the model has 1: it is of another robot"):
        windows([two], OFFSET, 3)
    with pytest.raises(ValueError, match="logs"):
        windows([], OFFSET, 3)


# --- The loss --------------------------------------------------------------------------------------------------------


def test_the_loss_is_that_of_a_rollout_by_hand():
    w = samples()
    weights = Elementwise(jnp.asarray(np.random.default_rng(1).uniform(size=(w.size, 2, 2))))
    step, theta = ArmDynamics(DT), Theta(OFFSET, jnp.zeros(0), None)
    one = jax.jit(lambda x, u: step(x, u, 0, theta))
    expected = []
    for i in (0, 5, w.size - 1):
        x, total = w.x0[i], 0.0
        for k in range(2):
            x = one(x, w.us[i, k])
            total += np.sum((weights.W[i, k] * (x - w.xs[i, k])) ** 2)
        expected.append(total)
    found = losses(eqx.Partial(rollout_loss, DT), OFFSET, (w, weights))
    assert found.shape == (w.size,)
    np.testing.assert_allclose(found[[0, 5, -1]], expected, rtol=1e-10)


def test_weights_of_fewer_steps_use_fewer_steps():
    w = samples()
    one, two = constant(np.ones(2), w.size, 1, "qd"), samples(1)
    loss = eqx.Partial(rollout_loss, DT)
    np.testing.assert_allclose(losses(loss, OFFSET, (w, one))[:19], losses(loss, OFFSET, (two, ones(two, 1)))[:19])


def test_losses_do_not_depend_on_the_batch():
    w = samples()
    loss = eqx.Partial(rollout_loss, DT)
    whole = losses(loss, OFFSET, (w, ones(w)))
    np.testing.assert_allclose(losses(loss, OFFSET, (w, ones(w)), batch=16), whole, rtol=1e-12)
    assert mean_loss(loss, OFFSET, (w, ones(w))) == pytest.approx(whole.mean())


def test_the_true_model_has_no_loss():
    true = Offset(BODY, jnp.asarray([1.0]))
    w = samples(2, (1.0,))
    assert mean_loss(eqx.Partial(rollout_loss, DT), true, (w, ones(w))) < 1e-20


# --- Training --------------------------------------------------------------------------------------------------------


def test_the_weighted_optimum_is_found():
    """Two plants with offsets 1 and 3 Nm: the best one offset is their mean, weighted by W²."""
    w = samples()
    per_plant = np.where(w.environment == 0, 1.0, 2.0)[:, None, None]
    weights = Elementwise(jnp.asarray(per_plant * np.array([0.0, 1.0]) * np.ones((w.size, 2, 2))))
    config = Config(epochs=150, batch=w.size, learning_rate=0.2)
    model, curve = fit(OFFSET, w, weights, config)
    assert model.torque_offset[0] == pytest.approx((1 * 1 + 4 * 3) / 5, abs=0.01)
    # Relative to the start: Σ W² (offset - model)², the model at its optimum against 0.
    assert curve.train[-1] == pytest.approx((1 * 1.6**2 + 4 * 0.4**2) / (1 * 1 + 4 * 9), rel=1e-3)


def test_the_inverse_errors_are_what_torques_are_off_by():
    w = samples()
    found = losses(eqx.Partial(inverse_errors, DT), OFFSET, (w, ones(w)))
    np.testing.assert_allclose(found, np.where(w.environment == 0, 1.0, 3.0)[:, None], rtol=1e-9)


def test_an_anchor_holds_the_model_at_the_torques_of_all_samples():
    """Weights look at the environment with the offset 3 alone, the anchor at both, whose mean is 2."""
    w = samples()
    weights = Elementwise(ones(w).W * jnp.asarray(w.environment == 1, float)[:, None, None])
    config = Config(epochs=150, batch=w.size, learning_rate=0.1)
    free, _ = fit(OFFSET, w, weights, config)
    held, _ = fit(OFFSET, w, weights, dataclasses.replace(config, anchor=1e4))
    np.testing.assert_allclose(free.torque_offset, 3.0, atol=0.02)
    np.testing.assert_allclose(held.torque_offset, 2.0, atol=0.02)


def test_a_frozen_field_stays():
    model, _ = run(config=dataclasses.replace(CONFIG, frozen=("torque_offset",)))
    assert same(model, OFFSET) and not same(run()[0], OFFSET)


def test_the_loss_falls_and_the_robot_stays():
    model, curve = run()
    assert len(curve.train) == CONFIG.epochs and curve.validation == []
    assert 1.0 > curve.train[0] > curve.train[1] > curve.train[3]
    assert same(model.body, BODY)
    assert abs(model.torque_offset[0]) > 0.1 and OFFSET.torque_offset[0] == 0


def test_the_same_seed_gives_the_same_model_and_another_one_another():
    assert same(run(), run(config=CONFIG))
    assert not same(run()[0], run(config=Config(epochs=4, batch=8, learning_rate=0.05, seed=1))[0])


def test_validation_and_monitors_see_training_and_do_not_change_it():
    steps, epochs = [], []
    w = samples(2, (2.0,))
    model, curve = run(
        validation=(w, ones(w)),
        monitor=lambda done, total: steps.append((done, total)),
        after_epoch=lambda epoch, model: epochs.append((epoch, model)),
    )
    per_epoch = samples().size // 8
    assert steps == [(i + 1, 4 * per_epoch) for i in range(4 * per_epoch)]
    assert [epoch for epoch, _ in epochs] == [1, 2, 3, 4]
    assert same(epochs[-1][1], model) and same(run()[0], model)
    loss = eqx.Partial(rollout_loss, DT)
    start = mean_loss(loss, OFFSET, (samples(), ones(samples())))
    expected = [mean_loss(loss, model, (w, ones(w))) / start for _, model in epochs]
    np.testing.assert_allclose(curve.validation, expected, rtol=1e-12)


def test_the_order_of_samples_does_not_depend_on_the_weights():
    def order(weight):
        seen = []

        def loss(model, batch):
            numbers, weights = batch
            jax.debug.callback(lambda n: seen.append(tuple(n.tolist())), numbers)
            return weights * (model.torque_offset[0] - numbers) ** 2

        data = (np.arange(12), weight * np.ones(12))
        optimise(loss, OFFSET, data, Config(epochs=2, batch=4))
        jax.effects_barrier()
        return [n for n in seen if len(n) == 4]

    first = order(1.0)
    assert order(np.arange(1.0, 13.0)) == first
    assert len(set(first)) == 6  # another one in each epoch
    for epoch in (first[:3], first[3:]):
        assert sorted(sum(epoch, ())) == list(range(12))


def test_noise_on_histories_is_fresh_in_every_step_and_the_same_for_the_same_seed():
    data = TorqueSamples(*np.zeros((4, 12, 1)), np.zeros((12, 50, 3)))

    def histories(seed):
        seen = []

        def loss(model, batch):
            jax.debug.callback(lambda h: seen.append(np.asarray(h)), batch.history)
            return (model.torque_offset[0] - 1.0) ** 2 + 0.0 * batch.q[:, 0]

        optimise(loss, OFFSET, data, Config(epochs=2, batch=4, seed=seed, noise=(0.1, 0.2, 0.0)))
        jax.effects_barrier()
        assert not any(h.any() for h in seen if len(h) == 12)  # the loss at the start is without noise
        return np.stack([h for h in seen if len(h) == 4])

    first = histories(0)
    assert first.shape == (6, 4, 50, 3)
    np.testing.assert_allclose(first.std((1, 2)), np.broadcast_to([0.1, 0.2, 0.0], (6, 3)), rtol=0.25)
    assert len({h.tobytes() for h in first}) == 6
    np.testing.assert_array_equal(histories(0), first)
    assert not np.array_equal(histories(1), first)


def test_single_precision_trains_in_single_precision():
    single = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), OFFSET)
    model, curve = fit(single, samples(), ones(samples()), CONFIG)
    assert model.torque_offset.dtype == jnp.float32
    np.testing.assert_allclose(curve.train, run()[1].train, rtol=1e-3)


# --- Interruptions ---------------------------------------------------------------------------------------------------


class Killed(Exception):
    """Stands for the end of the process."""


def killed_after(count):
    """A monitor, or what is called after an epoch, that stops everything at a call."""
    calls = []

    def callback(*_):
        calls.append(0)
        if len(calls) == count:
            raise Killed

    return callback


@pytest.mark.parametrize("where, count", [("after_epoch", 2), ("monitor", 11), ("monitor", 2)])
def test_training_goes_on_where_it_was_interrupted(where, count, tmp_path):
    path = tmp_path / "checkpoint.npz"
    with pytest.raises(Killed):
        run(checkpoint=path, **{where: killed_after(count)})
    seen = []
    resumed = run(checkpoint=path, monitor=lambda done, _: seen.append(done))
    assert same(run(), resumed)
    done = count - 1 if where == "after_epoch" else (count - 1) // 4  # after_epoch comes before the checkpoint
    assert seen[0] == 4 * done + 1  # what was done was not done again
    assert same(run(checkpoint=path), run())  # and a finished one is only read


def test_the_curve_of_validation_goes_on_too(tmp_path):
    path, w = tmp_path / "checkpoint.npz", samples(2, (2.0,))
    with pytest.raises(Killed):
        run(checkpoint=path, after_epoch=killed_after(3), validation=(w, ones(w)))
    resumed = run(checkpoint=path, validation=(w, ones(w)))
    assert same(resumed, run(validation=(w, ones(w))))


def test_checkpoints_that_do_not_fit_are_refused(tmp_path):
    path = tmp_path / "checkpoint.npz"
    run(checkpoint=path)
    whole = path.read_bytes()
    with pytest.raises(ValueError, match=r"checkpoint\.npz"):
        run(checkpoint=path, config=Config(epochs=6, batch=8, learning_rate=0.05))
    other = ResidualMLP(
        BODY, widths=(3,), num_contexts=1, hidden=2, num_layers=1, history_length=2, key=jax.random.key(0)
    )
    with pytest.raises(ValueError, match=r"checkpoint\.npz"):
        fit(other, samples(), ones(samples()), CONFIG, checkpoint=path)
    doubled = jax.tree.map(lambda leaf: leaf * (1.0 + np.arange(len(leaf)))[:, None, None], ones(samples()))
    with pytest.raises(ValueError, match=r"checkpoint\.npz is of training .* other data or settings"):
        fit(OFFSET, samples(), doubled, CONFIG, checkpoint=path)
    with pytest.raises(ValueError, match=r"checkpoint\.npz"):
        run(checkpoint=path, config=dataclasses.replace(CONFIG, seed=1))
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"checkpoint\.npz"):
        run(checkpoint=path)


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    path, save, calls = tmp_path / "checkpoint.npz", np.savez, []

    def full(file, **arrays):
        calls.append(0)
        if len(calls) == 3:
            file.write(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(file, **arrays)

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match="No space left"):
        run(checkpoint=path)
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == [path]
    assert same(run(checkpoint=path), run())


# --- Pretraining -----------------------------------------------------------------------------------------------------


def torque_samples(count=32):
    rng = np.random.default_rng(5)
    q, qd, qdd = rng.normal(size=(3, count, 1))
    return TorqueSamples(q, qd, qdd, 2.0 + 0.5 * rng.normal(size=(count, 1)), rng.normal(size=(count, 2, 3)))


def test_pretraining_minimises_the_normalised_torque_error():
    data = torque_samples()
    loss = eqx.Partial(torque_loss, (4.0,))
    np.testing.assert_allclose(losses(loss, OFFSET, data), (data.target[:, 0]) ** 2 / 4.0)
    model, curve = pretrain(OFFSET, data, Config(epochs=120, batch=32, learning_rate=0.2), validation=data)
    assert model.torque_offset[0] == pytest.approx(data.target.mean(), abs=0.01)
    assert curve.train[-1] == pytest.approx(np.var(data.target) / np.mean(data.target**2), rel=1e-3)
    assert curve.validation[-1] == pytest.approx(curve.train[-1], rel=1e-3)


def test_a_network_with_a_context_learns_from_the_past(tmp_path):
    """Two plants that only their past tells apart."""
    model = ResidualMLP(
        BODY, widths=(8,), num_contexts=2, hidden=4, num_layers=1, history_length=2, key=jax.random.key(0)
    )
    w = samples()
    w = w.take(w.step >= 2)
    before = model
    model, curve = fit(model, w, ones(w), Config(epochs=60, batch=w.size, learning_rate=0.03))
    assert curve.train[-1] < 0.1 * 0.2  # one offset for both would leave a fifth
    assert not same(model.encoder, before.encoder)


# --- Errors ----------------------------------------------------------------------------------------------------------


def test_weights_of_another_number_of_samples_are_refused():
    w = samples()
    with pytest.raises(ValueError, match=f"weights are those of 3 samples, but there are {w.size}"):
        fit(OFFSET, w, ones(w.take(slice(3))), CONFIG)


def test_weights_of_more_steps_than_the_samples_have_are_refused():
    w = samples()
    with pytest.raises(ValueError, match="steps"):
        fit(OFFSET, w, ones(w, 3), CONFIG)


def test_a_loss_that_is_not_finite_ends_training_with_a_message(tmp_path):
    w = samples()
    broken = w._replace(xs=np.where(w.step[:, None, None] == 3, np.nan, w.xs))
    path = tmp_path / "checkpoint.npz"
    with pytest.raises(FloatingPointError, match="nan before training: look for samples"):
        fit(OFFSET, broken, ones(w), CONFIG, checkpoint=path)
    wild = dataclasses.replace(CONFIG, learning_rate=1e200)
    with pytest.raises(FloatingPointError, match=r"not finite in epoch 1: lower learning_rate \(1e\+200\)"):
        run(checkpoint=path, config=wild)
    assert not path.exists()


def test_settings_without_sense_are_refused():
    for name in ("epochs", "batch"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, not 0"):
            Config(**{name: 0})
    with pytest.raises(ValueError, match="learning_rate must be positive, not -1.0"):
        Config(learning_rate=-1.0)
