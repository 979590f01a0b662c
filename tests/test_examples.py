import re
import runpy
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = [path for path in sorted((ROOT / "examples").glob("*.py")) if "your_own" not in path.stem]  # see below


def test_readme_shows_the_twenty_lines():
    assert (ROOT / "examples" / "twenty_lines.py").read_text() in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_prints_numbers_that_are_finite(path, capsys):
    runpy.run_path(str(path), run_name="__main__")
    numbers = [float(text) for text in re.findall(r"-?\d+\.\d*(?:e[+-]?\d+)?", capsys.readouterr().out)]
    assert len(numbers) >= 9 and np.all(np.isfinite(numbers)) and np.ptp(numbers) > 0.1


def test_twenty_lines_give_first_controls_within_their_bounds(capsys):
    """The three carts are pushed back as hard as the bounds allow, or nearly."""
    runpy.run_path(str(ROOT / "examples" / "twenty_lines.py"), run_name="__main__")
    first = [float(text) for text in re.findall(r"-?\d+\.\d*", capsys.readouterr().out)][:3]
    assert all(-1.0 - 1e-6 <= u < 0.0 for u in first) and first[1] < -0.99


@pytest.mark.slow
def test_a_tailored_model_tracks_better(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(ROOT / "examples" / "tailor_your_own.py"), run_name="__main__")
    before, after = map(float, re.findall(r"error (\S+) rad before, (\S+) after", capsys.readouterr().out)[0])
    assert after < 0.5 * before
    assert (tmp_path / "tailored.npz").exists()


@pytest.mark.slow
def test_the_cost_of_a_controller_is_learned_from_its_log(capsys):
    runpy.run_path(str(ROOT / "examples" / "imitate_your_own.py"), run_name="__main__")
    numbers = [float(text) for text in re.findall(r"-?\d+\.\d*(?:e[+-]?\d+)?", capsys.readouterr().out)]
    assert numbers[1] < 1e-12 < 0.1 < numbers[0]
    np.testing.assert_allclose(numbers[2:], [1.0, 0.2, 0.05, 0.5], rtol=1e-6)


@pytest.mark.slow
def test_a_controller_is_tuned_on_a_plant_with_friction(capsys):
    runpy.run_path(str(ROOT / "examples" / "tune_your_own.py"), run_name="__main__")
    before, after = map(float, re.findall(r"merit (\S+) -> (\S+) in", capsys.readouterr().out)[0])
    assert after < 0.7 * before


@pytest.mark.slow
def test_a_car_laps_a_track_from_a_file_and_what_matters_is_told(capsys):
    runpy.run_path(str(ROOT / "examples" / "race_your_own.py"), run_name="__main__")
    told = capsys.readouterr().out
    assert 5.0 < float(re.findall(r"m: (\S+) s", told)[0]) < 8.0
    assert all(phase in told for phase in ("straight", "entry", "apex", "exit")) and "v_y [m/s]" in told
