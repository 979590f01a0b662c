"""The measurements: every function here returns rows for one table of `tables`."""

import importlib
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import problems
import sartor
from peers import PeerUnavailable
from problems import Problem, cost, rollout, sample
from sartor_solver import Sartor, compile_ahead, projected_gradient, real_time_step
from tables import Row
from timing import Phases, Timing, interleave, peak_memory

Report = Callable[[str], None]

BOX_PROBLEMS = {
    "pendulum": problems.pendulum,
    "cartpole": problems.cartpole,
    "linear": problems.linear,
    "unstable_linear": problems.unstable_linear,
}
SOLVERS = {"SQP": sartor.SQP, "BoxDDP": sartor.BoxDDP}
_DISTURBANCE = 0.01  # standard deviation of what a plant adds to the state between two control steps


# --- solvers -------------------------------------------------------------------------------------


def make_peer(name: str, problem: Problem, threads: int, fatrop_jit: bool) -> Any:
    """Construct a peer with the options that suit the problem. Fails: `PeerUnavailable`."""
    if name.startswith("mpc"):
        module, method = importlib.import_module("peers.mpc_pytorch"), name.removeprefix("mpc_").upper()
        peer = module.MPCPytorch(problem, grad_method=method, threads=threads)
        start = time.perf_counter()
        _prime(module.MPCPytorch(replace(problem, horizon=2), grad_method=method, threads=threads))
        peer.setup_seconds += time.perf_counter() - start
        peer.name = f"mpc.pytorch {method}"
        return peer
    if name == "acados":
        return importlib.import_module("peers.acados").Acados(problem, line_search=problem.name == "cartpole")
    return importlib.import_module("peers.casadi_nlp").CasadiNLP(problem, name, jit=name == "fatrop" and fatrop_jit)


def _prime(peer: Any) -> None:
    """One small gradient: torch loads some seconds' worth of modules at first use, which is not solving."""
    peer.gradient(*sample(peer.problem, 1))


def make_peers(
    names: Iterable[str], problem: Problem, threads: int, fatrop_jit: bool, say: Report
) -> Iterator[tuple[Any, float]]:
    """The peers that can be had here, each with what its construction added to the peak memory [MiB]."""
    for name in names:
        before = peak_memory()
        try:
            peer = make_peer(name, problem, threads, fatrop_jit)
        except PeerUnavailable as error:
            say(f"{name} skipped on {problem.name}: {error}")
            continue
        yield peer, peak_memory() - before


# --- problems with bounds on the control alone ---------------------------------------------------


def box_rows(name: str, batch: int, ours: Iterable[str], peers: list, repetitions: int, limit: float) -> list[Row]:
    """sartor's solvers and the peers on one problem and batch size."""
    problem = BOX_PROBLEMS[name]()
    x0s, thetas = sample(problem, batch)
    rows, calls = {}, {}
    for solver in (Sartor(problem, SOLVERS[key]()) for key in ours):
        rows[solver.name] = _our_row(solver, x0s, thetas)
        calls[solver.name] = _our_call(solver, x0s, thetas)
    for peer, memory in peers:
        rows[peer.name] = _peer_row(peer, memory, x0s, thetas)
        calls[peer.name] = _peer_call(peer, x0s, thetas, rows[peer.name])
    for solver, timing in interleave(calls, repetitions, limit).items():
        rows[solver] |= _timing_fields(timing, batch)
    for row in rows.values():
        row |= {"problem": problem.name, "batch": batch}
        row["residual"] = float(np.max(projected_gradient(problem, x0s, row["us"], thetas)))
        row["residual_kind"] = "projected gradient of the rolled-out controls, by sartor's adjoint"
    return add_cost_gaps(problem, list(rows.values()), x0s, thetas)


def _our_row(solver: Sartor, x0s: np.ndarray, thetas: np.ndarray, guess: Any = None, gradient: bool = True) -> Row:
    forward = solver.compiled("forward", x0s, thetas, guess)
    row = {"first_forward": forward.first_seconds, "first_forward_cpu": forward.cpu_seconds, "memory": forward.bytes}
    if gradient:
        both = solver.compiled("both", x0s, thetas, guess)
        row |= {"first_both": both.first_seconds, "first_both_cpu": both.cpu_seconds, "memory": both.bytes}
    sol, _ = solver.timed("forward", x0s, thetas, guess)
    trajectories = solver.solve(x0s, thetas, guess)
    _check_formula(solver, sol, x0s, thetas)
    row |= {
        "solver": solver.name, "sartor": True, "setup": solver.setup_seconds, "memory": row["memory"] / 2**20,
        "memory_kind": "planned by the compiler", "kkt_residual": float(np.max(sol.stats.kkt_norm)),
    }  # fmt: skip
    return row | _solution_fields(trajectories)


