"""From a track in a CSV file to a lap of an MPC, and to which state its model has to predict where.

The file here is written from a named track; yours has columns x, y, w_right, w_left in metres, or s, x, y, psi, kappa.
"""

import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from sartor import RESULTS
from sartor.models.vehicle import f1tenth
from sartor.racing import RacingPlant, crossings, patches, race
from sartor.racing_labels import label_drive, phases, shares
from sartor.systems import racing_car
from sartor.track_files import read_track
from sartor.track_generator import named

jax.config.update("jax_enable_x64", True)

HORIZON, STEPS = 30, 260


def write_example(path: Path) -> None:
    """A stand-in for your file."""
    track = named("fin")
    s = np.linspace(0.0, float(track.length), 300, endpoint=False)
    xy = jax.vmap(track.place)(jnp.asarray(s), jnp.zeros(300))
    left, right = jax.vmap(track.walls_at)(jnp.asarray(s))
    np.savetxt(path, np.column_stack([xy, right, left]), delimiter=",", header="x_m,y_m,w_right_m,w_left_m")


with tempfile.TemporaryDirectory() as folder:
    write_example(Path(folder) / "track.csv")
    track = read_track(Path(folder) / "track.csv")

car = f1tenth()  # or SingleTrack(front, rear, body) with your tyres, masses and lags
plant = RacingPlant(car, track, patches(track, base=0.8, seed=0))  # load transfer, patches of friction, delay
theta = racing_car.Theta(car, track)
ran = race(plant, racing_car.controller(theta, HORIZON), racing_car.rolling(speed=2.0), STEPS, jax.random.key(0))
xs, us = np.asarray(ran.xs), np.asarray(ran.us)
lap = crossings(xs[:, 0], np.array([float(track.length)]))[0]
print(
    f"lap of {float(track.length):.1f} m: {lap:.2f} s, failed solves: {int(jnp.sum(ran.results != RESULTS.successful))}"
)

labels = label_drive(theta, HORIZON, xs, us)
phase = phases(track, xs[: len(labels.ok), 0])
errors = np.array([0.01, 0.01, 0.01, 0.05, 0.05, 0.2, 0.0, 0.0, 0.0])  # of a prediction [m, m, rad, m/s, m/s, rad/s]
for name, share in shares(labels.S[labels.ok], phase[labels.ok], errors).items():
    told = ", ".join(
        f"{state} {100 * part:.0f} %" for state, part in zip(racing_car.STATES, share, strict=True) if part
    )
    print(f"{name:9s} {told}")
