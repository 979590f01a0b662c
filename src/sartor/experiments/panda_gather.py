"""From the files that the jobs of a Panda run have left to those that the report reads."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from scipy.stats import spearmanr

from sartor import pairing
from sartor.evaluate import mark_unstable
from sartor.experiments import panda_jobs as jobs
from sartor.experiments import panda_stages as stages
from sartor.experiments.panda_config import NEEDS_LABELS, Config
from sartor.experiments.panda_studies import Cell, cells
from sartor.experiments.panda_truth import correlations, truth_files
from sartor.experiments.panda_weights import combined
from sartor.figures.costs import RECIPES
from sartor.files import read_json, replacing_file, save_arrays, write_json
from sartor.lerobot import write_lerobot
from sartor.models.store import load_model
from sartor.render import RenderUnavailable, clip
from sartor.samples import windows
from sartor.systems import panda
from sartor.weights import explained


def gather(config: Config, out: Path) -> None:
    """Write what the report reads, as far as it is there."""
    done = [cell for cell in cells(config) if (out / "tests" / f"{cell.final(config)}.json").exists()]
    rows = _baselines(config, out) + [row for cell in done for row in _episodes(config, out, cell)]
    mark_unstable(rows)
    if config.studies and "capacity" in config.studies:
        rows += _main_size(config, rows)
    _write_table(out / "evaluations.parquet", rows)
    _write_table(out / "curves.parquet", [row for cell in done for row in _curve(config, out, cell)])
    _labels(config, out)
    _traces(config, out, done)
    _hand_over(config, out, done, rows)
    _data(config, out)
    _speed(out)
    _truth(config, out, rows)


def _baselines(config: Config, out: Path) -> list[dict]:
    rows = []
    kinds = {kind: -1 for kind in ("nominal", "oracle", "oracle_damping")}
    kinds |= {f"pretrained-{m}": m for m in range(config.models)}
    for name, model in kinds.items():
        key = {"model": model, "method": name.split("-")[0], "p": 0, "seed": -1, "study": "main", "variant": ""}
        rows += _rows(out / "tests" / f"{name}.json", key, 0, np.nan, True)
    return rows


def _episodes(config: Config, out: Path, cell: Cell) -> list[dict]:
    """Rows of a cell, those of its earlier epochs included."""
    name, key = cell.final(config), cell._asdict()
    held_out = read_json(out / "models" / f"{name}.json")["validation"] or [np.nan] * config.epochs
    rows = []
    for epoch in range(1, config.epochs):
        path = out / "tests" / "epochs" / f"{name}-e{epoch}.json"
        rows += _rows(path, key, epoch, held_out[epoch - 1], False) if path.exists() else []
    return rows + _rows(out / "tests" / f"{name}.json", key, config.epochs, held_out[-1], True)


def _rows(path: Path, key: dict[str, Any], epoch: int, loss: float, last: bool) -> list[dict]:
    split = lambda row: "validation" if row["environment"] >= stages.VALIDATION else "test"
    common = key | {"epoch": epoch, "loss": loss, "last": last}
    return [common | {"split": split(row)} | row for row in read_json(path)]


def _main_size(config: Config, rows: list[dict]) -> list[dict]:
    """The main study's models of the same seeds, as a size among others."""
    same = {"study": "capacity", "variant": str(list(config.widths))}
    mine = lambda r: r["study"] == "main" and r["p"] == config.rollouts[0] and r["last"]
    chosen = [row for row in rows if mine(row) and row["method"] in ("stand", "ours")]
    return [row | same for row in chosen if row["seed"] < config.study_seeds]


def _curve(config: Config, out: Path, cell: Cell) -> list[dict]:
    curve = read_json(out / "models" / f"{cell.final(config)}.json")
    held_out = curve["validation"] or [np.nan] * len(curve["train"])
    pairs = zip(curve["train"], held_out, strict=True)
    return [cell._asdict() | {"epoch": i, "train_loss": a, "validation_loss": b} for i, (a, b) in enumerate(pairs, 1)]