def _check_formula(solver: Sartor, sol: sartor.Solution, x0s: np.ndarray, thetas: np.ndarray) -> None:
    """Both sides must solve the same problem: costs of the same controls agree."""
    good = np.asarray(sol.successful)
    theirs, ours = cost(solver.problem, x0s, np.asarray(sol.us), thetas)[good], np.asarray(sol.cost)[good]
    if not np.allclose(ours, theirs, rtol=1e-5, atol=1e-5):
        raise ValueError(f"sartor's {solver.problem.name} is not the one of problems.py: costs {ours} and {theirs}.")


def _our_call(
    solver: Sartor, x0s: np.ndarray, thetas: np.ndarray, guess: Any = None, gradient: bool = True
) -> Callable:
    def call() -> Phases:
        _, forward = solver.timed("forward", x0s, thetas, guess)
        return Phases(forward, solver.timed("both", x0s, thetas, guess)[1] if gradient else float("nan"))

    return call


def _peer_row(peer: Any, memory: float, x0s: np.ndarray, thetas: np.ndarray) -> Row:
    kind = "growth of the process's peak"
    return {"solver": peer.name, "sartor": False, "setup": peer.setup_seconds, "memory": memory, "memory_kind": kind}


def _peer_call(peer: Any, x0s: np.ndarray, thetas: np.ndarray, row: Row, guess: Any = None) -> Callable:
    """Its first call completes the row with the solution and what that added to the peak memory."""

    def call() -> Phases:
        before = peak_memory()
        if hasattr(peer, "gradient"):
            gradient = peer.gradient(x0s, thetas, guess)
            trajectories = gradient.trajectories
            phases = Phases(trajectories.seconds, trajectories.seconds + gradient.backward_seconds)
        else:
            trajectories = peer.solve(x0s, thetas, guess)
            phases = Phases(trajectories.seconds)
        if "us" not in row:
            row.update(_solution_fields(trajectories), memory=row["memory"] + peak_memory() - before)
        return phases

    return call


def _solution_fields(trajectories: Any) -> Row:
    steps = np.asarray(trajectories.iterations)
    return {
        "iterations": float(np.median(steps)), "iterations_max": int(np.max(steps)),
        "converged": float(np.mean(trajectories.converged)), "xs": trajectories.xs, "us": trajectories.us,
    }  # fmt: skip


def _timing_fields(timing: Timing, batch: int) -> Row:
    return timing._asdict() | {
        "forward_per_sample": timing.forward / batch, "both_per_sample": timing.both / batch,
        "rate": batch / timing.forward,
    }  # fmt: skip


def add_cost_gaps(problem: Problem, rows: list[Row], x0s: np.ndarray, thetas: np.ndarray) -> list[Row]:
    """Relative to the best solver of each sample: gap/(1 + |best|) of the cost of the rolled-out controls."""
    costs = np.array([cost(problem, x0s, row["us"], thetas) for row in rows])
    best = np.nanmin(costs, axis=0)
    for row, gap in zip(rows, (costs - best) / (1.0 + np.abs(best)), strict=True):
        row |= {"gap_median": float(np.median(gap)), "gap_max": float(np.max(gap))}
        row |= {"same_cost": float(np.mean(gap < 1e-6))}
    return rows


def ratio_rows(rows: list[Row]) -> list[Row]:
    """How many times faster ours is than each peer on the same problem and batch.

    Ours is the fastest of our solvers among those that converged on most samples.
    """
    out = []
    for peer in (row for row in rows if not row["sartor"]):
        ours = [row for row in rows if row["sartor"] and _same(row, peer)]
        if not ours:
            continue
        most = max(row["converged"] for row in ours)
        best = min((row for row in ours if row["converged"] == most), key=lambda row: row["forward"])
        ratios = {kind: peer[kind] / best[kind] for kind in ("forward", "both", "backward")}
        if best["backward"] < 0.02 * best["forward"]:  # lost in the noise of the forward pass
            ratios["backward"] = float("nan")
        out.append({key: peer[key] for key in ("problem", "batch")} | ratios)
        out[-1] |= {"sartor": best["solver"], "peer": peer["solver"], "repetitions": peer["repetitions"]}
        out[-1] |= {"converged": best["converged"], "peer_converged": peer["converged"]}
    return out


