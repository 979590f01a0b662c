"""Statistics of evaluations against closed forms, and their intervals against the truth of simulated ones."""

from dataclasses import astuple

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sartor import evaluate, pairing
from sartor.pairing import Arm

SATURATED = (3, 7)


def episodes(method, J, *, p=4, epoch=5, last=True, split="test", models=None, seeds=None, **others):
    """Rows of one method from costs (runs, environments)."""
    J = np.asarray(J, float)
    runs, environments = J.shape
    models = np.zeros(runs, int) if models is None else models
    seeds = np.arange(runs) if seeds is None else seeds
    rows = {
        "model": np.repeat(models, environments), "seed": np.repeat(seeds, environments),
        "environment": np.tile(np.arange(environments), runs), "J": J.ravel(), "method": method, "p": p,
        "epoch": epoch, "last": last, "split": split, "study": "main", "variant": "", "saturated": 0.0,
        "J_qd": 0.25 * J.ravel(), "q_rmse": 0.01, "qd_rmse": 0.1, "ee_rmse": 0.02, "failed": 1, "unstable": False,
    } | others  # fmt: skip
    return {name: np.broadcast_to(value, J.size) for name, value in rows.items()}


def stack(*parts):
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def oracle(environments, J=None):
    saturated = np.isin(np.arange(environments), SATURATED) * 0.3
    J = np.ones((1, environments)) if J is None else J
    return episodes("oracle_damping", J, p=0, epoch=0, models=[-1], seeds=[-1], saturated=saturated)


def simulated(rng, effect=0.9, runs=10, environments=20, noise=(0.03, 0.1, 0.05)):
    """Costs of a baseline and of a method with a known ratio, effects of run, environment and episode on it."""
    base = np.exp(rng.normal(0.0, 0.3, (runs, 1)) + rng.normal(1.0, 1.5, (1, environments)))
    a, b, c = (s * rng.normal(size=n) for s, n in zip(noise, [(runs, 1), (1, environments), base.shape], strict=True))
    return stack(episodes("stand", base), episodes("ours", base * effect * np.exp(a + b + c)), oracle(environments))


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_metrics_of_an_episode_are_the_formula(rng):
    xs, refs = rng.normal(size=(2, 9, 4))
    Q, us = np.array([3.0, 2.0, 0.5, 0.1]), np.tile([1.0, -2.0], (8, 1))
    us[:2, 1] = -4.0
    out = evaluate.episode_metrics(xs, us, refs, np.array([5.0, 4.0]), Q, ee_error=np.full(9, 0.03))
    J = sum((x - r) @ np.diag(Q) @ (x - r) for x, r in zip(xs, refs, strict=True)) / 8
    np.testing.assert_allclose([out["J"], out["J_q"] + out["J_qd"]], J)
    np.testing.assert_allclose(out["J_q"], sum((x - r)[:2] ** 2 @ Q[:2] for x, r in zip(xs, refs, strict=True)) / 8)
    np.testing.assert_allclose(out["q_rmse"], np.sqrt(np.mean((xs - refs)[:, :2] ** 2)))
    np.testing.assert_allclose(out["qd_rmse"], np.sqrt(np.mean((xs - refs)[:, 2:] ** 2)))
    assert out["saturated"] == 0.25 and out["unstable"] and out["ee_rmse"] == pytest.approx(0.03)


def test_a_loop_far_worse_than_before_training_is_unstable():
    row = lambda method, J, model=0, environment=1: {
        "method": method, "J": J, "model": model, "environment": environment, "unstable": False,
    }  # fmt: skip
    rows = [
        row("pretrained", 2.0), row("pretrained", 9.0, model=1), row("nominal", 90.0, model=-1), row("ours", 5.9),
        row("ours", 6.1), row("ours", 6.1, model=1), row("ours", np.inf, environment=2),
    ]  # fmt: skip
    evaluate.mark_unstable(rows)
    assert [r["unstable"] for r in rows] == [False, False, False, False, True, False, False]


@pytest.mark.parametrize("speed, unstable", [(0.4, False), (0.6, True), (np.nan, True), (np.inf, True)])
def test_unstable_is_fast_or_not_finite(speed, unstable):
    xs, us, u_max = np.zeros((11, 4)), np.zeros((10, 2)), np.ones(2)
    xs[:, 2:] = speed
    out = evaluate.episode_metrics(xs, us, np.zeros((11, 4)), u_max, np.ones(4))
    assert (
        out["unstable"] is unstable
        and np.isfinite(out["J"]) == np.isfinite(speed)
        and np.isnan(out["ee_rmse"]) == (np.isfinite(speed))
    )


