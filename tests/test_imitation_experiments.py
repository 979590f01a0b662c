"""The imitation experiments: their experts are what the paper says, and a run leaves what its report reads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sartor import report, report_imitation
from sartor.descent import Curve, Learned
from sartor.experiments import imitation, imitation_lqr, solver_cost, unrealisable
from sartor.experiments.imitation_systems import demonstrate, system, windy
from sartor.files import read_json
from sartor.parameters import values
from sartor.report_imitation import REPORTS
from sartor.systems import cartpole, pendulum

PAGES = {each.experiment: each for each in REPORTS}


@pytest.mark.parametrize("name, module, nx", [("pendulum", pendulum, 3), ("cartpole", cartpole, 5)])
def test_the_expert_has_the_cost_and_the_dynamics_of_the_system(name, module, nx):
    here, rng = system(name), np.random.default_rng(0)
    for x in here.sample(rng, 5):
        u, theta = jnp.asarray(rng.uniform(-2.0, 2.0, 1)), here.true
        x = jnp.asarray(x)
        np.testing.assert_allclose(
            here.problem.stage_cost(x, u, 0, theta), module.stage_cost(x, u, 0, theta.dx), rtol=1e-12
        )
        np.testing.assert_allclose(here.problem.terminal_cost(x, theta), module.terminal_cost(x, theta.dx), rtol=1e-12)
        np.testing.assert_array_equal(here.problem.dynamics(x, u, 0, theta), module.dynamics(x, u, 0, theta.dx))
    begin = values(here.start)
    np.testing.assert_allclose(begin.weights, 0.5)
    assert begin.goal.shape == (nx + 1,) and len(jax.tree.leaves(begin.dx)) == len(here.true.dx)


def test_the_windy_pendulum_is_the_plain_one_without_damping_and_wind():
    x, u = jnp.array([np.cos(0.4), np.sin(0.4), 0.7]), jnp.array([0.3])
    for damping, damped in (("rate", 0.7), ("angle", 0.4)):
        expert = windy(damping)
        plain = expert.true._replace(dx=expert.true.dx._replace(d=0.0, b=0.0))
        step = lambda theta, x=x, f=expert.problem.dynamics: f(x, u, 0, theta)
        np.testing.assert_allclose(step(plain), pendulum.dynamics(x, u, 0, pendulum.default_theta()), rtol=1e-12)
        only_damped = plain._replace(dx=plain.dx._replace(d=1.0))
        np.testing.assert_allclose(step(only_damped)[2] - step(plain)[2], -0.05 * damped, rtol=1e-9)
        # The wind turns gravity: what it does at φ is what gravity does at φ + b.
        turned = jnp.array([np.cos(0.5), np.sin(0.5), 0.7])
        only_wind = plain._replace(dx=plain.dx._replace(b=0.1))
        np.testing.assert_allclose(step(only_wind)[2], step(plain, turned)[2], rtol=1e-12)


@pytest.mark.slow
def test_demonstrations_follow_the_dynamics_and_depend_on_the_seed_alone():
    here = system("pendulum")
    some, again, other = (demonstrate(here, 5, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(some.us, again.us)
    assert some.us.shape == (5, 19, 1) and not np.allclose(some.us, other.us) and np.abs(some.us).max() <= 2.0
    ahead = [here.problem.dynamics(x, u, 0, here.true) for x, u in zip(some.xs[0, :-1], some.us[0], strict=True)]
    np.testing.assert_allclose(np.stack(ahead), some.xs[0, 1:], atol=1e-7)


@pytest.mark.slow
def test_a_run_of_the_linear_expert_resumes_to_the_same_numbers(tmp_path):
    config = imitation_lqr.Config(preset="smoke", methods=("starts",), workers=0, samples=16)
    imitation_lqr.run(config, tmp_path)
    first = read_json(tmp_path / "trials.json")
    (tmp_path / "trials" / "starts-1.json").unlink()
    imitation_lqr.run(config, tmp_path)
    again = read_json(tmp_path / "trials.json")
    for a, b in zip(first["rows"], again["rows"], strict=True):
        assert {**a, "time": 0} == {**b, "time": 0} and a["imitation"] < a["imitation_curve"][0]
    assert "true model found" in report.page(PAGES["imitation-lqr"], tmp_path).read_text()
    assert (tmp_path / "lqr.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match="other settings"):
        imitation_lqr.run(imitation_lqr.Config(preset="smoke", workers=0, bound=2.0), tmp_path)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: imitation.Config(sizes=(0,)), "sizes must be at least 1"),
        (lambda: imitation.Config(methods=()), "methods is empty"),
        (lambda: imitation_lqr.Config(bound=0.0), "bound must be positive"),
        (lambda: unrealisable.Config(held_out=0), "held_out must be at least 1"),
        (lambda: unrealisable.Config(dampings=()), "dampings is empty"),
        (lambda: solver_cost.Config(workers=2), "workers must be 0 or 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.slow
@pytest.mark.parametrize("module", [imitation, imitation_lqr, unrealisable, solver_cost], ids=lambda m: m.__name__)
def test_the_smoke_preset_reaches_its_page(module, tmp_path):
    config = module.Config(preset="smoke", workers=0)
    module.run(config, tmp_path)
    page = report.page(PAGES[config.experiment], tmp_path).read_text()
    assert "Left out" not in page and "data:image/png" in page


def test_several_starts_end_with_one_that_is_exact_or_the_best(monkeypatch):
    """The first two begin where RMSprop does, others elsewhere; one where nothing can be solved is passed over."""
    losses, begun = {0: 0.5, 1: None, 2: 0.2, 3: 0.3}, []

    def pretended(problem, theta, *args, **options):
        begun.append(float(theta.dx.g.raw))
        loss = losses[len(begun) - 1]
        if loss is None:
            raise FloatingPointError
        failed = np.array([0, 1])  # the lower loss is one of fewer samples
        curve = Curve(np.ones(2), np.array([loss, 0.0]), np.zeros(2), failed)
        return Learned(theta, curve)

    monkeypatch.setattr(imitation, "imitate", pretended)
    trial = imitation.Trial("pendulum", "mpc.dx.gn", 10, 0)
    config = imitation.Config(preset="smoke", starts=4).resolved()
    found, starts = imitation._from_starts(system("pendulum"), trial, config, (None, None, None), lambda *_: None)
    assert starts == 4 and found.curve.validation[0] == 0.2
    assert begun[0] == begun[1] and len({round(g, 6) for g in begun[1:]}) == 3
    begun.clear()
    losses[2] = 1e-12
    assert imitation._from_starts(system("pendulum"), trial, config, (None, None, None), lambda *_: None)[1] == 3


def test_errors_of_the_report_are_those_of_what_plans_depend_on():
    """Twice the cost, and one more of the weights of cos and sin, make the same plans; so do g and l together."""
    true = system("pendulum").true
    weights, linear = np.asarray(true.weights), np.asarray(np.sqrt(true.weights) * true.goal)
    dx = {"g": 20.0, "m": 0.25, "l": 2.0}
    other = 2.0 * weights + np.array([1.0, 1.0, 0.0, 0.0])
    row = {"system": "pendulum", "found": {"dx": dx, "weights": other, "linear": 2.0 * linear}}
    assert max(report_imitation._identified(row).values()) < 1e-12 and report_imitation._cost_error(row) < 1e-12
    row["found"]["weights"] = other + np.array([0.0, 0.0, 0.02, 0.0])
    assert report_imitation._cost_error(row) == pytest.approx(0.01, rel=1e-6)


def test_late_losses_are_the_mean_of_the_last_fifth_and_decide():
    curve = lambda late: {"imitation_curve": [9.0] * 8 + late, "transition_curve": [1.0] * 10}
    row = lambda method, late, last: {
        "damping": "rate", "method": method, "seed": 0, "epoch": list(range(5, 55, 5)), "failed": 0, "time": 1.0,
        "imitation": last, "transition": 1.0, **curve(late),
    }  # fmt: skip
    grid = report_imitation._unrealisable({"rows": [row("sysid", [2.0, 4.0], 4.0), row("mpc.dx", [0.0, 5.0], 5.0)]})
    assert grid.rows[0][2:5] == ["3.000e+00", "2.500e+00", "0.83"]
    assert grid.rows[1][3] == "mpc.dx lower in 1 of 1 (last epoch alone: 0)"
