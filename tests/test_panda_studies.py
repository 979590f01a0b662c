"""What the Panda experiment varies, how labels are combined, and how they are compared with the truth."""

from typing import NamedTuple

import jax
import numpy as np
import pytest

from sartor.experiments import panda_jobs as jobs
from sartor.experiments.panda import Config
from sartor.experiments.panda_studies import VARIANTS, Cell, cells
from sartor.experiments.panda_truth import EPS, branches, correlations
from sartor.experiments.panda_weights import closed_loop_labels, combined, weights
from sartor.files import save_arrays
from sartor.samples import Windows
from sartor.systems import panda

PAPER = Config(preset="paper").resolved()


def test_every_model_has_files_of_its_own():
    chosen = cells(PAPER)
    assert len({cell.final(PAPER) for cell in chosen}) == len(chosen)


def test_the_whole_table_has_the_size_that_was_asked_for():
    main = [cell for cell in cells(PAPER) if cell.study == "main"]
    assert len(main) == (11 + 7 + 7) * 2 * 5
    assert {p: {cell.method for cell in main if cell.p == p} for p in (1, 12)} == {
        p: set(PAPER.others) for p in (1, 12)
    }
    alone = [cell for cell in cells(PAPER) if cell.study == "alone"]
    assert len(alone) == 7 * 2 * 5 and all(cell.config(PAPER).anchor == 0.0 for cell in alone)


def test_the_recipe_of_a_small_network_begins_where_its_single_round_does():
    name = "[8, 8], LSTM of 8"
    one, recipe = (Cell(0, "stand", 4, 0, "capacity", variant) for variant in (name, f"{name}, recipe"))
    assert recipe.start == one.start == "pretrained-0-8_8_lstm_of_8" and recipe.name != one.name
    assert recipe.config(PAPER).rounds == 2 and recipe.config(PAPER).hidden == 8
    assert Cell(0, "stand", 4, 0, "capacity", "[8, 8]").start == "pretrained-0-8_8"


def test_variants_change_fields_that_exist_and_say_so_in_their_names():
    fields = PAPER.__dataclass_fields__
    for variants in VARIANTS.values():
        for _, methods, changed in variants:
            assert methods and changed and set(changed) <= set(fields)
            assert all(changed[name] != getattr(PAPER, name) for name in changed)
    smaller = Cell(0, "ours", 4, 1, "capacity", "[8, 8]")
    assert smaller.name == "ours-p4-m0-s1-8_8" and smaller.start == "pretrained-0-8_8" and smaller.labels == "labels"
    assert smaller.config(PAPER).widths == (8, 8)
    other = Cell(1, "ours", 4, 0, "ablation", "Gauss-Newton")
    assert other.start == "pretrained-1" and other.labels == "labels-gauss_newton"


def test_more_payloads_share_the_files_of_fewer(tmp_path):
    few, odd, many = (dict(jobs.driven(tmp_path, "pretrained-0", 1, count)) for count in (30, 25, 100))
    assert all(np.array_equal(many[file], runs) for file, runs in few.items())
    assert all(np.array_equal(many[file], runs) for file, runs in odd.items() if file in many)
    assert [sum(map(len, files.values())) for files in (few, odd, many)] == [30, 25, 100]


# --- Labels ----------------------------------------------------------------------------------------------------------


def some_labels(count, seed=0):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.normal(size=(count, *shape))
    return {
        "dJ_du0": np.abs(normal(7)), "du0_de": normal(7, 12, 14), "du0_derror": normal(7, 12, 14),
        "du0_dx0": 0.1 * normal(7, 14), "Lambda": np.tile(np.eye(7), (count, 1, 1)), "S": np.abs(normal(12, 14)),
        "A": np.eye(14) + 0.1 * normal(14, 14), "B": 0.1 * normal(14, 7), "ok": np.ones(count, bool),
        "run": np.zeros(count, int), "step": np.arange(count), "S_closed_loop": np.abs(normal(12, 14)),
    }  # fmt: skip


