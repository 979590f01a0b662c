"""Loss weights against their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sartor.weights import (
    Elementwise,
    Factor,
    constant,
    effective,
    explained,
    from_factors,
    from_labels,
    mix,
    per_environment,
    scaled,
    used,
)

B, N, NX, M = 6, 4, 4, 2
seeds = st.integers(0, 2**31 - 1)


def labels(seed=0):
    return np.abs(np.random.default_rng(seed).normal(size=(B, N, NX))) + 0.1


def factors(seed=0):
    return np.random.default_rng(seed).normal(size=(B, M, N, NX))


def mean_square(weights, states):
    """Over the entries that count: the mean loss of errors of 1 that are independent of each other."""
    leaf = np.asarray(jax.tree.leaves(weights)[0])
    total = np.sum(leaf**2, tuple(range(1, leaf.ndim)))
    return np.mean(total) / (leaf.shape[-2] * used(NX, states).sum())


# --- The losses ------------------------------------------------------------------------------------------------------


def test_the_losses_by_hand():
    e = np.array([[1.0, -2.0], [0.5, 3.0]])  # (p, nx)
    W = np.array([[1.0, 0.5], [2.0, 0.0]])
    assert Elementwise(jnp.asarray(W)).loss(e) == pytest.approx(1 + 1 + 1 + 0)
    F = np.array([[[1.0, 1.0], [0.0, 0.0]], [[0.0, 2.0], [2.0, 1.0]]])  # (m, p, nx)
    assert Factor(jnp.asarray(F)).loss(e) == pytest.approx((1 - 2) ** 2 + (-4 + 1 + 3) ** 2)


def test_losses_batch():
    e = np.random.default_rng(1).normal(size=(B, N, NX))
    W, F = labels(), factors()
    np.testing.assert_allclose(
        Elementwise(jnp.asarray(W)).loss(e), [np.sum((w * x) ** 2) for w, x in zip(W, e, strict=True)]
    )
    expected = [sum(np.sum(row * x) ** 2 for row in f) for f, x in zip(F, e, strict=True)]
    np.testing.assert_allclose(Factor(jnp.asarray(F)).loss(e), expected)


def test_an_elementwise_weight_is_a_factor_with_one_row_per_entry():
    W, e = labels()[0, :2], np.random.default_rng(2).normal(size=(2, NX))
    rows = np.diag(W.ravel()).reshape(-1, 2, NX)
    assert Factor(jnp.asarray(rows)).loss(e) == pytest.approx(float(Elementwise(jnp.asarray(W)).loss(e)))


# --- From labels -----------------------------------------------------------------------------------------------------


def test_which_states_count():
    np.testing.assert_array_equal(used(4, "q"), [True, True, False, False])
    np.testing.assert_array_equal(used(4, "qd"), [False, False, True, True])
    assert used(4, "both").all()


@pytest.mark.parametrize("states", ["q", "qd", "both"])
@pytest.mark.parametrize("num_steps", [1, 3, N])
def test_weights_have_a_mean_square_of_one_where_they_count(states, num_steps):
    weights = [
        from_labels(labels(), num_steps, states),
        from_factors(factors(), num_steps, states),
        constant([1.0, 2.0, 3.0, 4.0], B, num_steps, states),
        scaled(from_labels(labels(), num_steps, states), np.arange(1.0, B + 1)),
        scaled(from_factors(factors(), num_steps, states), np.arange(1.0, B + 1)),
    ]
    for w in weights:
        assert mean_square(w, states) == pytest.approx(1)
        leaf = np.asarray(jax.tree.leaves(w)[0])
        assert leaf.shape[0] == B and leaf.shape[-2:] == (num_steps, NX)
        assert np.all(leaf[..., ~used(NX, states)] == 0)


def test_without_clipping_labels_keep_their_proportions():
    W = np.asarray(from_labels(labels(), 3, "both", quantile=1.0).W)
    np.testing.assert_allclose(W / W[0, 0, 0], labels()[:, :3] / labels()[0, 0, 0])
    F = np.asarray(from_factors(factors(), 3, "both", quantile=1.0).F)
    np.testing.assert_allclose(F / F[0, 0, 0, 0], factors()[:, :, :3] / factors()[0, 0, 0, 0])


def test_a_constant_weighs_every_sample_and_step_the_same():
    W = np.asarray(constant([1.0, 2.0, 3.0, 4.0], B, N, "qd").W)
    np.testing.assert_allclose(W, np.broadcast_to(np.array([0, 0, 3, 4]) / np.sqrt(12.5), (B, N, NX)))


@settings(deadline=None, max_examples=25)
@given(seed=seeds, scale=st.floats(1e-6, 1e6), states=st.sampled_from(["q", "qd", "both"]))
def test_the_scale_of_labels_does_not_matter(seed, scale, states):
    S, F = labels(seed), factors(seed)
    np.testing.assert_allclose(from_labels(scale * S, N, states).W, from_labels(S, N, states).W, rtol=1e-9)
    np.testing.assert_allclose(from_factors(scale * F, N, states).F, from_factors(F, N, states).F, rtol=1e-9)


@settings(deadline=None, max_examples=25)
@given(seed=seeds)
def test_weights_go_with_their_samples(seed):
    order = np.random.default_rng(seed).permutation(B)
    S, F = labels(seed), factors(seed)
    np.testing.assert_allclose(from_labels(S[order], N, "both").W, from_labels(S, N, "both").W[order])
    np.testing.assert_allclose(from_factors(F[order], N, "both").F, from_factors(F, N, "both").F[order])


def test_large_labels_are_clipped():
    """Entry by entry for labels; for factors the whole sample, whose direction stays."""
    S = np.ones((B, N, NX))
    S[0, 0, 0] = 1e6
    W = np.asarray(from_labels(S, N, "both", quantile=0.9).W)
    np.testing.assert_allclose(W, 1.0)
    F = factors()
    F[0] *= 1e6
    clipped = np.asarray(from_factors(F, N, "both", quantile=0.5).F)
    size = np.sqrt(np.sum(F**2, (1, 2, 3)))
    limit = np.quantile(size, 0.5)
    np.testing.assert_allclose(clipped / clipped[1, 0, 0, 0], (F * np.minimum(1, limit / size)[:, None, None, None])
                               / (F[1, 0, 0, 0] * min(1, limit / size[1])))  # fmt: skip


def test_states_that_do_not_count_do_not_clip_those_that_do():
    S = labels()
    S[:, :, 2:] *= 1e9
    np.testing.assert_allclose(from_labels(S, N, "q").W, from_labels(labels(), N, "q").W)
    F = factors()
    F[:3, ..., 2:] *= 1e9
    np.testing.assert_allclose(from_factors(F, N, "q").F, from_factors(factors(), N, "q").F)


# --- What is done with weights ---------------------------------------------------------------------------------------


def test_scaling_samples_changes_their_shares_alone():
    per_sample = np.arange(1.0, B + 1)
    e = np.random.default_rng(3).normal(size=(B, N, NX))
    for weights in (from_labels(labels(), N, "both"), from_factors(factors(), N, "both")):
        ratio = scaled(weights, per_sample).loss(e) / weights.loss(e)
        np.testing.assert_allclose(ratio / ratio[0], per_sample**2)


def test_environments_are_weighed_by_their_mean_loss():
    losses, environments = np.array([1.0, 3.0, 8.0, 8.0, 0.0]), [7, 7, 2, 2, 5]
    size = per_environment(losses, environments)
    np.testing.assert_allclose(size[:4], [1 / np.sqrt(2)] * 2 + [1 / np.sqrt(8)] * 2)
    assert np.isfinite(size).all()  # a perfect environment does not divide by zero
    weighted = losses * size**2
    assert weighted[:2].mean() == pytest.approx(1) and weighted[2:4].mean() == pytest.approx(1)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_a_mix_has_the_mixed_loss(share):
    a, b = from_labels(labels(), N, "q"), constant(np.ones(NX), B, N, "both")
    e = np.random.default_rng(4).normal(size=(B, N, NX))
    np.testing.assert_allclose(mix(a, b, share).loss(e), (1 - share) * a.loss(e) + share * b.loss(e))


def test_the_mean_map_explains_constant_labels():
    assert explained(np.tile(labels()[:1], (B, 1, 1))) == pytest.approx(1)
    assert explained(np.array([1.0, -1.0]).reshape(2, 1, 1)) == pytest.approx(0)
    S = labels()
    by_hand = np.sum(S.mean(0) ** 2) * B / np.sum(S**2)  # the energy of the mean over all of it
    assert explained(S) == pytest.approx(by_hand) and 0 < by_hand < 1


def test_effective_samples_are_those_that_make_the_loss():
    S = np.zeros((10, 2, 3))
    S[:4] = 1.0  # four that count alike, six that do not count
    assert effective(S) == pytest.approx(0.4) and effective(np.ones((7, 1, 1))) == pytest.approx(1.0)
    S[0] *= 100.0
    assert effective(S) == pytest.approx(0.1, rel=1e-3)


# --- Errors ----------------------------------------------------------------------------------------------------------


def test_errors_name_what_is_wrong():
    bad = labels()
    bad[1, 2, 3] = np.nan
    with pytest.raises(ValueError, match="S is not finite for 1 of 6 samples: leave out those that failed"):
        from_labels(bad, N, "both")
    bad = factors()
    bad[[0, 4]] = np.inf
    with pytest.raises(ValueError, match="F is not finite for 2 of 6 samples"):
        from_factors(bad, N, "both")
    for wrong in ([1.0, np.inf, 1.0, 1.0], [1.0, -1.0, 1.0, 1.0], np.ones((2, 2))):
        with pytest.raises(ValueError, match="per_state must be a vector of finite numbers"):
            constant(wrong, B, N, "both")
    with pytest.raises(ValueError, match="states must be 'q', 'qd' or 'both', not 'v'"):
        from_labels(labels(), N, "v")
    with pytest.raises(ValueError, match=r"share must lie in \[0, 1\], not 1.5"):
        mix(constant(np.ones(NX), B, N, "q"), constant(np.ones(NX), B, N, "q"), 1.5)


def test_weights_that_are_all_zero_are_refused():
    for make in (
        lambda: from_labels(np.zeros((B, N, NX)), N, "both"),
        lambda: from_factors(np.zeros((B, M, N, NX)), N, "both"),
        lambda: constant([0.0, 0.0, 1.0, 1.0], B, N, "q"),
        lambda: scaled(from_labels(labels(), N, "both"), np.zeros(B)),
    ):
        with pytest.raises(ValueError, match="all weights are zero: nothing would be learned"):
            make()


def test_labels_of_fewer_steps_than_asked_for_are_refused():
    with pytest.raises(ValueError, match="num_steps"):
        from_labels(labels(), N + 1, "both")
    with pytest.raises(ValueError, match="num_steps"):
        from_factors(factors(), N + 1, "both")
