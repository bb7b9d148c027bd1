"""The analysis reads a store alone: figures, tables, and one line for a user's mistake."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from matplotlib import image

from analysis import ablation, generation, kv, layers, pareto, tradeoff, training_time, two_by_two
from analysis.cli import Paths, write
from analysis.drawing import style, tables
from analysis.frames import AnalysisError, Store
from tests.analysis.store import stage, write_point

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def store(tmp_path):
    folder = tmp_path / "results"
    shared = stage("forecasters", 30.0, explained_variance_mlp=0.4)
    for index, sparsity in enumerate((0.3, 0.5, 0.7)):
        first = {**shared, "cached": index > 0}
        write_point(
            folder,
            "informed",
            sparsity,
            perplexity=30.0 + 100 * sparsity,
            stages=[first, stage("calibrate", 1.0 + index)],
        )
        write_point(folder, "random", sparsity, perplexity=10.0 ** (2 + 4 * sparsity))
    write_point(folder, "dense", 0.0, perplexity=20.0)
    return folder


def test_broken_and_failed_records_are_left_out_and_named(store, caplog):
    (store / "torn").mkdir()
    (store / "torn" / "result.json").write_text('{"status": "comp')
    (store / "running").mkdir()
    write_point(store, "greedy", 0.5, perplexity=1.0, status="failed", reason="no luck")
    write_point(store, "greedy", 0.6, perplexity=1.0, schema_version=99)
    assert len(Store(store).records) == 7
    assert "no luck" in caplog.text and "torn" in caplog.text and "99" in caplog.text


def test_empty_store_is_one_clear_line(tmp_path):
    with pytest.raises(AnalysisError, match="no complete result"):
        Store(tmp_path)


def test_seeds_become_mean_and_std(tmp_path):
    """Perplexities as losses: seeds that are orders apart give no negative bound."""
    for seed, value in enumerate((4.0, 16.0, 64.0)):
        task = {"value": 0.2 + seed / 10, "stderr": 0.02, "dense": 0.85, "n": 200, "chance": 0.25}
        accuracy = {"choice_task": task}
        write_point(tmp_path, "informed", 0.5, perplexity=value, accuracy=accuracy, seed=seed)
    averaged = Store(tmp_path).averaged.set_index("measure")
    shown = averaged[["value", "low", "high", "seeds"]]
    assert list(shown.loc["perplexity"]) == pytest.approx([16.0, 4.0, 64.0, 3])
    assert list(shown.loc["accuracy"]) == pytest.approx([0.3, 0.2, 0.4, 3])


def test_a_dense_row_is_one_of_itself_whatever_the_seeds(tmp_path):
    """Seeds whose dense perplexities differ in the last digits, as on a GPU."""
    for seed, value in enumerate((20.0, 20.019)):
        write_point(tmp_path, "dense", 0.0, perplexity=value, dense=value, seed=seed)
    row = Store(tmp_path).averaged.set_index("measure").loc["perplexity"]
    assert row["value"] / row["dense"] == pytest.approx(1.0, abs=1e-6)


def written(kept, text):
    """What a record has of the same prompts, continued."""
    value, spread = sum(kept) / len(kept), 0.05
    entry = {"value": value, "stderr": spread, "n": len(kept), "dense": 1.0, "per_prompt": kept}
    return {
        "settings": {"prompts": 32, "prompt_tokens": 16, "new_tokens": 32, "gallery": ["Water is"]},
        "kept": entry,
        "prefix": entry | {"value": value / 2},
        "sparsity_realised": 0.28,
        "gallery": [{"prompt": "Water is", "dense": " wet.\nIt", "text": text}],
    }


def test_what_is_written_stands_beside_perplexity(tmp_path):
    """Records without it are read as ever; of seeds the mean share and the first one's text."""
    shares = [[0.5, 0.75, 0.25, 0.5], [0.75, 0.75, 0.5, 1.0]]
    for seed, kept in enumerate(shares):
        more = {"generation": written(kept, f" seed {seed}"), "seed": seed}
        write_point(tmp_path, "informed", 0.3, perplexity=30.0, **more)
    write_point(tmp_path, "greedy", 0.3, perplexity=40.0)
    store = Store(tmp_path)
    row = store.averaged.set_index("measure").loc["generation"]
    assert (row["value"], row["difference"], row["dense"]) == pytest.approx((0.625, -0.375, 1.0))
    mean = [sum(pair) / 2 - 1 for pair in zip(*shares, strict=True)]
    assert row["difference_low"] < min(mean) < row["difference"] < row["difference_high"] < 0
    shown = tradeoff.table(store.averaged)[1].set_index("method")["32 tokens kept"]
    assert shown["informed"].startswith("0.625 ±") and shown["greedy"] == ""
    rows = generation.VIEW.rows(store)
    table = generation.table(rows)[1]
    assert list(table["method"]) == ["dense", "informed"]
    assert list(table["continuation"]) == ["wet. It", "seed 0"]
    assert list(table["kept"]) == ["1.000", "0.625"]
    write_point(tmp_path / "older", "greedy", 0.3, perplexity=40.0)
    assert generation.VIEW.rows(Store(tmp_path / "older")).empty


