"""acados (the wheel `comma-deps-acados`, acados 0.2.2): generated C code, one sample after another.

It solves only. The wheel has libraries, headers, templates and the template renderer, but sets up none of
their paths. This module names them in the environment and loads the libraries itself, so that neither
LD_LIBRARY_PATH nor an edit of the installed files is needed. It needs gcc, make and the package `casadi`.
"""

import contextlib
import ctypes
import importlib.util
import itertools
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from peers import PeerUnavailable, Trajectories
from problems import Problem

_numbers = itertools.count()


def _load_templates():
    """Import the wheel's `acados_template` after telling it where its own files are."""
    spec = importlib.util.find_spec("acados")
    if spec is None or spec.origin is None:
        raise PeerUnavailable("the package comma-deps-acados is not installed")
    for program in ("make", "gcc"):
        if shutil.which(program) is None:
            raise PeerUnavailable(f"acados compiles its solvers and needs {program}")
    package = Path(spec.origin).parent
    install = package / "install"
    os.environ["ACADOS_SOURCE_DIR"] = str(install)
    os.environ["ACADOS_PYTHON_INTERFACE_PATH"] = str(package / "acados_template")
    os.environ["TERA_PATH"] = str(install / "bin" / "t_renderer")
    try:
        for name in ("libblasfeo.so", "libhpipm.so", "libqpOASES_e.so", "libacados.so"):
            ctypes.CDLL(str(install / "lib" / name), mode=ctypes.RTLD_GLOBAL)
        from acados import acados_template
    except (ImportError, OSError) as error:
        raise PeerUnavailable(f"acados cannot be loaded: {error}") from error
    return acados_template, install


class Acados:
    """SQP with HPIPM on one generated solver.

    Args:
        hessian: "GAUSS_NEWTON" or "EXACT" (then projected to be positive definite).
        real_time: Generate the real-time iteration (`rti_step`) in place of the SQP method.
        condensed: Number of stages that HPIPM sees after partial condensing; the horizon if absent.
        mode: HPIPM's "SPEED", "BALANCE" or "ROBUST".
        line_search: Merit-function line search; full steps otherwise.
    """

    def __init__(
        self,
        problem: Problem,
        hessian: str = "GAUSS_NEWTON",
        real_time: bool = False,
        condensed: int | None = None,
        mode: str = "BALANCE",
        line_search: bool = False,
        tolerance: float = 1e-8,
        max_steps: int = 200,
    ):
        template, install = _load_templates()
        start = time.perf_counter()
        self.name = "acados " + ("RTI" if real_time else "SQP")
        self.problem = problem
        ocp = _formulate(template, problem)
        ocp.acados_include_path, ocp.acados_lib_path = str(install / "include"), str(install / "lib")
        options = ocp.solver_options
        options.integrator_type = "DISCRETE" if problem.ode is None else "ERK"
        options.sim_method_num_stages, options.sim_method_num_steps = 4, 1
        options.tf = problem.horizon * problem.dt
        options.nlp_solver_type = "SQP_RTI" if real_time else "SQP"
        options.nlp_solver_max_iter = max_steps
        options.hessian_approx = hessian
        if hessian == "EXACT":
            options.regularize_method = "PROJECT"
        options.globalization = "MERIT_BACKTRACKING" if line_search else "FIXED_STEP"
        options.qp_solver = "PARTIAL_CONDENSING_HPIPM"
        options.qp_solver_cond_N = problem.horizon if condensed is None else condensed
        options.qp_solver_iter_max = 100
        options.hpipm_mode = mode
        for kind in ("stat", "eq", "ineq", "comp"):
            setattr(options, f"nlp_solver_tol_{kind}", tolerance)
        self._folder = tempfile.TemporaryDirectory(prefix="acados-")
        self._solver = _build(template, ocp, Path(self._folder.name))
        self.setup_seconds = time.perf_counter() - start

    def load(
        self, x0: np.ndarray, theta: np.ndarray, xs: np.ndarray, us: np.ndarray, x_refs: np.ndarray | None = None
    ) -> None:
        """Set one sample and its initial guess; the multipliers start from zero.

        `x_refs` (N+1, nx) are references of the stages; without them, that of the problem holds at all.
        """
        problem, solver, n = self.problem, self._solver, self.problem.horizon
        x_refs = np.tile(problem.x_ref(theta), (n + 1, 1)) if x_refs is None else x_refs
        solver.reset()
        for k in range(n + 1):
            solver.set(k, "p", theta)
            solver.set(k, "x", xs[k])
            if k < n:
                solver.set(k, "u", us[k])
                solver.set(k, "yref", np.concatenate([x_refs[k], problem.u_ref]))
        solver.set(n, "yref", x_refs[n])
        self._set_x0(x0)

    def solve(self, x0s: np.ndarray, thetas: np.ndarray, guess: tuple | None = None) -> Trajectories:
        """Solve sample by sample; without a guess, from x_k = x_0 and u_k = u_ref."""
        batch, n = len(x0s), self.problem.horizon
        if guess is None:
            guess = np.repeat(x0s[:, None], n + 1, axis=1), np.tile(self.problem.u_ref, (batch, n, 1))
        xs, us, steps, converged, seconds = [], [], [], [], 0.0
        with _output_to(Path(os.devnull)):
            for x0, theta, xs_guess, us_guess in zip(x0s, thetas, *guess, strict=True):
                self.load(x0, theta, xs_guess, us_guess)
                start = time.perf_counter()
                status = self._solver.solve()
                seconds += time.perf_counter() - start
                x, u = self.trajectory()
                xs.append(x)
                us.append(u)
                steps.append(int(self._solver.get_stats("sqp_iter")[0]))
                converged.append(status == 0)
        return Trajectories(np.stack(xs), np.stack(us), np.array(steps), np.array(converged), seconds)

    def trajectory(self) -> tuple[np.ndarray, np.ndarray]:
        """The solver's iterate: xs (N+1, nx) and us (N, nu)."""
        n = self.problem.horizon
        xs = np.stack([self._solver.get(k, "x") for k in range(n + 1)])
        return xs, np.stack([self._solver.get(k, "u") for k in range(n)])

    def rti_step(self, x0: np.ndarray) -> tuple[np.ndarray, float, float]:
        """One real-time iteration: us[0], and the times of preparation and feedback [s].

        It starts from the solver's iterate (see `load`) and moves it. The preparation linearises there and
        condenses, the feedback sets x0 and solves the QP.
        """
        solver = self._solver
        solver.options_set("rti_phase", 1)
        start = time.perf_counter()
        solver.solve()
        prepared = time.perf_counter()
        self._set_x0(x0)
        solver.options_set("rti_phase", 2)
        solver.solve()
        u0 = solver.get(0, "u")
        return u0, prepared - start, time.perf_counter() - prepared

    def _set_x0(self, x0: np.ndarray) -> None:
        self._solver.set(0, "lbx", x0)
        self._solver.set(0, "ubx", x0)