def test_labels_are_combined_as_the_configuration_says():
    found = some_labels(3)
    g, d = found["dJ_du0"], found["du0_de"]
    signed = combined(found, PAPER)
    np.testing.assert_allclose(signed[1, 2, 3], abs(sum(g[1, j] * d[1, j, 2, 3] for j in range(7))))
    absolute = combined(found, Cell(0, "ours", 4, 0, "ablation", "sum of magnitudes").config(PAPER))
    np.testing.assert_allclose(absolute[1, 2, 3], sum(abs(g[1, j] * d[1, j, 2, 3]) for j in range(7)))
    assert np.all(absolute >= signed)
    by_limit = combined(found, Cell(0, "ours", 4, 0, "ablation", "eps by torque limit").config(PAPER))
    limits = np.asarray(panda.U_MAX)
    expected = abs(sum(0.1 * limits[j] * g[1, j] * d[1, j, 2, 3] for j in range(7)))
    np.testing.assert_allclose(by_limit[1, 2, 3], expected)


@pytest.mark.parametrize("stride", [1, 3])
def test_the_slopes_of_the_closed_loop_are_those_of_its_cost(stride):
    """Of the linear loop x_{k+1} = A x_k + B (u_k + K (x_k - x_k*)), by differences; labels may be some steps apart."""
    count, rng = 3, np.random.default_rng(1)
    found = some_labels(count)
    found["step"] = stride * np.arange(count)
    steps = found["step"][-1] + 1
    xs, refs = rng.normal(size=(2, steps, 14))
    Q = np.asarray(panda.WEIGHTS)
    S = closed_loop_labels(found, [xs], [refs])

    def cost(u_first):
        dx, total = np.zeros(14), 0.0
        for k in range(steps):
            total += Q @ (xs[k] + dx - refs[k]) ** 2
            i = k // stride
            du = found["du0_dx0"][i] @ dx + (u_first if k == 0 else 0.0)
            dx = found["A"][i] @ dx + found["B"][i] @ du
        return total

    g = np.array([(cost(1e-4 * e) - cost(-1e-4 * e)) / 2e-4 for e in np.eye(7)])
    np.testing.assert_allclose(S[0], np.abs(np.einsum("j,jkx->kx", g, found["du0_de"][0])), rtol=1e-6)


def test_slopes_of_the_closed_loop_see_a_window_and_pass_over_samples_without_a_label():
    found, rng = some_labels(60), np.random.default_rng(1)
    found["A"] *= 0.9
    xs, refs = rng.normal(size=(2, 60, 14))
    before = closed_loop_labels(found, [xs], [refs])
    later = refs.copy()
    later[41:] += 1.0
    S = closed_loop_labels(found, [xs], [later])
    np.testing.assert_array_equal(S[0], before[0])  # steps 1 to 40
    assert np.all(np.abs(S[1] - before[1]) > 0)
    found["ok"][5] = False
    for name in ("A", "B", "du0_dx0", "du0_de"):
        found[name][5] = np.nan
    S = closed_loop_labels(found, [xs], [refs])
    assert np.all(S[5] == 0.0) and np.isfinite(S).all() and np.all(S[:5] > 0)


@pytest.mark.parametrize("method", ["ones", "stand", "norm", "mpc_cost", "ours", "ours_avg", "ours_shuffled", "regret"])
def test_every_weighting_has_the_same_size(method):
    count, rng = 20, np.random.default_rng(0)
    xs = rng.normal(size=(count, 12, 14))
    samples = Windows(
        xs[:, 0], xs[:, :, :7], xs, np.zeros((count, 1, 21)), *np.zeros((3, count), int), np.full(count, 0.02)
    )
    found = weights(method, samples, some_labels(count), None, 4, PAPER, seed=1)
    size = sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(found)) / count
    assert size == pytest.approx(4 * 7)  # the expected loss of errors that are white with variance 1
    errors = np.zeros((count, 4, 14))
    errors[:, :, 7:] = 1.0
    np.testing.assert_array_equal(found.loss(errors), 0.0)  # velocities do not count


