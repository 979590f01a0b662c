"""Closed tracks: splines against SciPy, geometry against itself, files of all kinds, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.interpolate import CubicSpline

from sartor.track import KNOTS, coefficients, from_points
from sartor.track_files import read_track
from sartor.track_generator import NAMED, generate, named

ANGLES = np.linspace(0.0, 2.0 * np.pi, 120, endpoint=False)
OVAL = np.stack([3.0 * np.cos(ANGLES), 2.0 * np.sin(ANGLES)], 1)


@pytest.fixture(scope="module")
def track():
    return named("fin")


def test_the_spline_is_scipys(track):
    rng = np.random.default_rng(0)
    values = rng.normal(size=KNOTS)
    knots = float(track.length) * np.arange(KNOTS + 1) / KNOTS
    s = rng.uniform(0.0, float(track.length), 50)
    expected = CubicSpline(knots, np.append(values, values[0]), bc_type="periodic")(s)
    found = jax.vmap(lambda s: track.at(jnp.asarray(coefficients(values)), s))(s)
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_curvature_and_heading_are_those_of_the_positions(track):
    s = jnp.linspace(0.0, 2.0 * track.length, 77)  # two laps
    line = lambda s: track.at(track.position, s)
    d, dd = jax.jacfwd(line), jax.jacfwd(jax.jacfwd(line))
    first, second = jax.vmap(d)(s), jax.vmap(dd)(s)
    np.testing.assert_allclose(jnp.linalg.norm(first, axis=1), 1.0, atol=2e-4)
    turning = first[:, 0] * second[:, 1] - first[:, 1] * second[:, 0]
    np.testing.assert_allclose(turning, jax.vmap(track.curvature_at)(s), atol=0.03)
    heading = jax.vmap(track.heading_at)(s)
    np.testing.assert_allclose(jnp.stack([jnp.cos(heading), jnp.sin(heading)], 1), first, atol=2e-4)


def test_a_circle_has_the_curvature_of_its_radius():
    circle = 2.5 * np.stack([np.cos(ANGLES), np.sin(ANGLES)], 1)
    track = from_points(circle, 0.3, 0.2, smoothing=0.0)
    assert float(track.length) == pytest.approx(5.0 * np.pi, rel=1e-6)
    for s in (0.0, 1.234, 20.0):
        assert float(track.curvature_at(jnp.asarray(s))) == pytest.approx(0.4, rel=1e-4)
        assert float(jnp.linalg.norm(track.place(jnp.asarray(s), jnp.asarray(0.3)))) == pytest.approx(2.2, rel=1e-5)
    assert [float(w) for w in track.walls_at(jnp.asarray(3.0))] == pytest.approx([0.3, 0.2])


def test_smoothing_takes_the_noise_out_of_the_curvature():
    noisy = OVAL + np.random.default_rng(1).normal(scale=0.01, size=OVAL.shape)
    exact = np.asarray(from_points(OVAL, 0.3, 0.3, smoothing=0.0).curvature)
    np.testing.assert_allclose(from_points(noisy, 0.3, 0.3, smoothing=0.015).curvature, exact, atol=0.06)
    with pytest.raises(ValueError, match="smooth more"):
        from_points(noisy, 0.3, 0.3, smoothing=0.002)


@pytest.mark.parametrize("name", NAMED)
def test_named_tracks_are_like_those_of_a_laboratory(name):
    track = named(name)
    curvature = np.asarray(jax.vmap(track.curvature_at)(jnp.linspace(0.0, track.length, 500)))
    assert float(track.length) == 18.0 and 1.2 <= np.abs(curvature).max() <= 2.25
    assert 0.44 <= np.abs(curvature).mean() <= 0.66 and curvature.min() < -0.65 and curvature.max() > 0.65
    assert abs(curvature[0]) < 0.2  # a lap begins on a straight
    assert abs(abs(curvature[:-1].mean() * 18.0) - 2.0 * np.pi) < 0.02


def test_a_seed_is_a_track_and_another_seed_another():
    first, again, other = generate(5), generate(5), generate(6, length=36.0, half_width=0.56)
    np.testing.assert_array_equal(first.position, again.position)
    assert float(other.length) == 36.0 and np.abs(other.curvature).max() < 1.2
    with pytest.raises(ValueError, match="no track 'oval'"):
        named("oval")


def _write(path, header, rows, separator=","):
    lines = [separator.join(f"{value:.6f}" for value in row) for row in rows]
    path.write_text("\n".join(([header] if header else []) + lines) + "\n")
    return path


@pytest.mark.parametrize(
    "header, separator",
    [
        ("# x_m, y_m, w_tr_right_m, w_tr_left_m", ","),
        ("x,y,w_right,w_left", ","),
        ("", ","),
        ("X,Y,W_RIGHT,W_LEFT", ","),
        ("x [m],y [m],w_right [m],w_left [m]", ","),
        ("# x,y,w_right,w_left\n# an oval, by hand", ","),
        ("x y w_right w_left", " "),
    ],
)
def test_files_of_centrelines_are_read(tmp_path, header, separator):
    rows = np.column_stack([OVAL, np.full(120, 0.2), np.full(120, 0.4)])
    track = read_track(_write(tmp_path / "oval.csv", header, rows, separator), smoothing=0.0)
    expected = from_points(OVAL, 0.4, 0.2, smoothing=0.0)
    np.testing.assert_allclose(track.curvature, expected.curvature, atol=1e-3)
    assert [float(w) for w in track.walls_at(jnp.asarray(1.0))] == pytest.approx([0.4, 0.2])


def test_files_of_lines_need_a_width(tmp_path):
    zero = np.zeros(120)
    rows = np.column_stack([zero, OVAL, zero, zero])
    path = _write(tmp_path / "line.csv", "# s_m; x_m; y_m; psi_rad; kappa_radpm", rows, "; ")
    assert float(read_track(path, half_width=0.3).walls_at(jnp.asarray(0.0))[0]) == pytest.approx(0.3)
    with pytest.raises(ValueError, match="give half_width"):
        read_track(path)


@pytest.mark.parametrize(
    "xy, options, message",
    [
        (OVAL[:80], {}, "the loop is open: from the last point to the first"),
        (np.delete(OVAL, np.arange(30, 70), 0), {}, "the loop is open: from point 29 to the next"),
        (OVAL[::15], {}, "too few"),
        (np.stack([2.0 * np.sin(ANGLES), np.sin(2.0 * ANGLES)], 1), {}, "crosses itself"),
        (OVAL, {"left": 0.05, "right": 0.1}, "less than the car"),
        (OVAL, {"left": 2.0}, "smooth more, or make it narrower"),
        (np.where(np.arange(120)[:, None] == 3, np.nan, OVAL), {}, "not finite"),
        (OVAL.T, {}, r"shape \(M, 2\)"),
        (OVAL, {"left": np.ones(7)}, "left must be one width"),
    ],
)
def test_what_is_no_track_is_refused(xy, options, message):
    with pytest.raises(ValueError, match=message):
        from_points(xy, **{"left": 0.3, "right": 0.3, **options})


@pytest.mark.parametrize(
    "text, message",
    [
        ("x,y,w_right\n1,2,3\n", "no column holds the width|different points"),
        ("x,b\n1,2\n", "columns .* are missing"),
        ("a,b\n1,2\n", "not all entries are numbers"),
        ("x,y,w_right,w_left\n1,2,3\n", "names for 3 columns"),
        ("x,y,w_right,w_left\n1,2,3,4\n1,2\n", "equally many"),
        ("x,y,w_right,w_left\n1,2,three,4\n", "not all entries are numbers"),
        ("x,y\n", "no rows"),
    ],
)
def test_files_that_are_none_are_refused_by_name(tmp_path, text, message):
    path = tmp_path / "bad.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"bad.csv: .*({message})"):
        read_track(path)


def test_positions_differentiate(track):
    slope = jax.grad(lambda s: track.curvature_at(s))
    s, step = jnp.asarray(4.321), 1e-6
    central = (track.curvature_at(s + step) - track.curvature_at(s - step)) / (2 * step)
    assert float(slope(s)) == pytest.approx(float(central), rel=1e-6)
