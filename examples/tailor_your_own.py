"""Your robot file and a log in, a tailored model file out: a two-joint arm that carries an unknown load."""

import jax
import jax.numpy as jnp
import mujoco
import numpy as np

import sartor
from sartor.logs import Columns, read_log, write_log
from sartor.models.base import ArmDynamics, Nominal, Theta
from sartor.models.mjcf import from_mujoco
from sartor.models.mlp import ResidualMLP
from sartor.models.store import save_model
from sartor.plant import Plants
from sartor.samples import windows
from sartor.tracking import Tracker, track
from sartor.train import Config, fit
from sartor.weights import from_labels

jax.config.update("jax_enable_x64", True)
DT, N, ARM = 0.02, 8, """<mujoco><option timestep="0.002"/><worldbody><body><joint name="a" axis="0 1 0" damping="{d}"/>
<geom type="capsule" size="0.03" fromto="0 0 0 0.4 0 0" mass="1"/><body pos="0.4 0 0"><joint name="b" axis="0 1 0"
damping="{d}"/><geom type="capsule" size="0.03" fromto="0 0 0 0.3 0 0" mass="{m}"/></body></body></worldbody><actuator>
<motor joint="a" ctrlrange="-30 30"/><motor joint="b" ctrlrange="-30 30"/></actuator></mujoco>"""  # fmt: skip
arm = lambda m, d: mujoco.MjModel.from_xml_string(ARM.format(m=m, d=d))
nominal = from_mujoco(arm(0.5, 0.0))  # yours: from_mjcf("robot.xml")
plants = Plants([arm(1.5, 0.5)], DT)  # your robot

Q = jnp.array([1000.0, 1000.0, 10.0, 10.0])
problem = sartor.Problem(
    dynamics=ArmDynamics(DT),
    stage_cost=lambda x, u, k, theta: DT * ((x - theta.reference[k]) @ (Q * (x - theta.reference[k])) + 1e-3 * u @ u),
    terminal_cost=lambda x, theta: (x - theta.reference[N]) @ (Q * (x - theta.reference[N])),
    horizon=N, u_min=[-30.0, -30.0], u_max=[30.0, 30.0],
)  # fmt: skip
t = DT * np.arange(300 + N + 1)[:, None] * np.array([2.0, 3.0])
refs = np.concatenate([np.sin(t) ** 2, np.array([2.0, 3.0]) * np.sin(2 * t)], 1)[None]
drive = lambda model: track(plants, Tracker(problem, model, DT), refs, 300).logs[0]
error = lambda log: np.sqrt(np.mean((log.xs[:, :2] - log.refs[:, :2]) ** 2))

columns = Columns("time", ("q1", "q2"), ("v1", "v2"), ("tau1", "tau2"), ("r1", "r2"), ("w1", "w2"))
write_log("arm.csv", drive(Nominal(nominal)), columns)  # yours is there already
log = read_log("arm.csv", columns, DT)
model = ResidualMLP(nominal, num_contexts=2, hidden=8, num_layers=1, history_length=5, key=jax.random.key(0))
samples = windows([log], model, N)


@jax.jit
@jax.vmap
def labels(x0, past, reference):
    found = sartor.label(problem, Theta(model, model.context(past), reference), x0)
    return found.S, found.result == sartor.RESULTS.successful


ahead = log.refs[samples.step[:, None] + np.arange(N + 1)]
S, ok = (np.asarray(a) for a in labels(samples.x0, samples.history.astype(float), ahead))
tailored, _ = fit(model, samples.take(ok), from_labels(S[ok], 4, "both"), Config(60, batch=64, learning_rate=3e-3))
save_model("tailored.npz", tailored)
print("weights of the errors of q1 and q2, one and eight steps ahead:", S[ok].mean(0)[[0, -1], :2].round(3))
print(f"labels {ok.sum()} of {len(ok)}; tracking error {error(log):.4f} rad before, {error(drive(tailored)):.4f} after")
