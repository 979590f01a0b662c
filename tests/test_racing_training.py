"""Samples, losses and labels of drives, and that the racing experiment runs to its end."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sartor.experiments import f1tenth
from sartor.files import read_json
from sartor.models.vehicle import LinearTyre, SingleTrack, corrected
from sartor.models.vehicle import f1tenth as published
from sartor.racing_labels import PHASES, label_drive, phases, shares
from sartor.racing_training import PREDICTED, Drive, cut, loss_on
from sartor.systems import racing_car as car
from sartor.systems.racing_car import Theta
from sartor.track_generator import named
from sartor.train import Config, mean_loss, optimise
from sartor.weights import constant

TRACKS = [named("fin"), named("boot")]
LINEAR = SingleTrack(front=LinearTyre(), rear=LinearTyre())


@pytest.fixture(scope="module")
def drives():
    """Of the published car, along both centrelines."""

    @jax.jit
    def drive(track):
        def advance(x, k):
            u = car.follow(x, Theta(published(), track), 2.0 + jnp.sin(0.2 * k))
            x = car.step(x, u, 0, Theta(published(), track))
            return x, (x, u)

        begin = car.rolling(0.0, 2.0)
        _, (xs, us) = jax.lax.scan(advance, begin, jnp.arange(60))
        return jnp.concatenate([begin[None], xs]), us

    clear = np.arange(61) < 50
    return [Drive(*map(np.asarray, drive(track)), clear, i) for i, track in enumerate(TRACKS)]


def _standard(samples, num_steps):
    sizes = np.where(PREDICTED, 1.0 / np.maximum(samples.xs.std((0, 1)), 1e-9), 1.0)
    return constant(sizes, samples.size, num_steps, PREDICTED)


def test_samples_stay_clear_of_the_walls(drives):
    samples = cut(drives, 10, stride=5)
    assert samples.size == 2 * 8 and samples.step.max() == 35  # 35 + 10 < 50
    np.testing.assert_array_equal(samples.xs[3, :-1], drives[0].xs[16:25])
    assert set(samples.track) == {0, 1}
    with pytest.raises(ValueError, match="no drive stays clear of the walls for 55 steps"):
        cut(drives, 55)


def test_samples_may_touch_a_wall_after_what_has_to_be_clear(drives):
    samples = cut(drives[:1], 20, stride=5, clear=6)
    assert samples.step.max() == 40  # 60 - 20, and 40 + 6 < 50
    np.testing.assert_array_equal(samples.clear[samples.step == 25], 20)
    np.testing.assert_array_equal(samples.clear[samples.step == 40], 9)


def test_the_loss_of_the_true_model_is_zero_on_the_track_of_each_sample(drives):
    samples = cut(drives, 8, stride=4)
    weights, loss = _standard(samples, 8), loss_on(TRACKS)
    model = corrected(published(), 4, jax.random.key(0))
    assert mean_loss(loss, model, (samples, weights)) < 1e-20
    assert mean_loss(loss_on(TRACKS[::-1]), model, (samples, weights)) > 1e-3


def test_training_leaves_the_base_as_it_is_and_lowers_the_loss(drives):
    samples = cut(drives, 4)
    data = samples, _standard(samples, 4)
    begin = corrected(LINEAR, 8, jax.random.key(0))
    model, curve = optimise(loss_on(TRACKS), begin, data, Config(epochs=150, batch=32, learning_rate=5e-3))
    assert curve.train[-1] < 0.3
    assert jax.tree.leaves(model.base) == jax.tree.leaves(LINEAR)


def test_phases_follow_the_curvature():
    s = np.linspace(0.0, 18.0, 200)
    found = phases(TRACKS[0], s)
    size = np.abs(jax.vmap(TRACKS[0].curvature_at)(jnp.asarray(s)))
    assert set(found) == set(PHASES) and np.all(size[found == "straight"] < 0.3)
    assert size[found == "apex"].mean() > size[found == "entry"].mean()
    ahead = np.abs(jax.vmap(TRACKS[0].curvature_at)(jnp.asarray(s + 0.3)))
    assert np.all(ahead[found == "entry"] > size[found == "entry"] * 0.9)


def test_shares_are_of_errors_of_a_usual_size():
    S = np.zeros((4, 3, 9))
    S[:2, :, 3], S[2:, :, 4], S[2:, :, 5] = 1.0, 2.0, 1.0
    S[0] *= 1e3  # one large label does not speak for all
    S[1, :, 3], S[1, :, 5] = 0.0, 1.0
    found = shares(S, np.array(["entry", "entry", "exit", "exit"]), np.array([1, 1, 1, 2, 1, 1, 1, 1, 1.0]))
    assert set(found) == {"entry", "exit"} and found["entry"][3] == pytest.approx(0.5)
    assert found["exit"][4] == pytest.approx(0.8) and found["exit"].sum() == pytest.approx(1.0)


def test_a_drive_shorter_than_the_horizon_has_no_labels(drives):
    with pytest.raises(ValueError, match="no label with a horizon of 80"):
        label_drive(Theta(LINEAR, TRACKS[0]), 80, drives[0].xs, drives[0].us)


@pytest.mark.slow
def test_labels_of_a_drive_come_in_one_batch(drives):
    found = label_drive(Theta(published(), TRACKS[0]), 40, drives[0].xs, drives[0].us)
    assert found.S.shape == (21, 40, 9) and found.ok.mean() > 0.9
    assert np.all(found.S[found.ok] >= 0.0) and np.isnan(found.S[~found.ok]).all()


@pytest.mark.slow
def test_a_smoke_run_races_with_every_model_and_is_not_done_again(tmp_path):
    config = f1tenth.Config(preset="smoke", workers=0)
    f1tenth.run(config, tmp_path)
    rows = read_json(tmp_path / "trials.json")["rows"]
    assert {row["method"] for row in rows} == {
        "linear",
        "kinematic",
        "published",
        "oracle",
        "teacher",
        "pretrained",
        "stand",
        "ours",
    }
    assert all(row["distance"] > 3.0 for row in rows)
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npz")}
    f1tenth.run(config, tmp_path)
    assert stamps == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npz")}


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="steps must be more than 100"):
        f1tenth.Config(preset="quick", steps=30).resolved()
    with pytest.raises(ValueError, match="drivers must be at most seeds, 1, not 2"):
        f1tenth.Config(preset="quick", drivers=2).resolved()
    with pytest.raises(ValueError, match="rollouts must be at most horizon, 40, which labels have, not 60"):
        f1tenth.Config(preset="quick", rollouts=(20, 60)).resolved()
    with pytest.raises(ValueError, match="sizes must be at least 1, not 0"):
        f1tenth.Config(sizes=(8, 0))
    with pytest.raises(ValueError, match="learning_rate must be positive"):
        f1tenth.Config(learning_rate=-1.0)
    assert f1tenth.Config(preset="paper", seeds=1).resolved().drivers == 1
    with pytest.raises(ValueError, match="batch must be at least 1"):
        f1tenth.Config(batch=0)