def _same(row: Row, other: Row) -> bool:
    return (row["problem"], row["batch"]) == (other["problem"], other["batch"])


# --- quadrotor -----------------------------------------------------------------------------------


def quadrotor_solvers(curvatures: Iterable[str]) -> list[Sartor]:
    """SQP on the quadrotor, the exact Hessian first."""
    problem = problems.quadrotor()
    return [Sartor(problem, sartor.SQP(curvature=c), f"sartor SQP {c.replace('_', '-')}") for c in curvatures]


def cold_rows(batch: int, ours: list[Sartor], peers: list, repetitions: int, limit: float) -> list[Row]:
    """The quadrotor from the same guess for all: hovering at x0."""
    problem = ours[0].problem
    x0s, thetas = sample(problem, batch)
    guess = _hovering(problem, x0s)
    rows, calls = {}, {}
    for solver in ours:
        rows[solver.name] = _our_row(solver, x0s, thetas, guess, gradient=False)
        calls[solver.name] = _our_call(solver, x0s, thetas, guess, gradient=False)
    for peer, memory in peers:
        rows[peer.name] = _peer_row(peer, memory, x0s, thetas)
        calls[peer.name] = _peer_call(peer, x0s, thetas, rows[peer.name], guess)
    for solver, timing in interleave(calls, repetitions, limit).items():
        rows[solver] |= _timing_fields(timing, batch)
    for row in rows.values():
        row |= {"problem": problem.name, "batch": batch, "residual": row.get("kkt_residual")}
        row["violation"] = violation(problem, x0s, thetas, row["xs"], row["us"])
    return add_cost_gaps(problem, list(rows.values()), x0s, thetas)