def test_dense_is_itself_without_an_interval(tmp_path):
    """Its answers are no second sample that could have come out otherwise."""
    folder = write_point(tmp_path, "dense", 0.0, perplexity=20.0)
    rows = [
        {"measure": "accuracy", "name": "choice_task", "metric": "acc", "item": f"i{i}"}
        | {"value": float(i % 3 > 0), "weight": 1.0, "dense": float(i % 3 > 0)}
        for i in range(30)
    ]
    pd.DataFrame(rows).to_parquet(folder / "items.parquet")
    row = Store(tmp_path).averaged.set_index("measure").loc["accuracy"]
    assert row["difference_low"] == row["difference_high"] == row["difference"]


def test_settings_never_share_a_figure(store, tmp_path):
    write_point(store, "informed", 0.4, perplexity=9.0, data="other")
    write(tradeoff.VIEW, Paths(store, tmp_path / "plots"))
    names = {path.name for path in (tmp_path / "plots").glob("*.csv")}
    assert names == {"tradeoff-tiny-sotu-quick.csv", "tradeoff-tiny-other-quick.csv"}
    assert set(pd.read_csv(tmp_path / "plots/tradeoff-tiny-other-quick.csv")["data"]) == {"other"}


def test_figure_has_each_line_its_errors_and_the_dense_reference(store):
    with style.paper():
        figure = tradeoff.VIEW.draw(Store(store).averaged, "title")
    panel = figure.axes[0]
    handles, labels = panel.get_legend_handles_labels()
    assert set(labels) == {"dense", "informed", "random"}
    drawn = dict(zip(labels, handles, strict=True))
    assert list(drawn["informed"].lines[0].get_ydata()) == pytest.approx([3.0, 4.0, 5.0])
    assert list(drawn["informed"].lines[0].get_xdata()) == pytest.approx([0.31, 0.51, 0.71])
    assert drawn["informed"].has_yerr
    assert panel.get_yscale() == "log"
    assert [axes.xaxis_inverted() for axes in figure.axes] == [False, True, False, True]
    assert panel.get_ylim()[1] == 10, "what is of no use is beyond the axis"
    named = {text.get_text() for text in panel.texts}
    assert named == {"informed", "\N{BLACK UP-POINTING TRIANGLE} random 79.2, 500, 3.2e3"}


def test_costs_fall_to_the_right_in_every_picture(store):
    with style.paper():
        figure = pareto.VIEW.draw(pareto.rows(Store(store)), "title")
    assert all(axes.xaxis_inverted() for axes in figure.axes)


def test_figure_files_are_not_blank(store, tmp_path):
    write(tradeoff.VIEW, Paths(store, tmp_path))
    picture = image.imread(tmp_path / "tradeoff-tiny-sotu-quick.png")
    assert picture[..., :3].std() > 0.05
    assert (tmp_path / "tradeoff-tiny-sotu-quick.pdf").read_bytes().startswith(b"%PDF")


def test_summary_gives_the_records_numbers(store):
    _, readable = tradeoff.table(Store(store).averaged)
    row = readable.set_index(["method", "target"]).loc[("informed", "0.50")]
    assert row["sotu perplexity"] == "80.00 [72.00, 88.00]"
    assert row["sotu perplexity / dense"] == "4.000"
    assert row["choice_task accuracy"] == "0.550 ± 0.020"
    assert row["choice_task accuracy - dense"] == "-0.300"


def test_the_metric_of_a_task_is_named(tmp_path):
    task = {"value": 0.655, "stderr": 0.02, "dense": 0.66, "n": 200, "metric": "acc_norm"}
    write_point(tmp_path, "informed", 0.3, perplexity=30.0, accuracy={"piqa": task})
    averaged = Store(tmp_path).averaged
    assert "piqa acc_norm" in tradeoff.table(averaged)[1]
    with style.paper():
        figure = tradeoff.VIEW.draw(averaged, "title")
    assert [axes.get_ylabel() for axes in figure.axes][2] == "piqa\nacc_norm"