def _labels(config: Config, out: Path) -> None:
    if not set(config.weightings) & set(NEEDS_LABELS):
        return
    table, maps = {}, {}
    sets = dict.fromkeys((cell.labels, cell.variant if cell.labels != "labels" else "") for cell in cells(config))
    for m in range(config.models):
        files = tuple(jobs.data_of(out, f"pretrained-{m}", 1, config))
        logs = jobs.logs_of(files)
        samples = windows(logs, load_model(out / "models" / f"pretrained-{m}.npz"), panda.HORIZON,
                          stride=config.label_stride)  # fmt: skip
        table[str(m)], first = {}, None
        for folder, variant in sets:
            if not all((out / folder / file.name).exists() for file in files):
                continue
            found = jobs.labels_of(files, folder, logs, samples)
            ok = found["ok"] & stages.sound(logs, samples)
            kinds = {"closed_loop": found["S_closed_loop"]} if not variant else {}
            for name, S in {"ours": combined(found, config), **kinds}.items():
                q = S[ok][:, : config.rollouts[0], :7]
                first = (S, found["ok"]) if first is None else first
                table[str(m)][f"{name}, {variant}" if variant else name] = {
                    "samples": int(ok.sum()), "failed": int((~found["ok"]).sum()), "explained": explained(q),
                    "cv": (q.std((0, 1)) / q.mean((0, 1))).tolist(), "rate": jobs.label_rate(list(files), folder),
                    "rank": _rank(S[ok & first[1]], first[0][ok & first[1]]),
                }  # fmt: skip
                if not variant:
                    maps[f"S_{name}"] = maps.get(f"S_{name}", 0.0) + S[ok].mean(0) / config.models
    write_json(out / "labels.json", table)
    save_arrays(out / "maps.npz", **maps)


def _rank(S: np.ndarray, other: np.ndarray) -> float:
    """Rank correlation of two label sets over the samples, mean over the entries of a label that are not constant."""
    pairs = zip(S.reshape(len(S), -1).T, other.reshape(len(S), -1).T, strict=True)
    return float(np.mean([np.asarray(spearmanr(a, b))[0] for a, b in pairs if np.ptp(a) > 0 and np.ptp(b) > 0]))


def _traces(config: Config, out: Path, done: list[Cell]) -> None:
    """Episodes of one environment, and spectra of the velocity error over all, of the first model and seed."""
    example = min(3, config.tests - 1)
    names = {"pretrained": "pretrained-0", "oracle_damping": "oracle_damping"}
    names |= {cell.method: cell.final(config) for cell in _first(config, done, ("main",))}
    names |= {"recipe": cell.final(config) for cell in _first(config, done, RECIPES)[:1]}  # noqa: B035
    traces, spectra = {}, {}
    for method, name in names.items():
        logs = stages.load_logs(out / "tests" / f"{name}.npz")[: config.tests]
        log = logs[example]
        traces |= {f"x_{method}": log.xs, f"u_{method}": log.us, "reference": log.refs}
        errors = np.stack([log.xs[:, 7:] - np.asarray(log.refs)[:, 7:] for log in logs])
        density = 2.0 * panda.DT / errors.shape[1] * np.abs(np.fft.rfft(errors, axis=1)) ** 2
        spectra[method] = np.median(density, 0)
    save_arrays(out / "traces.npz", t=panda.DT * np.arange(config.steps + 1), **traces)
    save_arrays(out / "spectrum.npz", frequencies=np.fft.rfftfreq(config.steps + 1, panda.DT), **spectra)


def _first(config: Config, done: list[Cell], studies: Sequence[str]) -> list[Cell]:
    """Of the first pretrained model and seed, at the first p: their test episodes are kept."""
    return [c for c in done if c.study in studies and c.p == config.rollouts[0] and c.model == c.seed == 0]


def _hand_over(config: Config, out: Path, done: list[Cell], rows: list[dict]) -> None:
    """The tailored model for its user, `tailored.npz`, and a clip of it beside the pretrained one: those of the recipe,
    or of `ours` where there is none."""
    asked = set(RECIPES) & set(config.studies or ())
    first = _first(config, done, RECIPES if asked else ("main",))
    if not first:
        return
    cell = next((cell for cell in first if cell.method == "ours"), first[0])
    source = out / "models" / f"{cell.final(config)}.npz"
    if not (out / "tailored.npz").exists() or (out / "tailored.npz").read_bytes() != source.read_bytes():
        with replacing_file(out / "tailored.npz") as new:
            new.write_bytes(source.read_bytes())
        _clip(config, out, cell, rows)