def _hovering(problem: Problem, x0s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    us = np.tile(problem.u_ref, (len(x0s), problem.horizon, 1))
    return np.repeat(x0s[:, None], problem.horizon + 1, axis=1), us


def violation(problem: Problem, x0s: np.ndarray, thetas: np.ndarray, xs: np.ndarray, us: np.ndarray) -> float:
    """Largest violation of dynamics, bounds on controls, and bounds on states of any sample."""
    defects = [xs[:, :1] - x0s[:, None]]
    for k in range(problem.horizon):
        defects.append(xs[:, k + 1 : k + 2] - rollout(problem, xs[:, k], us[:, k : k + 1], thetas)[:, 1:])
    parts = [np.max(np.abs(defects)), np.max(us - problem.u_max), np.max(problem.u_min - us)]
    if problem.x_max is not None:
        parts.append(np.max(np.abs(xs[:, 1:]) - problem.x_max))
    return float(max(0.0, *parts))


def real_time_rows(
    num_samples: int, inner_steps: Iterable[int], solver: Sartor, peer: Any, repetitions: int
) -> list[Row]:
    """One control step after a solution by `solver`: a Gauss-Newton real-time iteration from the shifted solution.

    `inner_steps` are limits on our interior-point steps; each is measured.
    """
    problem = solver.problem
    x0s, thetas = sample(problem, num_samples)
    sol, _ = solver.timed("forward", x0s, thetas, _hovering(problem, x0s))
    noise = _DISTURBANCE * np.random.default_rng(1).normal(size=x0s.shape)
    x1s = rollout(problem, x0s, np.asarray(sol.us)[:, :1], thetas)[:, 1] + noise
    guess = tuple(np.asarray(leaf) for leaf in (jax.vmap(sartor.shift)(sol).xs, jax.vmap(sartor.shift)(sol).us))
    optimum = solver.solve(x1s, thetas, guess).us[:, 0]
    samples = [jax.tree.map(lambda leaf, i=i: jnp.asarray(leaf)[i], (x1s, thetas, sol)) for i in range(num_samples)]
    steps = {f"sartor, at most {n} inner steps": _our_real_time(problem, n, samples) for n in inner_steps}
    calls = {name: step for name, (step, _) in steps.items()}
    if peer is not None:
        calls["acados RTI"] = lambda i: _peer_real_time(peer, x1s[i], thetas[i], guess[0][i], guess[1][i])
    rows = _real_time_rows(calls, num_samples, repetitions, optimum)
    for name, (_, compiled) in steps.items():
        rows[name] |= {"first": compiled.first_seconds, "first_cpu": compiled.cpu_seconds}
    return list(rows.values())


def _our_real_time(problem: Problem, max_inner_steps: int, samples: list) -> tuple[Callable, Any]:
    compiled = compile_ahead(real_time_step(problem, max_inner_steps), *samples[0])

    def step(i: int) -> tuple[np.ndarray, float, float, float]:
        start = time.perf_counter()
        sol = jax.block_until_ready(compiled.call(*samples[i]))
        seconds = time.perf_counter() - start
        return np.asarray(sol.us[0]), seconds, float("nan"), float(sol.successful)

    return step, compiled


def _peer_real_time(peer: Any, x1: np.ndarray, theta: np.ndarray, xs: np.ndarray, us: np.ndarray) -> tuple:
    peer.load(x1, theta, xs, us)
    u0, preparation, feedback = peer.rti_step(x1)
    return u0, preparation + feedback, feedback, float("nan")  # its status is not read


def _real_time_rows(calls: dict, num_samples: int, repetitions: int, optimum: np.ndarray) -> dict[str, Row]:
    results = {name: [] for name in calls}
    for repetition in range(repetitions + 1):
        for i in range(num_samples):
            for name, call in calls.items():
                result = call(i)
                if repetition > 0:
                    results[name].append(result)
    rows, first = {}, {name: np.array([r[0] for r in values[:num_samples]]) for name, values in results.items()}
    for name, values in results.items():
        _, seconds, feedback, solved = zip(*values, strict=True)
        error = np.max(np.abs(first[name] - optimum), axis=1)
        rows[name] = {
            "solver": name, "step": float(np.median(seconds)), "step_90": float(np.quantile(seconds, 0.9)),
            "feedback": float(np.median(feedback)), "solved": float(np.mean(solved)),
            "to_optimum": float(np.median(error)), "to_optimum_max": float(np.max(error)),
        }  # fmt: skip
    for name, row in rows.items():
        if "acados RTI" in rows:
            row["ratio"] = row["step"] / rows["acados RTI"]["step"]
            row["to_acados"] = float(np.max(np.abs(first[name] - first["acados RTI"])))
    return rows


# --- what the derivative and the compiler cost ---------------------------------------------------


def unroll_rows(solver: str, num_points: int, batch: int, repetitions: int, limit: float) -> list[Row]:
    """Pendulums that need few and many iterations: implicit derivative against that through as many iterations."""
    problem = problems.pendulum()
    x0s, thetas = sample(problem, 64)
    implicit = Sartor(problem, SOLVERS[solver]())
    steps = implicit.solve(x0s, thetas).iterations
    order = np.argsort(steps)
    rows = []
    for i in order[np.linspace(0, len(order) - 1, num_points).astype(int)]:
        x0, theta = np.tile(x0s[i], (batch, 1)), np.tile(thetas[i], (batch, 1))
        unrolled = Sartor(problem, SOLVERS[solver](max_steps=int(steps[i]) + 1), "unroll", derivative="unroll")
        calls = {"implicit": _our_call(implicit, x0, theta), "unroll": _our_call(unrolled, x0, theta)}
        times = interleave(calls, repetitions, limit)
        ours, theirs = (s.gradient(x0, theta).thetas for s in (implicit, unrolled))
        rows.append({
            "solver": implicit.name, "iterations": int(steps[i]),
            "forward": times["implicit"].forward, "backward": times["implicit"].backward,
            "unroll_forward": times["unroll"].forward, "unroll_backward": times["unroll"].backward,
            "difference": float(np.max(np.abs(ours - theirs)) / np.max(np.abs(ours))),
        })  # fmt: skip
    return rows


def compile_rows(solver: str, horizons: Iterable[int]) -> list[Row]:
    """First-call time against the horizon, on the pendulum, one sample."""
    rows = []
    for horizon in horizons:
        problem = problems.pendulum(horizon)
        x0s, thetas = sample(problem, 1)
        ours = Sartor(problem, SOLVERS[solver]())
        row: Row = {"solver": ours.name, "horizon": horizon}
        for kind in ("forward", "both"):
            compiled = ours.compiled(kind, x0s, thetas)
            row |= {f"first_{kind}": compiled.first_seconds, f"first_{kind}_cpu": compiled.cpu_seconds}
        rows.append(row)
    return rows
