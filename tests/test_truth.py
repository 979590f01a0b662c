"""Rank correlations of labels with the truth."""

import numpy as np
import pytest

from sartor.truth import along, diagonal_regret, ranks


def test_ranks_tell_entries_from_samples():
    rng = np.random.default_rng(0)
    pattern, size = rng.uniform(1.0, 2.0, 6), rng.uniform(1.0, 2.0, 8)
    true = size[:, None] * pattern
    same_entries = ranks(np.broadcast_to(pattern, true.shape), true)
    assert same_entries.within == pytest.approx(1.0) and np.isnan(same_entries.across)  # it does not vary
    same_samples = ranks(np.broadcast_to(size[:, None], true.shape), true)
    assert same_samples.across == pytest.approx(1.0) and np.isnan(same_samples.within)
    assert ranks(-true, true).overall == pytest.approx(-1.0)


def test_samples_that_are_not_known_do_not_count():
    true = np.arange(12.0).reshape(4, 3)
    estimate = true.copy()
    estimate[1, 1] = np.nan
    found = ranks(estimate, true)
    assert found.n == 3 and found.overall == pytest.approx(1.0)


def test_slopes_and_curvatures_act_along_the_sensitivity():
    sensitivity = np.array([[[1.0, -2.0], [0.5, 4.0]]])
    np.testing.assert_allclose(along(np.array([[2.0, -1.0]]), sensitivity), [[1.5, 8.0]])
    np.testing.assert_allclose(diagonal_regret(sensitivity, np.array([[4.0, 1.0]])), [[np.sqrt(4.25), np.sqrt(32.0)]])