def _clip(config: Config, out: Path, cell: Cell, rows: list[dict]) -> None:
    """In the environment where the pretrained model does as well as it does on the median."""
    before = [row for row in rows if row["method"] == "pretrained" and row["model"] == 0 and row["split"] == "test"]
    middle = int(np.argsort([row["J"] for row in before])[len(before) // 2])
    tailored = ", ".join(filter(None, (cell.method, cell.variant)))
    names = {"pretrained": "pretrained-0", f"tailored: {tailored}": cell.final(config)}
    logs = {caption: stages.load_logs(out / "tests" / f"{name}.npz")[middle] for caption, name in names.items()}
    reference = np.asarray(logs["pretrained"].refs)[:, :7]
    robot = panda.mj_model(panda.payloads()[before[middle]["environment"]])
    films = {caption: log.xs[:, :7] for caption, log in logs.items()}
    try:
        clip(out / "clip.webp", robot, films, reference=reference, dt=panda.DT)
    except RenderUnavailable as error:
        warnings.warn(f"no clip of the arm: {error}", stacklevel=2)


def _data(config: Config, out: Path) -> None:
    """Counts of samples, and what was recorded as LeRobot datasets: excitation, and the closed loops of each model."""
    numbers: dict[str, dict[str, int]] = {}
    groups = {"excitation": tuple(sorted((out / "parts").glob("excite-*.npz")))}
    for m in range(config.models):
        name = f"pretrained-{m}"
        before = read_json(out / "models" / f"{name}.json")
        groups[name] = tuple(file for file, _ in jobs.driven(out, name, 1, config.finetune_payloads))
        files = tuple(jobs.data_of(out, name, 1, config))
        logs = jobs.logs_of(files)
        samples = windows(logs, load_model(out / "models" / f"{name}.npz"), panda.HORIZON, stride=config.label_stride)
        numbers[f"model {m}"] = {
            "pretraining samples": before["num_samples"], "fine-tuning runs": len(logs),
            "fine-tuning samples": samples.size,
            "of them left out": samples.size - int(stages.sound(logs, samples).sum()),
        }  # fmt: skip
        if "left_out" in before:
            numbers[f"model {m}"]["pretraining samples left out"] = before["left_out"]
    write_json(out / "data.json", numbers)
    joints = [f"joint{i + 1}" for i in range(7)]
    for name, files in groups.items():
        if not (out / "dataset" / name / "meta" / "info.json").exists():
            write_lerobot(
                out / "dataset" / name, jobs.logs_of(files), robot="panda", joints=joints, task="follow the reference"
            )


def _speed(out: Path) -> None:
    rows = [read_json(file) for file in (out / "speed").glob("*.json")]
    if rows:
        write_json(out / "speed.json", {"rows": sorted(rows, key=lambda row: row["parameters"])})


def _truth(config: Config, out: Path, rows: list[dict]) -> None:
    if not config.truth:
        return
    branches = truth_files(out, config)
    losses_of = [out / "truth" / f"losses-{m}.json" for m in range(config.models)]
    if not all(file.exists() for file in (*losses_of, *(file for of_model in branches for file in of_model))):
        return
    table = pairing.columns(pa.Table.from_pylist(rows))
    unsaturated = sorted(set(range(stages.TEST, stages.TEST + config.tests)) - pairing.saturated_environments(table))
    found: dict[str, list[float]] = {}
    for file in losses_of:
        losses = read_json(file)
        costs = []
        for name in losses:
            episodes = {row["environment"]: row["J"] for row in read_json(out / "tests" / f"{name}.json")}
            costs.append(np.log([episodes[e] for e in unsaturated]).mean())
        for kind in next(iter(losses.values())):
            values = [losses[name][kind] for name in losses]
            found.setdefault(kind, []).append(float(np.asarray(spearmanr(values, costs))[0]))
    predicts = {kind: float(np.mean(values)) for kind, values in found.items()}
    write_json(out / "truth.json", {"rows": correlations(branches, config.rollouts[0]), "predicts": predicts})


def _write_table(path: Path, rows: list[dict]) -> None:
    with replacing_file(path) as new:
        pq.write_table(pa.Table.from_pylist(rows), new)