def test_metrics_refuse_wrong_shapes():
    with pytest.raises(ValueError, match=r"refs has shape \(10, 4\)"):
        evaluate.episode_metrics(np.zeros((11, 4)), np.zeros((10, 2)), np.zeros((10, 4)), np.ones(2), np.ones(4))


def test_a_pyarrow_table_is_as_good_as_columns(rng):
    rows = simulated(rng)
    table = pa.table({name: pa.array(values.tolist()) for name, values in rows.items()})
    for where in ("all", "saturated", "unsaturated"):
        assert evaluate.ratio(table, Arm("ours", 4), where=where) == evaluate.ratio(rows, Arm("ours", 4), where=where)
    assert pairing.arms(table) == [Arm("stand", 4), Arm("ours", 4), Arm("oracle_damping")]


def test_the_interval_covers_the_truth_about_as_often_as_it_says(rng):
    found = [evaluate.ratio(simulated(rng), Arm("ours", 4)) for _ in range(150)]
    covered = np.mean([f.low <= 0.9 <= f.high for f in found])
    assert 0.88 <= covered <= 0.995
    assert np.mean([f.value for f in found]) == pytest.approx(0.9, rel=0.01)
    assert np.mean([evaluate.minimum_detectable(f) for f in found]) == pytest.approx(0.053, rel=0.2)  # 2 sd, see noise


@pytest.mark.parametrize("noise, scale", [((0.1, 0, 0), 0.1 / np.sqrt(10)), ((0, 0.1, 0), 0.1 / np.sqrt(20))])
def test_the_interval_knows_noise_of_runs_and_of_environments(noise, scale, rng):
    """Were only one of the two resampled, the other's noise would go unseen."""
    widths = [evaluate.minimum_detectable(evaluate.ratio(simulated(rng, noise=noise), Arm("ours", 4))) for _ in "12345"]
    assert np.mean(widths) == pytest.approx(1.96 * scale, rel=0.3)


def test_pairing_removes_what_is_common_and_scaling_an_environment_changes_nothing(rng):
    rows = simulated(rng)
    before = evaluate.ratio(rows, Arm("ours", 4))
    common = np.exp(rng.normal(0, 2, 10))[rows["seed"]] * np.where(rows["environment"] == 4, 1e3, 1.0)
    after = evaluate.ratio(rows | {"J": rows["J"] * common}, Arm("ours", 4))
    np.testing.assert_allclose(astuple(after), astuple(before), rtol=1e-12)
    exact = evaluate.ratio(simulated(rng, noise=(0, 0, 0)), Arm("ours", 4))
    np.testing.assert_allclose(astuple(exact)[:3], 0.9)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 4), st.integers(1, 6))
def test_ratios_are_antisymmetric_and_lie_in_their_intervals(seed, runs, environments):
    rows = simulated(np.random.default_rng(seed), runs=runs, environments=environments)
    there, back = evaluate.ratio(rows, Arm("ours", 4)), evaluate.ratio(rows, Arm("stand", 4), "ours")
    np.testing.assert_allclose(there.value * back.value, 1.0)
    assert there.low <= there.value * (1 + 1e-9) and there.value <= there.high * (1 + 1e-9)
    np.testing.assert_allclose([there.low * back.high, there.high * back.low], 1.0, rtol=1e-2)


def test_statistics_of_equation_7_and_saturated_environments(rng):
    J, J_base = rng.uniform(1, 9, (2, 3, 10))
    rows = stack(episodes("stand", J_base), episodes("ours", J), oracle(10))
    value = lambda **options: evaluate.ratio(rows, Arm("ours", 4), **options).value
    np.testing.assert_allclose(value(statistic="mean"), J.mean() / J_base.mean())
    np.testing.assert_allclose(value(statistic="median"), np.median(J) / np.median(J_base))
    assert pairing.saturated_environments(rows) == set(SATURATED)
    inside = np.isin(np.arange(10), SATURATED)
    for where, part in {"saturated": inside, "unsaturated": ~inside, "all": inside | True}.items():
        np.testing.assert_allclose(value(where=where), np.exp(np.log(J / J_base)[:, part].mean()))
        assert evaluate.ratio(rows, Arm("ours", 4), where=where).count == 3 * part.sum()


