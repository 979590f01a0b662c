"""Logs: what cannot be true is named, what can is not, and splits are reproducible."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sartor.data import Log, check


def run(nq=3, num=300, dt=0.02, seed=0, environment=0):
    """A log of independent sinusoids."""
    draw = np.random.default_rng(seed)
    t = dt * np.arange(num + 1)[:, None]
    frequency, phase = draw.uniform(1.0, 6.0, nq), draw.uniform(0.0, 6.0, nq)
    size = draw.uniform(0.1, 2.0, nq)
    q, qd = size * np.sin(frequency * t + phase), size * frequency * np.cos(frequency * t + phase)
    xs = np.hstack([q, qd])
    return Log(xs, draw.normal(size=(num, nq)), xs + 0.1, dt, environment, draw.normal(size=(num, nq)))


@settings(deadline=None, max_examples=50)
@given(nq=st.integers(1, 7), num=st.integers(1, 400), dt=st.floats(1e-3, 0.05), seed=st.integers(0, 10**6))
def test_true_logs_pass(nq, num, dt, seed):
    log = run(nq, num, dt, seed)
    check(log)
    check(log._replace(refs=None, qdds=None, us=np.zeros_like(log.us)))


def test_measured_logs_pass():
    """Encoder noise, filtered velocities, a chatter that the samples cannot show, resting joints."""
    draw, log = np.random.default_rng(0), run(4, 3000, 1e-3)
    q, qd = log.xs[:, :4], log.xs[:, 4:]
    check(log._replace(xs=np.hstack([q + draw.normal(0, 2e-4, q.shape), qd])))
    check(log._replace(xs=np.hstack([q, qd + draw.normal(0, 0.3, qd.shape)])))
    late = np.vstack([qd[:1].repeat(20, 0), qd[:-20]])
    check(log._replace(xs=np.hstack([q, late])))
    chatter = np.where(np.arange(len(q)) % 2, 3.0, -3.0)[:, None]
    check(log._replace(xs=np.hstack([q, qd + chatter])))
    check(log._replace(xs=draw.normal(0, 1e-3, log.xs.shape)))


@pytest.mark.parametrize(
    "q, qd, time, named",
    [
        (1, 180 / np.pi, 1, "velocities look like deg/s"),
        (180 / np.pi, 1, 1, "positions look like degrees"),
        (1, 30 / np.pi, 1, "revolutions per minute"),
        (1, -1, 1, "opposite sign"),
        (1, 1, 1e3, "milliseconds taken for seconds"),
        (1, 1, 1e-3, "seconds taken for milliseconds"),
        (1, 1, 1e6, "nanoseconds taken for milliseconds"),
        (1, 1, 1e9, "nanoseconds taken for seconds"),
        (1, 5, 1, "a unit or the rate is wrong"),
    ],
)
def test_wrong_units_are_named(q, qd, time, named):
    log = run()
    wrong = log._replace(xs=np.hstack([q * log.xs[:, :3], qd * log.xs[:, 3:]]), dt=time * log.dt)
    with pytest.raises(ValueError, match=rf"here: velocity xs\[:, 3\].*position xs\[:, 0\].*{named}"):
        check(wrong, "here")


@pytest.mark.parametrize("factor", [0.6, 0.8, 1.25, 1.67, 2.0])
@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_a_wrong_rate_is_refused_with_noise_too(factor, noise):
    draw, log = np.random.default_rng(0), run(4, 3000, 1e-3)
    q, qd = log.xs[:, :4], log.xs[:, 4:]
    with pytest.raises(ValueError, match="a unit or the rate is wrong"):
        check(log._replace(xs=np.hstack([q, factor * qd + draw.normal(0, noise, qd.shape)])))


def test_mixed_up_columns_are_named():
    log = run()
    with pytest.raises(ValueError, match=r"velocity xs\[:, 4\] is not .* It fits the position xs\[:, 2\]"):
        check(log._replace(xs=log.xs[:, [0, 1, 2, 3, 5, 4]]))
    with pytest.raises(ValueError, match=r"velocity xs\[:, 5\] is not .*mixed up"):
        check(log._replace(xs=log.xs * [1, 1, 1, 1, 1, 0]))


def test_wrong_shapes_are_named():
    log = run(2, 20)
    for wrong, named in (
        (log._replace(us=log.us[:0]), "us must have shape"),
        (log._replace(us=log.us[:, 0]), "us must have shape"),
        (log._replace(xs=log.xs[:-1]), r"xs must have shape \(21, 4\)"),
        (log._replace(refs=log.refs[:, :2]), r"refs must have shape \(21, 4\)"),
        (log._replace(qdds=log.xs), r"qdds must have shape \(20, 2\)"),
        (log._replace(dt=0.0), "dt must be positive"),
        (log._replace(environment=-1), "environment must be"),
    ):
        with pytest.raises(ValueError, match=named):
            check(wrong)


def test_rows_that_are_not_finite_are_named():
    log = run(2, 20)
    us = log.us.copy()
    us[[3, 4, 5, 6, 7, 9], 1] = np.nan
    with pytest.raises(ValueError, match=r"us\[:, 1\] is .*not finite in rows 3, 4, 5, 6, 7 and 1 more\."):
        check(log._replace(us=us))