def test_a_shared_stage_is_paid_once(store):
    costs = training_time.costs(Store(store).stages).set_index("stage")
    assert costs.loc["forecasters", "seconds"] == 30.0
    assert (costs.loc["forecasters", "runs"], costs.loc["forecasters", "points"]) == (1, 3)
    assert costs.loc["calibrate", "seconds"] == 6.0
    assert costs.loc["total", "seconds"] == 36.0
    assert costs.loc["forecasters", "explained_variance_mlp"] == pytest.approx(0.4)


def test_training_time_is_written_in_three_forms(store, tmp_path):
    write(training_time.VIEW, Paths(store, tmp_path))
    stem = "training_time-tiny-sotu-quick"
    assert "| informed | forecasters | 30.0 |" in (tmp_path / f"{stem}.md").read_text()
    assert r"\toprule" in (tmp_path / f"{stem}.tex").read_text()
    assert len(pd.read_csv(tmp_path / f"{stem}.csv")) == 3


def test_latex_escapes_every_special_character():
    frame = pd.DataFrame({"a_b": ["50% & #1 ~x^2 {y} \\z $"], "n": ["1.2 [1.0, 1.4]"]})
    first, _, heading, _, row, *_ = tables.latex(frame).splitlines()
    assert first == r"\begin{tabular}{rr}" and heading == r"a\_b & n \\"
    assert row == (
        r"50\% \& \#1 \textasciitilde x\textasciicircum 2 \{y\} \textbackslash z \$ "
        r"& 1.2 [1.0, 1.4] \\"
    )


def test_looks_differ_within_a_picture_and_repeat_between_pictures():
    """All methods there are, some variants, and one that nobody knows yet."""
    names = [path.stem for path in (ROOT / "conf/method").glob("*.yaml")]
    names += [f"informed ({part})" for part in ("bypass=skip", "rank=4", "rank=8", "rank=9")]
    names += ["greedy (train=none)", "greedy [random decisions]", "new"]
    looks = style.looks(names)
    assert len({look["color"] for look in looks.values()}) == len(names) >= 20
    assert all(look["color"] in style.SERIES for look in looks.values())
    assert style.looks(reversed(names)) == looks
    few = style.looks(["informed", "greedy", "random", "skipgpt"])
    assert len({look["marker"] for look in few.values()}) == len(few)
    assert all(few[name]["color"] == looks[name]["color"] for name in few)


def test_colours_are_seen_on_white_and_on_the_dark_page():
    """At least 1.9 to 1 against the paper, every shade: lines are marked and labelled too."""
    ground = style.luminance("#14171b")
    for colour in style.SERIES:
        assert 1.05 / (style.luminance(colour) + 0.05) > 1.9, colour
        assert (style.luminance(style.on_dark(colour)) + 0.05) / (ground + 0.05) > 3.0, colour


def test_roles_look_different():
    roles = dict(zip("abcd", style.ROLES, strict=True))
    looks = style.looks(roles)
    told = {(str(look["linestyle"]), look.get("markerfacecolor")) for look in looks.values()}
    assert len(told) == 4 and looks["a"]["linestyle"] == "-"
    assert looks["b"]["markerfacecolor"] == "#ffffff"


