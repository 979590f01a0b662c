"""Reports of a synthetic Panda run: whole, half-finished, and empty."""

import io
import json
import re
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from sartor import evaluate, pairing, report
from sartor.figures import costs
from sartor.report_panda import REPORT

METHODS, ROLLOUTS = ("ones", "stand", "ours", "ours_avg", "regret"), (4, 12)
GAIN = {"ones": 1.02, "stand": 1.0, "ours": 0.9, "regret": 1.1, "closed_loop": 0.93}
BASELINES = {"nominal": 12.0, "pretrained": 6.0, "oracle": 1.5, "oracle_damping": 0.7}
ENVIRONMENTS, SATURATED = range(100, 108), (100, 103)
RUNS = [(model, seed) for model in (0, 1) for seed in (0, 1)]


def episode(rng, J, environment, **key):
    return {
        "p": 0, "seed": -1, "epoch": 0, "last": True, "split": "test", "study": "main", "variant": "", "loss": np.nan,
        "environment": environment, "J": J, "J_q": 0.7 * J, "J_qd": 0.3 * J, "q_rmse": 0.01 * J**0.5,
        "qd_rmse": 0.1 * J**0.5, "ee_rmse": 0.004 * J**0.5, "saturated": 0.25 * (environment in SATURATED),
        "failed": int(rng.integers(3)), "unstable": bool(J > 1500.0),
    } | key  # fmt: skip


def evaluations(rng):
    difficulty = {e: np.exp(rng.normal(0.8, 0.7)) * (60.0 if e in SATURATED else 1.0) for e in ENVIRONMENTS}
    rows = []
    for method, factor in BASELINES.items():
        for model in (0, 1) if method == "pretrained" else (-1,):
            rows += [episode(rng, factor * J, e, method=method, model=model) for e, J in difficulty.items()]
    studies = [("main", "", m, p) for m in METHODS for p in ROLLOUTS]
    studies += [("capacity", v, m, 4) for v in ("[8, 8]", "[16, 12]", "[30, 20]") for m in ("stand", "ours", "regret")]
    studies += [("ablation", "", m, 4) for m in ("ours:trajectory", "ours:gauss_newton", "ours:velocity")]
    studies += [("rounds", f"round {r}", m, 4) for r in (1, 2) for m in ("stand", "ours")]
    studies += [("recipe", "two rounds", "stand_env", 4)]
    studies += [("data", v, m, 4) for v in ("half", "double") for m in ("stand", "ours")]
    for study, variant, method, p in studies:
        small = 1.25 if "8" in variant else 1.0
        for model, seed in RUNS if study == "main" else RUNS[::2]:
            run = np.exp(rng.normal(0, 0.02))
            for epoch, split in [
                (e, s) for e in range(1, 8 if study == "main" and p == 4 else 3) for s in ("test", "validation")
            ]:
                last = epoch == (7 if study == "main" and p == 4 else 2)
                for e, J in difficulty.items():
                    cost = J * small * run * GAIN.get(method, 1.01) * np.exp(rng.normal(0, 0.06) + 0.3 / epoch)
                    key = {"method": method, "model": model, "seed": seed, "p": p, "epoch": epoch, "last": last}
                    key |= {"split": split, "study": study, "variant": variant, "loss": 0.3}
                    rows.append(episode(rng, cost, e + 1000 * (split == "validation"), **key))
    return rows


def curves(rng):
    return [
        {"model": m, "method": method, "p": p, "seed": s, "study": "main", "variant": "", "epoch": e,
         "train_loss": 0.9 * np.exp(-0.3 * e), "validation_loss": np.exp(-0.25 * e * (1 + 0.05 * i)) + 0.1}
        for m, s in RUNS for i, method in enumerate(METHODS) for p in ROLLOUTS for e in range(1, 8)
    ]  # fmt: skip