def test_methods_without_seed_or_model_stand_beside_all_runs(rng):
    J, start = rng.uniform(1, 9, (4, 6)), rng.uniform(1, 9, (2, 6))
    rows = stack(
        episodes("stand", J, models=[0, 0, 1, 1], seeds=[0, 1, 0, 1]),
        episodes("pretrained", start, p=0, models=[0, 1], seeds=[-1, -1]),
        oracle(6, np.full((1, 6), 0.5)),
    )
    found = evaluate.ratio(rows, Arm("pretrained"), Arm("stand", 4))
    np.testing.assert_allclose(found.value, np.exp(np.log(start[[0, 0, 1, 1]] / J).mean()))
    assert (found.count, found.dropped) == (24, 0)
    np.testing.assert_allclose(
        evaluate.ratio(rows, Arm("stand", 4), "oracle_damping").value, np.exp(np.log(J / 0.5).mean())
    )
    np.testing.assert_allclose(evaluate.ratio(rows, Arm("pretrained"), "oracle_damping").count, 12)


def test_episodes_without_partner_are_dropped_and_counted(rng):
    J, J_base = rng.uniform(1, 9, (2, 3, 5))
    rows = stack(episodes("stand", J_base), episodes("ours", J))
    half = {name: values[:-2] for name, values in rows.items()}  # the last run of `ours` is not finished
    found = evaluate.ratio(half, Arm("ours", 4))
    np.testing.assert_allclose(found.value, np.exp(np.log(J / J_base)[:2].mean()))
    assert (found.count, found.dropped) == (10, 8)
    fewer = evaluate.ratio(stack(episodes("stand", J_base), episodes("ours", J[:, :3])), Arm("ours", 4))
    np.testing.assert_allclose(fewer.value, np.exp(np.log(J / J_base)[:, :3].mean()))
    assert (fewer.count, fewer.dropped) == (9, 6)


def epochs(method, shape, factors, validation_factors):
    """Evaluations of several epochs: J = factor of the epoch, on the test and on the validation split."""
    last = len(factors) - 1
    make = lambda f, i, split: episodes(method, np.full(shape, f), epoch=i, last=i == last, split=split)
    test = [make(f, i, "test") for i, f in enumerate(factors)]
    return stack(*test, *(make(f, i, "validation") for i, f in enumerate(validation_factors)))


def test_protocols():
    rows = stack(
        epochs("stand", (2, 3), [8.0, 8.0, 8.0, 8.0, 8.0, 8.0, 8.0], [1.0] * 7),
        epochs("ours", (2, 3), [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0], [9.0, 9.0, 2.0, 9.0, 9.0, 9.0, 9.0]),
    )
    value = lambda protocol: evaluate.ratio(rows, Arm("ours", 4), protocol=protocol).value
    np.testing.assert_allclose(value("last"), 7 / 8)
    np.testing.assert_allclose(value("best_validation"), 3 / 8)
    np.testing.assert_allclose(value("top_five"), 3 / 8)  # mean of 1 .. 5
    test_only = {name: v[rows["split"] == "test"] for name, v in rows.items()}
    with pytest.raises(ValueError, match="no test episodes of stand, p = 4 under the protocol 'best_validation'"):
        evaluate.ratio(test_only, Arm("stand", 4), protocol="best_validation")


def test_an_epoch_of_which_only_cheap_environments_are_done_is_not_among_the_best():
    rows = stack(epochs("ours", (1, 3), [5.0, 4.0], []), episodes("ours", [[0.1]], epoch=9, last=False))
    assert pairing.costs(rows, Arm("ours", 4), protocol="top_five") == {(0, 0): {0: 4.5, 1: 4.5, 2: 4.5}}


def test_one_epoch_leaves_nothing_to_choose():
    rows = stack(episodes("stand", np.ones((2, 3))), epochs("ours", (2, 3), [2.0, 1.0], [1.0, 2.0]))
    for protocol in ("best_validation", "top_five"):
        with pytest.raises(pairing.MissingEpisodes, match=protocol):
            evaluate.ratio(rows, Arm("ours", 4), protocol=protocol)
    assert evaluate.ratio(rows, Arm("ours", 4)).value == 1.0