@pytest.mark.parametrize(
    ("script", "argument"),
    [
        ("tradeoff", "results_dir=/nope"),
        ("training_time", "nonsense"),
        ("training_time", "colour=red"),
    ],
)
def test_mistakes_end_in_one_line(script, argument):
    done = subprocess.run(
        [sys.executable, f"analysis/{script}.py", argument],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: ")


def test_analysis_loads_no_torch():
    code = (
        "import sys, json, analysis.tradeoff, analysis.training_time;"
        "print(json.dumps([m for m in ('torch', 'methods', 'runners') if m in sys.modules]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == []


BYPASSES = {("greedy", "skip"): 90.0, ("greedy", "forecast"): 50.0}
BYPASSES |= {("informed", "skip"): 70.0, ("informed", "forecast"): 30.0}


def write_two_by_two(folder: Path, **options: object) -> None:
    for (method, bypass), perplexity in BYPASSES.items():
        for seed, factor in ((0, 0.5), (1, 2.0)):
            write_point(
                folder,
                method,
                0.3,
                perplexity=perplexity * factor,
                seed=seed,
                variant=", ".join([bypass, *map(str, options.values())]),
                options={"bypass": bypass, "train": "none", **options},
            )


def test_two_by_two_puts_each_router_beside_each_bypass(tmp_path):
    write_two_by_two(tmp_path)
    write_point(tmp_path, "random", 0.3, perplexity=1e4, options={"bypass": "skip"})
    write(two_by_two.VIEW, Paths(tmp_path, tmp_path / "plots"))
    (row,) = pd.read_csv(tmp_path / "plots/two_by_two-tiny-sotu-quick.csv").to_dict("records")
    for (method, bypass), perplexity in BYPASSES.items():
        assert row[f"{method}_{bypass}"] == pytest.approx(perplexity)
    text = (tmp_path / "plots/two_by_two-tiny-sotu-quick.md").read_text()
    assert "| 0.30 | none | 4.500 | 2.500 | 3.500 | 1.500 | 20.00 |" in text


def test_two_by_two_averages_no_other_option(tmp_path):
    write_two_by_two(tmp_path)
    write_two_by_two(tmp_path, rank=4)
    with pytest.raises(AnalysisError, match=r"forecast, 4\): 4 greedy"):
        write(two_by_two.VIEW, Paths(tmp_path, tmp_path / "plots"))


def test_two_by_two_of_one_router_is_one_clear_line(store, tmp_path):
    with pytest.raises(AnalysisError, match="experiment=two_by_two"):
        write(two_by_two.VIEW, Paths(store, tmp_path / "plots"))


def test_ablation_is_relative_to_the_whole_method(tmp_path):
    for parts, perplexity in (([], 30.0), (["refit"], 36.0), (["a", "b"], 60.0)):
        write_point(
            tmp_path,
            "informed_plus",
            0.5,
            perplexity=perplexity,
            variant=str(parts),
            options={"without": parts},
            stages=[stage("distill", 100.0)],
        )
    write(ablation.VIEW, Paths(tmp_path, tmp_path / "plots"))
    found = pd.read_csv(tmp_path / "plots/ablation-tiny-sotu-quick.csv")
    assert list(found["without"]) == ["all parts", "refit", "a, b"]
    assert list(found["of_whole"]) == pytest.approx([1.0, 1.2, 2.0])
    assert list(found["ratio"]) == pytest.approx([1.5, 1.8, 3.0])
    assert set(found["training_s"]) == {100.0}
    assert found["flops_ratio"].between(0.0, 1.0).all(), "a part that costs FLOPs must show it"


def test_ablation_without_any_is_one_clear_line(store, tmp_path):
    with pytest.raises(AnalysisError, match="experiment=ablation"):
        write(ablation.VIEW, Paths(store, tmp_path / "plots"))


def test_layers_report_where_each_kind_is_bypassed(tmp_path):
    for seed, shift in ((0, 0.0), (1, 0.2)):
        per_layer = [
            {"layer": i, "attention": 0.1 * i + shift, "mlp": 0.6 - 0.2 * i} for i in range(3)
        ]
        write_point(
            tmp_path, "informed", 0.3, perplexity=9.0, seed=seed, realised={"per_layer": per_layer}
        )
    write_point(tmp_path, "dense", 0.0, perplexity=9.0, realised={"per_layer": []})
    write(layers.VIEW, Paths(tmp_path, tmp_path / "plots"))
    found = pd.read_csv(tmp_path / "plots/layers-tiny-sotu-quick.csv")
    attention = found[found.kind == "attention"].sort_values("layer")
    assert list(attention.sparsity) == pytest.approx([0.1, 0.2, 0.3])
    text = (tmp_path / "plots/layers-tiny-sotu-quick.md").read_text()
    assert "| informed | 0.30 | 0.200 | 0.10 (0) | 0.30 (2) | 0.400 | 0.20 (2) | 0.60 (0) |" in text
    with style.paper():
        figure = layers.VIEW.draw(layers.rows(Store(tmp_path)), "t")
    drawn = figure.axes[1].lines[1]
    assert list(drawn.get_ydata()) == pytest.approx([0.6, 0.4, 0.2])


def test_kv_bytes_of_each_policy(tmp_path):
    for policy, ratio, perplexity in (("keep", 1.0, 30.0), ("evict", 0.7, 40.0)):
        write_point(
            tmp_path,
            "informed",
            0.3,
            perplexity=perplexity,
            variant=policy,
            kv_policy=policy,
            kv_bytes_ratio=ratio,
        )
    write_point(tmp_path, "dense", 0.0, perplexity=20.0)
    write(kv.VIEW, Paths(tmp_path, tmp_path / "plots"))
    found = pd.read_csv(tmp_path / "plots/kv-tiny-sotu-quick.csv").set_index("kv_policy")
    assert found.loc["evict", ["kv_bytes_ratio", "value"]].tolist() == pytest.approx([0.7, 40.0])
    assert found.loc["keep", ["kv_bytes_ratio", "value"]].tolist() == pytest.approx([1.0, 30.0])
    assert (tmp_path / "plots/kv-tiny-sotu-quick.png").stat().st_size > 1000
