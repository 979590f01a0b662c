"""Jobs on worker processes: what they leave behind, what they report, and what a failure leaves."""

import jax.numpy as jnp
import pytest

from sartor.experiments.jobs import Job, Workers


def write(output, text, monitor):
    """Job: writes a file."""
    monitor(1, 2)
    output.write_text(text)


def precision(output, monitor):
    """Job: writes what JAX computes in."""
    output.write_text(str(jnp.zeros(()).dtype))


def fail(output, monitor):
    """Job: fails."""
    raise ValueError(f"{output.name} cannot be")


class Stubborn(Exception):
    """An error that pickles, but cannot be read back, as some of JAX's."""

    def __init__(self, word, other):
        super().__init__(f"{word} and {other}")


def fail_stubbornly(output, monitor):
    """Job: fails with an error that would not arrive."""
    raise Stubborn("this", "that")


def test_jobs_on_processes(tmp_path):
    seen, times = [], []
    jobs = [Job(tmp_path / f"part-{i}" / "file", write, (str(i),)) for i in range(4)]
    (tmp_path / "part-2").mkdir()
    (tmp_path / "part-2" / "file").write_text("there already")
    with Workers(2, lambda *progress: seen.append(progress), times.append) as workers:
        workers.run("write", jobs)
        assert [job.output.read_text() for job in jobs] == ["0", "1", "there already", "3"]
        assert seen[0] == ("write", 1.0, 4) and seen[-1] == ("write", 4.0, 4)
        assert times[-1]["write"] > 0

        workers.run("precision", [Job(tmp_path / "dtype", precision)])
        assert (tmp_path / "dtype").read_text() == str(jnp.zeros(()).dtype) == "float64"  # as here

        both = [Job(tmp_path / "bad", fail), Job(tmp_path / "good", write, ("5",))]
        with pytest.raises(ValueError, match="bad cannot be"):
            workers.run("fail", both)
        with pytest.raises(RuntimeError, match="this and that"):
            workers.run("fail", [Job(tmp_path / "bad", fail_stubbornly)])
        workers.run("fail", both[1:])  # the others stay, and the workers work on
        assert (tmp_path / "good").read_text() == "5" and not (tmp_path / "bad").exists()


def test_jobs_in_this_process(tmp_path):
    seen = []
    with Workers(0, lambda *progress: seen.append(progress)) as workers:
        workers.run("nothing", [])
        assert not seen
        workers.run("write", [Job(tmp_path / "file", write, ("0",))])
    assert seen == [("write", 0.0, 1), ("write", 0.5, 1), ("write", 1.0, 1)]
