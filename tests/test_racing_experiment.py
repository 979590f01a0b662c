"""Pieces of the racing experiment that need no solver: weights, what is a drive, explained energy, truth, trials."""

import numpy as np
import pytest

from sartor.experiments import f1tenth, f1tenth_jobs, f1tenth_maps
from sartor.experiments.f1tenth_config import CHIEF, WEIGHTINGS
from sartor.experiments.f1tenth_world import track
from sartor.files import read_json, save_arrays
from sartor.racing_training import CarSamples

B, P, N = 40, 5, 6
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def samples():
    x0 = RNG.normal(size=(B, 9))
    x0[:, 0] = 3.0 * np.arange(B)  # far along the track
    xs = x0[:, None] + np.cumsum(RNG.normal(scale=0.1, size=(B, P, 9)), 1)
    return CarSamples(x0, RNG.normal(size=(B, P, 2)), xs, np.zeros(B, int), np.arange(B), np.full(B, P))


@pytest.fixture(scope="module")
def labels():
    root = RNG.normal(size=(B, 2, 2))
    return {
        "S": RNG.uniform(0.5, 1.5, (B, N, 9)), "du0_de": RNG.normal(size=(B, 2, N, 9)),
        "du0_derror": RNG.normal(size=(B, 2, N, 9)), "Lambda": root @ root.transpose(0, 2, 1),
        "dJ_du0": RNG.uniform(0.1, 1.0, (B, 2)),
    }  # fmt: skip


def weights(name, samples, labels):
    return f1tenth_jobs._weights(name, samples, labels, P, seed=3)


def test_how_far_a_car_has_driven_is_no_spread_of_its_errors(samples, labels):
    W = np.asarray(weights("stand", samples, labels).W)
    assert np.ptp(W, (0, 1)).max() == 0 and np.all(W[..., 6:] == 0)
    assert 0.5 < W[0, 0, 0] * samples.xs[..., 1].std() / W[0, 0, 1] < 20.0  # by absolute s it would be 1/40


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_weights_have_a_mean_square_of_one(name, samples, labels):
    found = weights(name, samples, labels)
    errors = RNG.normal(size=(B, P, 9))
    assert np.all(np.isfinite(found.loss(errors))) and np.mean(found.loss(errors)) == pytest.approx(P * 6, rel=0.4)


def test_controls_of_the_labels_are_what_they_say(samples, labels):
    ours, mean, shuffled, rollout = (
        np.asarray(weights(name, samples, labels).W)[..., :6]
        for name in ("ours", "ours_avg", "ours_shuffled", "ours_trajectory")
    )
    assert np.ptp(mean, 0).max() < 1e-12 and np.corrcoef(mean[0].ravel(), ours.mean(0).ravel())[0, 1] > 0.95
    same = lambda W: np.sort(W.reshape(B, -1).sum(1))
    np.testing.assert_allclose(same(shuffled), same(ours), rtol=1e-12)
    assert not np.allclose(shuffled, ours)
    true = np.abs(np.einsum("bj,bjkx->bkx", labels["dJ_du0"], labels["du0_derror"]))[:, :P, :6]
    assert np.corrcoef(rollout.ravel(), true.ravel())[0, 1] > 0.98


def test_the_mean_regret_is_the_diagonal_of_the_mean_matrix(samples, labels):
    F = np.asarray(weights("regret", samples, labels).F)
    diagonal = np.mean(np.sum(F**2, 1), 0)
    W = np.asarray(weights("regret_avg", samples, labels).W)
    assert np.ptp(W, 0).max() == 0.0
    np.testing.assert_allclose(W[0, :, :6] ** 2 / W[0, 0, 0] ** 2, diagonal[:, :6] / diagonal[0, 0], rtol=1e-6)