def test_a_ratio_on_validation_payloads():
    rows = stack(
        *(
            epochs(method, (2, 3), [test], [validation])
            for method, test, validation in (("stand", 1, 2), ("ours", 3, 5))
        )
    )
    assert evaluate.ratio(rows, Arm("ours", 4), split="validation").value == pytest.approx(2.5)
    assert evaluate.ratio(rows, Arm("ours", 4)).value == pytest.approx(3.0)


def test_seeds_of_one_pretrained_model_are_not_new_trainings(rng):
    """Two models that differ by 20 %, seeds that do not differ: the interval spans the models, however many seeds."""
    factor = np.repeat([0.9, 1.1], 5)[:, None] * np.ones((10, 4))
    of = dict(models=np.repeat([0, 1], 5), seeds=np.tile(np.arange(5), 2))
    rows = stack(episodes("stand", np.ones((10, 4)), **of), episodes("ours", factor, **of))
    found = evaluate.ratio(rows, Arm("ours", 4))
    np.testing.assert_allclose(astuple(found)[:3], [np.sqrt(0.99), 0.9, 1.1])
    of = dict(models=[0, 0, 1], seeds=[0, 1, 0])
    factor = np.array([[0.8], [0.9], [1.1]]) * np.ones(4)
    uneven = stack(episodes("stand", np.ones((3, 4)), **of), episodes("ours", factor, **of))
    found = evaluate.ratio(uneven, Arm("ours", 4))
    np.testing.assert_allclose([found.low, found.high], [0.8, 1.1])


def test_headroom(rng):
    base = rng.uniform(1, 9, (3, 5))
    rows = stack(episodes("stand", base), episodes("ours", base * 0.9), oracle(5, base[:1] * 0 + 0.5))
    expected = np.log(1 / 0.9) / np.log(base / 0.5).mean()
    np.testing.assert_allclose(evaluate.headroom(rows, Arm("ours", 4)).value, expected)
    whole = evaluate.headroom(rows, Arm("oracle_damping"), Arm("stand", 4))
    np.testing.assert_allclose(astuple(whole)[:3], 1.0)
    worse = stack(episodes("stand", base), episodes("ours", base), oracle(5, np.full((1, 5), 99.0)))
    assert np.isnan(evaluate.headroom(worse, Arm("ours", 4)).value)


def test_summary(rng):
    J = rng.uniform(1, 9, (3, 5))
    out = evaluate.summary(episodes("ours", J, unstable=np.arange(15) < 2), Arm("ours", 4))
    np.testing.assert_allclose([out["J"], out["J_median"]], [J.mean(), np.median(J)])
    assert out["velocity_share"] == pytest.approx(0.25)
    assert (out["unstable"], out["failed"], out["episodes"], out["q_rmse"]) == (2, 15, 15, pytest.approx(0.01))


def test_a_diverged_episode_is_not_hidden(rng):
    J = rng.uniform(1, 9, (3, 5))
    J_bad = J.copy()
    J_bad[1, 2] = np.inf
    found = evaluate.ratio(stack(episodes("stand", J), episodes("ours", J_bad)), Arm("ours", 4))
    assert found.value == found.high == np.inf
    for bad in (np.nan, 0.0):
        J_bad[1, 2] = bad
        with pytest.raises(ValueError, match="zero, negative or NaN"):
            evaluate.ratio(stack(episodes("stand", J), episodes("ours", J_bad)), Arm("ours", 4))


def test_what_cannot_be_compared_is_refused(rng):
    rows = stack(episodes("stand", np.ones((2, 3))), episodes("ours", np.ones((2, 3)), seeds=[5, 6]))
    with pytest.raises(ValueError, match="no test episodes of regret, p = 4"):
        evaluate.ratio(rows, Arm("regret", 4))
    with pytest.raises(ValueError, match="ours, p = 4 and stand, p = 4 have no .*episodes in common"):
        evaluate.ratio(rows, Arm("ours", 4))
    with pytest.raises(ValueError, match="'environment': 0, 'epoch': 5} is there twice"):
        evaluate.ratio(stack(rows, rows), Arm("stand", 4), "ours")
    with pytest.raises(ValueError, match="no episode of oracle_damping"):
        evaluate.ratio(rows, Arm("stand", 4), where="saturated")
