"""The weightings that the Panda experiment compares, from labels and the statistics of the data."""

from collections.abc import Sequence

import equinox as eqx
import numpy as np

from sartor.experiments.panda_config import WINDOW, Config
from sartor.models.base import AbstractModel
from sartor.samples import Windows
from sartor.systems import panda
from sartor.train import losses, rollout_loss
from sartor.weights import (
    Elementwise,
    States,
    Weights,
    constant,
    from_factors,
    from_labels,
    mix,
    per_environment,
    regret_factors,
    scaled,
)


def weights(
    method: str, samples: Windows, labels: dict[str, np.ndarray], model: AbstractModel, num_steps: int, config: Config,
    seed: int = 0,
) -> Weights:  # fmt: skip
    """Weights of some samples.

    Args:
        method: A `Weighting`.
        samples: The samples.
        labels: Arrays of their labels, as `labelled` writes them, with `S_closed_loop`.
        model: The model before training, which the `_env` methods measure environments with.
        num_steps: p.
        config: Its `states` (which count), `share` (of the uniform loss that is mixed in), and `error`, `combine` and
            `eps` of the labels.
        seed: Of the permutation of `ours_shuffled`.
    """
    states: States = config.states
    name, robust = method.removesuffix("_env"), method.endswith("_env")
    uniform = constant(1.0 / samples.xs.std((0, 1)), samples.size, num_steps, states)
    if name in ("ones", "stand", "norm", "mpc_cost"):
        found: Weights = constant(_per_state(name, samples), samples.size, num_steps, states)
    elif name == "regret":
        found = from_factors(regret_factors(labels["Lambda"], labels["du0_de"]), num_steps, states)
    else:
        S = labels["S_closed_loop"] if name == "closed_loop" else combined(labels, config)
        if name == "ours_avg":
            S = np.broadcast_to(S[labels["ok"]].mean(0), S.shape)
        elif name == "ours_shuffled":
            S = S[np.random.default_rng(seed).permutation(len(S))]
        found = from_labels(S, num_steps, states)
    if config.share > 0.0 and isinstance(found, Elementwise):
        found = mix(found, uniform, config.share)
    if robust:
        before = losses(eqx.Partial(rollout_loss, panda.DT), model, (samples, uniform))
        found = scaled(found, per_environment(before, samples.environment))
    return found


def combined(labels: dict[str, np.ndarray], config: Config) -> np.ndarray:
    """S = |Σ_j g_j du_0[j]/de| or Σ_j |g_j du_0[j]/de| from the parts of labels, (B, N, nx).

    The slopes g at ε = 0.1 Nm are those of any other ε up to its size: at a bound, where they are multipliers instead,
    du_0/de is zero.
    """
    g = labels["dJ_du0"] * (0.01 * np.asarray(panda.U_MAX) / 0.1 if config.eps == "limits" else 1.0)
    terms = g[:, :, None, None] * labels["du0_derror" if config.error == "trajectory" else "du0_de"]
    return np.abs(terms.sum(1)) if config.combine == "signed" else np.abs(terms).sum(1)


def closed_loop_labels(
    labels: dict[str, np.ndarray], xs: Sequence[np.ndarray], refs: Sequence[np.ndarray]
) -> np.ndarray:
    """|dJ/du_t · du_0/de| with the gradient of the recorded closed-loop cost instead of the MPC's own curvature.

    J is the cost (7) of the `WINDOW` control steps after t, fewer at the end of a run: later ones would be far from
    what Jacobians along the run can tell. A backward pass along it, with the model's Jacobians A, B and the
    controller's feedback K = du_0/dx_0 (what the controller remembers is left out):

        dJ/du_t = B_tᵀ p_{t+1},   p_s = 2 Q (x_s - r_s) + (A_s + B_s K_s)ᵀ p_{s+1},   p_{t+WINDOW+1} = 0

    A, B and K between two labels are those of the earlier one. Samples without a label are passed over; theirs are
    zero.

    Args:
        labels: Labels of some steps of runs, as `label_samples` gives them, with `run` and `step`.
        xs: The states of each run, (T+1, 14).
        refs: The reference there.
    """
    Q, S = np.asarray(panda.WEIGHTS), np.zeros_like(labels["S"])
    for run in np.unique(labels["run"]):
        which = np.flatnonzero((labels["run"] == run) & labels["ok"])
        which = which[np.argsort(labels["step"][which])]
        if not len(which):
            continue
        A, B, K, du0_de = (labels[name][which] for name in ("A", "B", "du0_dx0", "du0_de"))
        A_cl = A + B @ K
        steps, slope = labels["step"][which], 2.0 * Q * (xs[run] - refs[run])
        p = np.zeros((len(which), 14))
        for ahead in range(WINDOW, 0, -1):  # of all samples of the run together
            s = steps + ahead
            here = np.searchsorted(steps, s, "right") - 1
            p = slope[np.minimum(s, len(slope) - 1)] + np.einsum("byx,by->bx", A_cl[here], p)
            p[s >= len(slope)] = 0.0
        S[which] = np.abs(np.einsum("bxj,bx,bjky->bky", B, p, du0_de))
    return S


def _per_state(name: str, samples: Windows) -> np.ndarray:
    x = samples.xs.reshape(-1, samples.xs.shape[-1])
    return {
        "ones": np.ones(x.shape[-1]),
        "stand": 1.0 / x.std(0),
        "norm": 1.0 / (x.max(0) - x.min(0)),
        "mpc_cost": np.sqrt(np.asarray(panda.WEIGHTS)),
    }[name]