def _formulate(template, problem: Problem):
    """The problem in acados' terms: linear least-squares cost, box constraints, parameters at every stage."""
    import casadi as ca

    nx, nu = problem.nx, problem.nu
    ocp = template.AcadosOcp()
    model = ocp.model
    model.name = f"{problem.name}{next(_numbers)}".replace(" ", "_")
    model.x, model.u, model.p = (ca.SX.sym(s, n) for s, n in (("x", nx), ("u", nu), ("p", len(problem.theta))))
    right_hand_side = problem.step if problem.ode is None else problem.ode
    expression = ca.vertcat(*right_hand_side(*map(ca.vertsplit, (model.x, model.u, model.p)), ca))
    if problem.ode is None:
        model.disc_dyn_expr = expression
    else:
        model.f_expl_expr = expression
        model.xdot = ca.SX.sym("xdot", nx)
        model.f_impl_expr = model.xdot - expression

    ocp.dims.N = problem.horizon
    ocp.parameter_values = np.array(problem.theta)
    cost, constraints = ocp.cost, ocp.constraints
    cost.cost_type = cost.cost_type_e = "LINEAR_LS"
    cost.W = np.diag(np.concatenate([problem.q, problem.r])) / problem.dt  # acados multiplies by the time step
    cost.W_e = np.diag(problem.q_terminal)
    cost.Vx, cost.Vu, cost.Vx_e = np.eye(nx + nu, nx), np.eye(nx + nu, nu, -nx), np.eye(nx)
    cost.yref, cost.yref_e = np.zeros(nx + nu), np.zeros(nx)
    constraints.idxbu, constraints.lbu, constraints.ubu = np.arange(nu), problem.u_min, problem.u_max
    constraints.x0 = np.zeros(nx)
    if problem.x_max is not None:
        bounded = np.flatnonzero(np.isfinite(problem.x_max))
        constraints.idxbx = constraints.idxbx_e = bounded
        constraints.lbx = constraints.lbx_e = -problem.x_max[bounded]
        constraints.ubx = constraints.ubx_e = problem.x_max[bounded]
    return ocp


def _build(template, ocp, folder: Path):
    """Generate, compile and load the solver; what the tools print goes to a log in `folder`."""
    ocp.code_export_directory = str(folder / "code")
    log = folder / "log"
    try:
        with _in_folder(folder), _output_to(log):
            return template.AcadosOcpSolver(ocp, json_file=str(folder / "ocp.json"), verbose=True)
    except (Exception, SystemExit) as error:
        tail = " | ".join(log.read_text(errors="replace").splitlines()[-3:])
        raise PeerUnavailable(f"acados could not build its solver: {error!r}; last output: {tail}") from error


@contextlib.contextmanager
def _in_folder(folder: Path) -> Iterator[None]:
    """The code generator changes the working directory; come back to the present one."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@contextlib.contextmanager
def _output_to(log: Path) -> Iterator[None]:
    """Send what this process and the compilers that it starts print into a file."""
    saved = os.dup(1), os.dup(2)
    try:
        with log.open("w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            yield
    finally:
        ctypes.CDLL(None).fflush(None)
        os.dup2(saved[0], 1)
        os.dup2(saved[1], 2)
        for descriptor in saved:
            os.close(descriptor)