def arrays(rng):
    """Maps, spectrum and traces."""
    k = np.arange(12)[:, None]
    shape = np.concatenate([rng.uniform(0.6, 1.4, (1, 7)) * 0.98**k, 0.04 * rng.uniform(0.6, 1.4, (1, 7)) * 0.85**k], 1)
    maps = {f"S_{name}": shape * rng.uniform(0.9, 1.1, shape.shape) for name in ("regret", "ours", "closed_loop")}
    f = np.linspace(0, 25, 126)
    power = {
        m: a * 1e-3 / (1 + f[:, None]) ** 2 * rng.uniform(0.5, 2, (126, 7)) for m, a in (("stand", 1), ("ours", 0.8))
    }
    power["pretrained"] = 3 * power["stand"] + 3e-3 * np.exp(-((f[:, None] - 4) ** 2)) * np.array([0, 0, 0, 1, 1, 0, 1])
    t = 0.02 * np.arange(501)
    reference = np.sin(t[:, None] * rng.uniform(0.5, 2, 14))
    traces = {"t": t, "reference": reference}
    for method, scale in (("pretrained", 3.0), ("stand", 1.0), ("ours", 0.8)):
        errors = np.sin(t[:, None] * rng.uniform(1, 9, 14) + rng.uniform(0, 6, 14)) * np.r_[[0.008] * 7, [0.08] * 7]
        traces |= {f"x_{method}": reference + scale * errors, f"u_{method}": np.zeros((500, 7))}
    return maps, {"frequencies": f} | power, traces