def test_labels_belong_to_their_samples(tmp_path):
    """Two networks on two tracks; each label holds the speed of its sample."""
    config = f1tenth.Config(preset="smoke", tracks=2, horizon=5, rollouts=(4,), stride=3).resolved()
    for name in ("drives", "labels"):
        (tmp_path / name).mkdir()
    for size, number in ((4, 0), (4, 1), (8, 0), (8, 1)):
        xs = RNG.uniform(1.0, 2.0, (30, 9))
        xs[:, 2] = 0.0
        path = tmp_path / "drives" / f"{size}-0-{number}.npz"
        f1tenth_jobs._save_drive(path, xs, np.zeros((29, 2)), np.zeros(29), number)
    samples = f1tenth_jobs.tuning_samples(tmp_path, config)
    for number in range(2):
        speed = samples.x0[samples.track == number, 3]
        save_arrays(tmp_path / "labels" / f"{number}.npz", S=speed, rate=np.array(1.0))
    found, labels = f1tenth_jobs.labelled_samples(tmp_path, config)
    np.testing.assert_array_equal(labels["S"], found.x0[:, 3])
    assert set(labels) == {"S"} and found.size == samples.size == 4 * 9 and found.track.tolist() == [0] * 18 + [1] * 18


def test_a_car_that_stands_or_has_spun_is_no_drive(tmp_path):
    xs = np.zeros((5, 9))
    xs[:, 3], xs[2, 3], xs[3, 2] = 2.0, 0.5, 2.0
    f1tenth_jobs._save_drive(tmp_path / "d.npz", xs, np.zeros((4, 2)), np.array([0.0, 0.0, 0.0, 0.01]), 3)
    (drive,) = f1tenth_jobs.drives(tmp_path)
    assert drive.clear.tolist() == [True, True, False, False, False] and drive.track == 3


def test_the_mean_map_of_each_phase_explains_what_depends_on_the_phase_alone():
    phase = np.array(["entry"] * 3 + ["exit"] * 5)
    S = np.where((phase == "entry")[:, None, None], 1.0, 3.0) * np.ones((8, 2, 3))
    assert f1tenth_maps._explained_by(S, phase) == pytest.approx(1.0)
    S[0] += 1.0
    assert 0.9 < f1tenth_maps._explained_by(S, phase) < 1.0


def test_the_truth_of_perfect_labels_is_perfect(tmp_path, labels):
    slope, ok = labels["dJ_du0"], np.arange(B) > 0
    S = np.abs(np.einsum("bj,bjkx->bkx", slope, labels["du0_de"]))
    curvature = np.diagonal(labels["Lambda"], axis1=1, axis2=2)
    save_arrays(tmp_path / "0.npz", **(labels | {"S": S}), slope=-slope, curvature=curvature, ok=ok)
    f1tenth_maps.truth(tmp_path / "truth.json", [tmp_path / "0.npz"], f1tenth.Config(), lambda *a: None)
    rows = {row["variant"]: row for row in read_json(tmp_path / "truth.json")["rows"]}
    # The slope has the other sign for both controls: magnitudes are the same.
    for name in ("|dJ/du|", "Λ, diagonal", "regret, diagonal of Λ", "ours"):
        assert rows[name]["overall"] == pytest.approx(1.0) and rows[name]["n"] == B - 1
    assert rows["ours_shuffled"]["overall"] < 0.5


def test_trials_are_all_weightings_in_the_middle_and_the_chief_ones_elsewhere():
    trials = f1tenth._trials(f1tenth.Config(preset="paper").resolved())
    of = lambda size, p: {t.weighting for t in trials if (t.size, t.p) == (size, p)}
    assert of(8, 20) == set(WEIGHTINGS) and of(4, 20) == of(8, 40) == set(CHIEF)
    assert len({t.name for t in trials}) == len(trials)


def test_no_track_of_the_tests_is_one_of_the_data():
    lines = [np.asarray(track(i).curvature) for i in (*range(4), *range(-6, 0))]
    assert all(not np.allclose(a, b) for i, a in enumerate(lines) for b in lines[:i])
