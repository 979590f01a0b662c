"""Jobs that each leave one file behind, on several processes: what is there is not done again.

A worker has one thread, so that as many run as there are cores, and keeps what it has compiled from one job to the
next. Progress comes back through a queue.
"""

import multiprocessing
import os
import pickle
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax

Monitor = Callable[[str, float, float], None]
"""monitor(phase, done, total), in units of jobs."""

_ONE_THREAD = " --xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
_queue: Any = None  # of this worker


class Job(NamedTuple):
    """Work that writes `output`, whole or not at all."""

    output: Path
    run: Callable
    """run(output, *args, monitor), a function of a module; monitor(done, total) says how far it is."""
    args: tuple = ()


class Workers:
    """Processes that do jobs; with `num_workers` = 0 they are done here, one after the other."""

    def __init__(
        self,
        num_workers: int,
        monitor: Monitor | None = None,
        keep_times: Callable[[dict[str, float]], None] | None = None,
    ):
        self._keep_times = keep_times or (lambda times: None)
        self.monitor = monitor or (lambda phase, done, total: None)
        self.times: dict[str, float] = {}
        """Seconds that each phase has taken."""
        self._pool = None
        if num_workers:
            context = multiprocessing.get_context("spawn")
            self._queue, cores = context.SimpleQueue(), context.SimpleQueue()
            free = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [-1]
            for i in range(num_workers):
                cores.put(free[i % len(free)])
            with _one_thread():
                self._pool = ProcessPoolExecutor(
                    num_workers, context, initializer=_begin, initargs=(self._queue, cores)
                )
                # Processes start with the first jobs: give each one now, while the environment is theirs.
                wait([self._pool.submit(time.sleep, 0.2) for _ in range(num_workers)])

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._pool is not None:
            if exception[0] is not None:  # do not wait for what will not be used
                for process in list(getattr(self._pool, "_processes", {}).values()):
                    process.terminate()
            self._pool.shutdown(cancel_futures=True)

    def run(self, phase: str, jobs: Sequence[Job]) -> None:
        """Do all jobs whose output is missing. A job that fails ends the phase with its error; the others stay."""
        if not jobs:
            return
        begun = time.monotonic()
        missing = [job for job in jobs if not job.output.exists()]
        shares = {str(job.output): float(job not in missing) for job in jobs}

        def tell(name: str, share: float) -> None:
            shares[name] = share
            self.monitor(phase, sum(shares.values()), len(jobs))

        self.monitor(phase, sum(shares.values()), len(jobs))
        for job in missing:
            job.output.parent.mkdir(parents=True, exist_ok=True)
        if self._pool is None:
            for job in missing:
                job.run(job.output, *job.args, monitor=lambda i, n, job=job: tell(str(job.output), i / n))
                tell(str(job.output), 1.0)
        else:
            self._wait({self._pool.submit(_do, job): str(job.output) for job in missing}, tell)
        if missing:
            self.times[phase] = self.times.get(phase, 0.0) + time.monotonic() - begun
            self._keep_times(self.times)

    def _wait(self, futures: dict[Future, str], tell: Callable[[str, float], None]) -> None:
        waiting = set(futures)
        while waiting:
            done, waiting = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
            while not self._queue.empty():
                tell(*self._queue.get())
            for future in done:
                future.result()
                tell(futures[future], 1.0)


@contextmanager
def _one_thread() -> Iterator[None]:
    """The environment of processes that use one thread each."""
    before = dict(os.environ)
    os.environ["XLA_FLAGS"] = before.get("XLA_FLAGS", "") + _ONE_THREAD
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    os.environ["JAX_ENABLE_X64"] = str(int(jax.config.read("jax_enable_x64")))  # as here, however it was set
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _begin(queue: Any, cores: Any) -> None:
    global _queue
    _queue = queue
    core = cores.get()
    if core >= 0:  # JAX starts as many threads as it sees cores, and they would get into each other's way
        os.sched_setaffinity(0, {core})
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)  # the parent was killed

    threading.Thread(target=watch, daemon=True).start()


def _do(job: Job) -> None:
    last = 0.0

    def monitor(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last > 0.5:
            last = time.monotonic()
            _queue.put((str(job.output), done / total))

    try:
        job.run(job.output, *job.args, monitor=monitor)
    except Exception as error:
        raise _portable(error) from None


def _portable(error: Exception) -> Exception:
    """The error, or if it would not arrive in the parent, as some of JAX's, its words."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError("".join(traceback.format_exception(error)))
    return error