# --- Truth -----------------------------------------------------------------------------------------------------------


def test_rank_correlations_are_one_for_labels_that_are_the_truth_and_less_for_others(tmp_path):
    count, rng = 30, np.random.default_rng(0)
    found = some_labels(count)
    curvature = rng.uniform(1, 2, (count, 7))
    slope = rng.normal(size=(count, 7))
    found |= {"curvature": curvature, "slope": slope, "Lambda": curvature[:, :, None] * np.eye(7)}
    found["dJ_du0"] = np.abs(slope) ** 3
    true = np.abs(np.einsum("bj,bjkx->bkx", slope, found["du0_de"][:, :, :2, :7]))
    found["S"] = np.zeros((count, 12, 14))
    found["S"][:, :2, :7] = true
    found |= {"S_gauss_newton": 2.0 * found["S"], "S_barrier": found["S"] ** 2}
    curvature[0, 0] = np.nan  # next to a torque limit
    half = lambda part: {name: value[part] for name, value in found.items()}
    save_arrays(tmp_path / "model-0-15.npz", **half(slice(0, 12)))
    save_arrays(tmp_path / "model-0-30.npz", **half(slice(12, None)))
    files = [tmp_path / "model-0-15.npz", tmp_path / "model-0-30.npz"]
    rows = {(row["variant"], row["quantity"]): row for row in correlations([files], 2)}
    for key, known in {
        ("Λ, diagonal", "curvature"): count - 1, ("ours: |dJ/du|", "|slope|"): count, ("ours", "S of eq. 4"): count,
        ("ours, Gauss-Newton", "S of eq. 4"): count, ("ours, barrier 0.001", "S of eq. 4"): count,
        ("regret, diagonal of Λ", "regret, true curvature"): count - 1,
    }.items():  # fmt: skip
        assert rows[key]["n"] == known
        assert all(rows[key][kind] == pytest.approx(1.0) for kind in ("overall", "joints", "samples")), key
    row = rows["ours, trajectory error", "S of eq. 4, trajectory error"]
    assert 0.3 < row["overall"] < 1.0  # slopes to the third power
    for control in ("closed_loop", "ours_shuffled"):
        assert abs(rows[control, "S of eq. 4"]["overall"]) < 0.3
    assert np.isnan(rows["ours_avg", "S of eq. 4"]["samples"])  # it does not depend on the sample


class Pushed:
    """Robots whose position is the torque that was applied."""

    def __init__(self, count):
        self.us = np.zeros((count, 7))

    def __len__(self):
        return len(self.us)

    def repeat(self, which):
        return Pushed(len(which))

    def step(self, u):
        self.us = np.clip(u, -np.asarray(panda.U_MAX), np.asarray(panda.U_MAX))
        return np.concatenate([self.us, np.zeros_like(self.us)], 1)


def constant(us):
    """A controller that applies the same torques at all times."""
    return lambda loop, x, refs, first: (np.tile(us, (len(x) // len(us), 1)), loop, None)


class Carried(NamedTuple):
    u: np.ndarray


def test_branches_measure_slope_and_curvature_and_take_one_side_next_to_a_limit():
    limit = np.asarray(panda.U_MAX)
    us = np.stack([np.linspace(-3, 3, 7), np.r_[limit[:2], -limit[2:4], 0.5 * limit[4:]]])
    refs = np.random.default_rng(0).normal(size=(2, 60, 14))
    slope, curvature = branches(Pushed(2), constant(us), Carried(us), np.zeros((2, 14)), refs, True)
    weight = panda.DT * np.asarray(panda.WEIGHTS)[:7]
    away = np.zeros((2, 7))
    away[1, :4] = 0.5 * EPS * np.array([-1, -1, 1, 1])
    np.testing.assert_allclose(slope, weight * (us + away - refs[:, 1, :7]), rtol=1e-9)
    expected = np.tile(weight, (2, 1))
    expected[1, :4] = np.nan
    np.testing.assert_allclose(curvature, expected, rtol=1e-6)