def documents(rng):
    cv = lambda: rng.uniform(0.1, 0.4, 7).round(3).tolist()
    label = {"samples": 10240, "failed": 12, "explained": 0.93, "rate": 151.0}
    quantities = ("curvature", "slope", "gradient", "S")
    rows = [
        {"variant": v, "quantity": q, "n": 280} | {k: float(rng.uniform(0, 0.9)) 
         for k in ("overall", "joints", "samples")}
        for v in ("ours", "ours:gauss_newton", "regret", "closed_loop") for q in quantities
    ]  # fmt: skip
    return {
        "config.json": {"experiment": "panda", "preset": "smoke", "p": [1, 4, 12], "note": "<b>&"},
        "environment.json": {"sartor": "0.1.0", "device": "cpu: cpu"},
        "labels.json": {m: {v: label | {"cv": cv()} for v in ("ours", "regret")} for m in ("0", "1")},
        "truth.json": {"rows": rows, "predicts": {m: float(rng.uniform(0.3, 0.9)) for m in METHODS}},
        "timing.json": {"collect": 61.0, "pretrain": 204.5, "label": 80.0, "fine-tune": 300.0},
        "speed.json": {"rows": [{"networks": "[8, 8], 1 LSTM of 8", "parameters": 900, "control step [ms]": 1.29}]},
        "finished.json": {"command": ""},
        "data.json": {"runs": 320, "samples": 160000, "diverged": {"runs": 18}},
    }  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished run with everything in it."""
    folder, rng = tmp_path_factory.mktemp("panda"), np.random.default_rng(0)
    for name, content in documents(rng).items():
        (folder / name).write_text(json.dumps(content))
    pq.write_table(pa.Table.from_pylist(evaluations(rng)), folder / "evaluations.parquet")
    pq.write_table(pa.Table.from_pylist(curves(rng)), folder / "curves.parquet")
    for name, content in zip(("maps", "spectrum", "traces"), arrays(rng), strict=True):
        np.savez(folder / f"{name}.npz", **content)
    (folder / "clip.webp").write_bytes(b"RIFF")
    report.page(REPORT, folder)
    return folder


def printed(folder, width=130):
    console = Console(width=width, file=io.StringIO())
    console.print(report.table(REPORT, folder))
    return console.file.getvalue()


def test_the_table_fits_a_terminal_and_holds_the_headline(whole):
    text = printed(whole, width=80)
    assert max(map(len, text.splitlines())) <= 80 and "…" not in text and "oracle_damping" in text
    assert text.index("nominal") < text.index("oracle_damping") < text.index("regret")
    found = evaluate.ratio(report.load(REPORT, whole)["evaluations.parquet"], pairing.Arm("ours", 12))
    line = text.splitlines()[text[: text.rindex(" ours ")].count("\n")]
    assert line.split()[1] == f"{100 * found.value:.1f}" and 0.85 < found.value < 0.95
    assert "4 trainings" in text and "0.5 rad/s" in text


def test_every_figure_is_drawn(whole):
    paths = list(whole.glob("*.png"))
    assert {path.name for path in paths} == {f"{part.name}.png" for part in REPORT.parts if part.figure}
    assert all(path.stat().st_size > 10_000 for path in paths)


def test_the_recipe_stands_below_the_weightings_of_its_p(whole):
    rows = report.load(REPORT, whole)["evaluations.parquet"]
    left, right = costs.bars(rows).axes
    names = [label.get_text() for label in left.get_yticklabels()]
    assert names[-1] == "stand_env, two rounds" and names[:-1] == list(METHODS)
    found = evaluate.ratio(rows, pairing.Arm("stand_env", 4, "recipe", "two rounds"), pairing.Arm("stand", 4))
    ends = [line.get_segments()[0] for line in left.collections]
    assert any(np.allclose(e, [(100 * found.low, 5), (100 * found.high, 5)]) for e in ends)
    assert not any(e[0][1] == 5 for e in (line.get_segments()[0] for line in right.collections))


def test_the_page_holds_everything_and_needs_nothing(whole):
    text = (whole / "report.html").read_text()
    assert text.count("data:image/png;base64,") == len(list(whole.glob("*.png"))) and "data:image/webp;base64," in text
    assert not re.findall(r'(?:src|href)="(?!data:)', text) and "<script" not in text
    assert "Left out" not in text and "&lt;b&gt;&amp;" in text and "<b>" not in text
    assert all(part.title in text for part in REPORT.parts)


def test_results_name_the_command_and_no_path_of_this_machine(whole):
    text = report.results_markdown([(REPORT, whole)])
    assert str(whole.parent) not in text and text.count("```sh\nuv run sartor run panda --preset smoke\n```") == 1
    tables = re.findall(r"\n(\|.*?)\n\n", text, re.S)
    assert len(tables) == sum(part.grid is not None for part in REPORT.parts) and '| preset | "smoke" |' in text
    assert all(len({row.count("|") for row in table.splitlines()}) == 1 for table in tables)
    assert text.count("From `evaluations.parquet` of") == 4
    assert "| ours | 0 | 10240 | 12 | 93.0% | 151 |" in text and "| pretrain | 204.5 | 32% |" in text


def test_the_files_beside_the_text_give_the_same_text(whole, tmp_path):
    text = report.results_markdown([(REPORT, whole)], tmp_path / "results")
    again = report.results_markdown([(REPORT, tmp_path / "results" / "panda-smoke")])
    assert "(results/panda-smoke-bars.png)" in text and (tmp_path / "results" / "panda-smoke-bars.png").exists()
    assert again == report.results_markdown([(REPORT, whole)])


def test_two_runs_of_a_preset_keep_their_files_apart(whole, tmp_path):
    other, third = tmp_path / "second", tmp_path / "more" / "second"
    for copied in (other, third):
        shutil.copytree(whole, copied)
    text = report.results_markdown([(REPORT, whole), (REPORT, other)], tmp_path / "results")
    kept = {path.name for path in (tmp_path / "results").iterdir() if path.is_dir()}
    assert kept == {"panda-smoke", "panda-second"}
    assert "preset smoke, panda-smoke\n" in text and "(results/panda-second-bars.png)" in text
    with pytest.raises(ValueError, match="panda-second.*rename"):
        report.results_markdown([(REPORT, whole), (REPORT, other), (REPORT, third)])


def copy(whole, folder, names):
    for name in ("config.json", *names):
        (folder / name).write_bytes((whole / name).read_bytes())


def test_what_is_missing_is_said_and_left_out(whole, tmp_path):
    copy(whole, tmp_path, [])
    assert report.figures(REPORT, tmp_path) == [] and "No evaluations yet" in printed(tmp_path)
    text = report.page(REPORT, tmp_path).read_text()
    assert "Left out: truth.json is missing." in text and "No clip" in text and "<img" not in text
    assert "Left out: labels.json is missing." in report.results_markdown([(REPORT, tmp_path)])


def evaluated(whole, folder, keep):
    """A run folder with some of the evaluations, those where `keep(columns)`."""
    copy(whole, folder, [])
    table = pq.read_table(whole / "evaluations.parquet")
    pq.write_table(table.filter(pa.array(keep(pairing.columns(table)))), folder / "evaluations.parquet")


def test_a_run_that_has_only_begun_to_evaluate(whole, tmp_path):
    evaluated(whole, tmp_path, lambda rows: (rows["p"] == 0) | (rows["method"] == "ours"))
    text = printed(tmp_path)
    assert "pretrained" in text and "–" in text  # there is no stand to compare with
    assert report.figures(REPORT, tmp_path) == []
    assert "Left out: evaluations.parquet has nothing for this yet." in report.page(REPORT, tmp_path).read_text()


def test_a_small_run_without_the_oracle(whole, tmp_path):
    """One model, one seed, one p: no interval over runs, no saturated environments, no validation."""
    evaluated(
        whole,
        tmp_path,
        lambda r: (r["study"] == "main") & (r["model"] <= 0) & (r["seed"] <= 0) & np.isin(r["p"], (0, 4))
        & (r["split"] == "test") & np.isin(r["method"], ("pretrained", "stand", "ours")),
    )  # fmt: skip
    assert {path.name for path in report.figures(REPORT, tmp_path)} == {"bars.png", "environments.png", "protocols.png"}
    text = " ".join(printed(tmp_path).split())
    assert "1 training;" in text and "too narrow" in text and "nominal" not in text


def test_a_method_that_is_many_times_worse_is_drawn_too(whole, tmp_path):
    copy(whole, tmp_path, [])
    table = pq.read_table(whole / "evaluations.parquet")
    rows = pairing.columns(table)
    J = np.where(rows["method"] == "regret", 30.0 * rows["J"], rows["J"])
    table = table.set_column(table.column_names.index("J"), "J", pa.array(J)).filter(pa.array(rows["study"] == "main"))
    pq.write_table(table, tmp_path / "evaluations.parquet")
    assert len(report.figures(REPORT, tmp_path)) == 3


@pytest.mark.parametrize("method", ["ours", "stand"])
def test_an_episode_that_diverged_is_in_the_table(method, whole, tmp_path):
    copy(whole, tmp_path, [])
    table = pq.read_table(whole / "evaluations.parquet")
    rows = pairing.columns(table)
    hit = (rows["method"] == method) & (rows["environment"] == 101) & (rows["seed"] == 0) & (rows["model"] == 0)
    J = pa.array(np.where(hit & (rows["p"] == 4), np.inf, rows["J"]))
    table = table.set_column(table.column_names.index("J"), "J", J).filter(pa.array(rows["study"] == "main"))
    pq.write_table(table, tmp_path / "evaluations.parquet")
    assert "inf" in printed(tmp_path) and "inf" in report.page(REPORT, tmp_path).read_text()
    if method == "ours":
        left = costs.bars(report.load(REPORT, tmp_path)["evaluations.parquet"]).axes[0]
        assert "∞ → " in [text.get_text() for text in left.texts]


def test_rows_that_are_there_twice_are_an_error_and_not_left_out(whole, tmp_path):
    copy(whole, tmp_path, [])
    table = pq.read_table(whole / "evaluations.parquet")
    pq.write_table(pa.concat_tables([table, table.slice(0, 1)]), tmp_path / "evaluations.parquet")
    with pytest.raises(ValueError, match="is there twice"):
        report.table(REPORT, tmp_path)


@pytest.mark.parametrize("content", [None, {"experiment": "closed_loop"}])
def test_other_folders_are_refused(content, tmp_path):
    if content is not None:
        (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="holds no run of panda"):
        report.table(REPORT, tmp_path)
