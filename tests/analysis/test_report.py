"""The report: one file without a request, every part in it, every record's command."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pandas as pd
import pytest
import yaml

from analysis import groups, report
from analysis.cli import Paths
from analysis.frames import AnalysisError, Store
from analysis.report_page.records import records_of
from tests.analysis.store import stage, write_point
from tests.analysis.test_speedup import case

ROOT = Path(__file__).resolve().parents[2]
VOID = {"meta", "link", "input", "br", "image"}


class Page(HTMLParser):
    """Ids, references and text of a page; fails on tags that do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.references: list[str] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.ids += [found["id"]] if "id" in found else []
        self.references += [v or "" for k, v in attrs if k in ("src", "href", "srcset", "action")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def write_items(folder: Path, shift: float) -> None:
    rows = [
        {"measure": "accuracy", "name": "choice_task", "metric": "acc", "item": f"i{i}"}
        | {"value": float(i % 10 < 8 - shift), "weight": 1.0, "dense": float(i % 10 < 9)}
        for i in range(60)
    ]
    pd.DataFrame(rows).to_parquet(folder / "items.parquet")


def write_routing(folder: Path) -> None:
    tokens = pd.DataFrame(
        {
            "token": range(40),
            "row": "doc",
            "position": range(40),
            "text": " word",
            "token_class": ["name", "content"] * 20,
            "frequency": np.linspace(0.01, 0.2, 40),
            "dense_loss": np.linspace(0, 5, 40),
            "routed_loss": np.linspace(0, 6, 40),
        }
    )
    decisions = pd.DataFrame(
        [
            {"token": t, "layer": layer, "kind": kind, "executed": (t + layer) % 3 > 0}
            | {"score": 0.1, "error_l2": 0.5, "error_cosine": 0.8}
            for t in range(40)
            for layer in range(3)
            for kind in ("attention", "mlp")
        ]
    )
    depth = pd.DataFrame({"layer": range(3), "l2": 0.1, "cosine": 0.9})
    folder.mkdir()
    for name, frame in (("tokens", tokens), ("decisions", decisions), ("depth", depth)):
        frame.to_parquet(folder / f"{name}.parquet")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Three methods at two targets, with everything that a record can have."""
    folder = tmp_path_factory.mktemp("store") / "results"
    for place, method in enumerate(("informed", "greedy", "random")):
        for sparsity in (0.3, 0.5):
            name = f"{method}-{sparsity}-0-"
            more = {"stages": [stage("routers", 10.0 * (place + 1))]}
            if method == "informed":
                more["speed"] = {
                    "prefill": [case("seq", 512, 1 + sparsity, 1.6, sparsity)],
                    "decode": [],
                    "settings": {"device": "a <fast> processor"},
                }
            per_layer = [{"layer": i, "attention": 0.1 * i, "mlp": sparsity} for i in range(3)]
            identity = {"fingerprint": name, "budget": "quick", "git": {"commit": "c0ffee"}}
            value = 30.0 + 40 * place + 100 * sparsity
            more |= {"realised": {"per_layer": per_layer}, "identity": identity}
            write_point(folder, method, sparsity, perplexity=value, kv_bytes_ratio=0.9, **more)
            config = {"method": {"name": method}, "sparsity": sparsity, "budget": {"steps": 7}}
            (folder / name / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
            write_items(folder / name, place)
    write_routing(folder / "informed-0.3-0-" / "routing")
    write_point(folder, "mod", 0.9, perplexity=1.0, status="failed", reason="<b>out of reach</b>")
    return folder


@pytest.fixture(scope="module")
def page(results):
    report.main(Paths(results, results))
    return (results / "report.html").read_text()


def test_the_page_asks_for_nothing_and_nests(page, results):
    """What it links to is a file beside it, loaded by nobody until it is followed."""
    parsed = Page(page)
    assert page.lower().startswith("<!doctype html>")
    outside = {r for r in parsed.references if not r.startswith(("#", "data:"))}
    assert outside >= {
        "plots/tradeoff-tiny-sotu-quick.csv",
        "plots/routing-informed-0.3-0--text.html",
    }
    assert all((results / unquote(link)).is_file() for link in outside)
    assert not re.search(r'<(?:img|script|iframe|link)[^>]*(?:src|href)="(?!data:)', page)
    assert not any(word in page for word in ("http:", "https:", "@import", "url(//"))
    assert len(parsed.ids) == len(set(parsed.ids))
    inside = {r[1:] for r in parsed.references if r.startswith("#")}
    assert inside <= set(parsed.ids)


def test_every_part_is_there(page):
    parsed = Page(page)
    text = parsed.text
    for heading in (
        *("Quality against cost", "Pareto front", "Training time", "Speed", "KV cache"),
        *("Sparsity by layer", "Significance", "Configurations and commands"),
        *("Routing map: informed, target 0.3, seed 0", "Points left out"),
    ):
        assert f"> {heading}<" in page.replace(">", "> ") or heading in text, heading
    assert "no point here" not in text and "nothing was timed" not in text
    for number in ("80.00 [72.00, 88.00]", "mcnemar", "c0ffee", "0.333", "1.300 [1.200, 1.400]"):
        assert number in text, number
    assert "&lt;b&gt;out of reach" in page and "<b>out of reach" not in page
    assert page.count("<svg") > 20


def test_the_answer_stands_above_all(tmp_path):
    """At equal FLOPs where nothing was timed, at measured speed-ups where something was."""
    static = {"identity": {"static": True}}
    for sparsity in (0.25, 0.5):
        write_point(tmp_path, "informed", sparsity, perplexity=20 + 20 * sparsity)
        write_point(tmp_path, "static_forecast", sparsity, perplexity=20 + 40 * sparsity, **static)
    store = Store(tmp_path)
    text = Page(report.render(store, {view: view.rows(store) for view in report.VIEWS})).text
    line = "At 0.8 of dense's FLOPs: informed 1.250 loses least. Of the controls: static_forecast"
    assert line in text and text.index(line) < text.index("Quality at equal FLOPs")
    for sparsity in (0.25, 0.5):
        speed = {"prefill": [case("seq", 512, 1 + sparsity, 1.6, sparsity)], "decode": []}
        for method in ("informed", "static_forecast"):
            path = tmp_path / f"{method}-{sparsity}-0-" / "result.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | {"speed": speed}))
    store = Store(tmp_path)
    text = Page(report.render(store, {view: view.rows(store) for view in report.VIEWS})).text
    assert "At 1.25 times dense's speed in prefill: informed 1.250 loses least." in text
    assert "At 2 times" not in text and "of dense's FLOPs:" not in text


def test_each_record_has_the_command_of_its_own_configuration(page, results):
    text = Page(page).text
    for record in Store(results).records:
        folder = results / record["identity"]["fingerprint"]
        command = f"python runners/sweep.py --config-dir {folder} --config-name config"
        assert command in text
    assert text.count("runners/speed.py --config-dir") == 2
    assert text.count("runners/inspect_routing.py saved=") == 1


def test_files_beside_the_page(page, results):
    written = {path.name for path in (results / "plots").iterdir()}
    setting = "tiny-sotu-quick"
    for name in ("tradeoff", "pareto", "speedup", "kv", "layers"):
        endings = ("png", "pdf", "csv", "md", "tex")
        assert {f"{name}-{setting}.{end}" for end in endings} <= written, name
    for name in ("training_time", "significance"):
        assert {f"{name}-{setting}.{end}" for end in ("csv", "md", "tex")} <= written, name
    assert "routing-informed-0.3-0--maps.pdf" in written


def test_a_store_with_little_names_what_would_fill_it(tmp_path):
    write_point(tmp_path, "informed", 0.3, perplexity=30.0)
    report.main(Paths(tmp_path, tmp_path / "out"))
    text = Page((tmp_path / "out" / "report.html").read_text()).text
    assert "runners/speed.py" in text and "runners/inspect_routing.py" in text
    assert "force=true" in text and "config.yaml is not beside the record" in text


def test_a_point_that_was_only_timed_has_a_page(tmp_path):
    speed = {"prefill": [case("seq", 8, 1.2, 1.4, 0.3)], "decode": []}
    speed["settings"] = {"device": "x"}
    write_point(
        tmp_path, "informed", 0.3, perplexity=1.0, evaluated=False, speed=speed, accuracy={}
    )
    record = tmp_path / "informed-0.3-0-" / "result.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"perplexity": {}}))
    report.main(Paths(tmp_path, tmp_path / "out"))
    assert "prefill, batch 1, 8 tokens" in (tmp_path / "out" / "report.html").read_text()


def test_an_empty_store_is_one_line(tmp_path):
    done = subprocess.run(
        [sys.executable, "analysis/report.py", f"results_dir={tmp_path}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and done.stderr.startswith("error: no complete result")
    with pytest.raises(AnalysisError):
        report.main(Paths(tmp_path, tmp_path))


def test_common_and_differing_configuration(tmp_path):
    for seed, (b, folder) in enumerate(((1, "x"), (2, "y"))):
        tree = {"a": {"b": b, "c": [1, 2]}, "d": None, "list": ["p", "q"], "results_dir": folder}
        write_point(tmp_path, "informed", 0.5, perplexity=30.0, config=tree, seed=seed)
    store = Store(tmp_path)
    for config in store.configs.values():
        assert config["a.c"] == [1, 2] and "results_dir" not in config
    page = records_of(store, store.points)
    assert page["shared"] == [
        ("a.c", "[1, 2]"),
        ("d", "null"),
        ("list", "['p', 'q']"),
        ("sparsity", "0.5"),
    ]
    assert [e["differs"] for e in page["entries"]] == [
        [("a.b", "1"), ("seed", "0")],
        [("a.b", "2"), ("seed", "1")],
    ]
    assert groups.read_config(tmp_path / "nowhere") == {}


def chromium() -> str:
    pytest.importorskip("playwright", reason="needs playwright and a Chromium")
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("no Chromium on this machine")
    return found


def use_a_table(tab) -> None:
    """Sort by a number, the other way, then filter."""
    section = "#s0-training_time"
    column = f"{section} td:nth-child(3)"
    tab.click(f"{section} th:nth-child(3) button")
    up = [float(cell) for cell in tab.locator(column).all_inner_texts()]
    assert up == sorted(up)
    tab.click(f"{section} th:nth-child(3) button")
    assert [float(cell) for cell in tab.locator(column).all_inner_texts()] == up[::-1]
    assert tab.locator(f"{section} th[aria-sort=descending]").count() == 1
    tab.fill("#s0-pareto .filters input", "random")
    rows = tab.locator("#s0-pareto tbody tr:visible")
    assert all("random" in row for row in rows.all_inner_texts())


def point_at_a_mark(tab) -> None:
    """The values of a point, as its record has them."""
    figure = tab.locator("#s0-tradeoff figure").first
    mark = figure.locator("use[aria-label^='informed']").first
    mark.scroll_into_view_if_needed()
    box = mark.bounding_box()
    tab.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    said = tab.inner_text("#tip").splitlines()
    assert said[:3] == ["informed", "realised sparsity: 0.31", "sotu perplexity / dense: 3"]
    tab.mouse.move(1, 1)
    assert tab.is_hidden("#tip")


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_in_a_browser(page, results, width, scheme):
    """No console message, no request but the page, no sideways scrolling, panels in view."""
    path = chromium()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        view = {"width": width, "height": 844}
        tab = browser.new_context(viewport=view, color_scheme=scheme).new_page()
        messages, requests = [], []
        tab.on("console", lambda message: messages.append(message.text))
        tab.on("pageerror", lambda error: messages.append(str(error)))
        tab.on("request", lambda request: requests.append(request.url))
        tab.goto((results / "report.html").as_uri())
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        widths = tab.evaluate(
            "[...document.querySelectorAll('figure svg')].map(s => s.getBoundingClientRect().width)"
        )
        assert len(widths) > 15 and min(widths) > 250 and max(widths) <= width
        tab.fill(".filter", "greedy 0.3,")
        assert tab.inner_text(".records .count") == "1 of 6"
        use_a_table(tab)
        point_at_a_mark(tab)
        paper = "getComputedStyle(document.body).backgroundColor"
        before = tab.evaluate(paper)
        assert (before == "rgb(255, 255, 255)") == (scheme == "light")
        tab.click("#theme")
        assert tab.evaluate(paper) != before
        browser.close()
    assert messages == []
    assert [url for url in requests if not url.startswith("data:")] == [
        (results / "report.html").as_uri()
    ]
