"""The site's pages exist, name real files, and hold every method; strict where mkdocs is there."""

from __future__ import annotations

import html
import importlib.util
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from runners.launching.command_line import prepare
from tests.conftest import CONF, ROOT

DOCS = ROOT / "docs"
SNIPPET = re.compile(r'^--8<-- "([^":]+)', re.MULTILINE)
FILE = re.compile(r"(?<![/\w])(?:runners|analysis|benchmarks|methods|conf|tests|docs)/[\w/]+\.\w+")
PAGES = sorted(DOCS.rglob("*.md"))
TEXTS = [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"]


def pages_of(nav: Any) -> Iterator[str]:
    """Every file that a navigation names."""
    if isinstance(nav, str):
        yield nav
        return
    for entry in nav.values() if isinstance(nav, dict) else nav:
        yield from pages_of(entry)


def test_navigation_and_pages_are_the_same():
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    listed = sorted(pages_of(settings["nav"]))
    assert listed == sorted(str(page.relative_to(DOCS)) for page in PAGES)


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_a_page_names_exist(page):
    """The example of a method, token_norm, apart."""
    text = page.read_text()
    for name in [*SNIPPET.findall(text), *FILE.findall(text)]:
        found = (ROOT / name).is_file() or (DOCS / name).is_file()
        assert found or "token_norm" in name, name


def test_the_site_builds_without_a_warning(tmp_path):
    """Every method has a page there with its options, written in docs/methods or not."""
    if importlib.util.find_spec("mkdocstrings") is None or not importlib.util.find_spec("material"):
        pytest.skip("needs the extra `docs`")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    for file in (CONF / "method").glob("*.yaml"):
        page = (tmp_path / "methods" / file.stem / "index.html").read_text()
        text = html.unescape(re.sub(r"<[^>]+>", "", page))
        assert all(line in text for line in file.read_text().splitlines()), file.stem
        target = yaml.safe_load(file.read_text())["_target_"]
        assert f'id="{target}"' in page and "fonts.googleapis" not in page


LINE = re.compile(r"^python runners/(sweep|train|speed)\.py (.*?)(?:\s+#.*)?$", re.MULTILINE)
COMMANDS = sorted(
    {
        (script, words)
        for page in TEXTS
        for block in re.findall(r"^```\w*\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
        for script, words in LINE.findall(re.sub(r" \\\n\s*", " ", block))
        if re.search(r"\w\.\w+=|experiment=", words)
        and not re.search(r"[<$]|=\./|=/|launcher|device_map|=compare|=tradeoff", words)
    }
)
"""Those with options; none that names the reader's folders, or of dozens of points."""


@pytest.mark.parametrize(("script", "words"), COMMANDS, ids=lambda value: str(value)[:60])
def test_a_command_of_the_docs_is_accepted(script, words):
    """Every option exists and may have that value."""
    if "experiment=tune" in words:
        pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    assert prepare([*shlex.split(words), "tracking=off"], "sweep")


def test_commands_on_a_text_of_ones_own_are_accepted(tmp_path, monkeypatch):
    """Those of docs/text.md, where the folders that they name are."""
    rows = "".join(
        f'{{"text": "{"words " * 99}", "content": "{"words " * 99}"}}\n' for _ in range(600)
    )
    for folder in ("text", "fineweb/sample/10BT"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "some.jsonl").write_text(rows)
    (tmp_path / "my-llama").mkdir()
    (tmp_path / "my-llama" / "config.json").write_text('{"model_type": "llama"}')
    monkeypatch.chdir(tmp_path)
    found = re.findall(
        r"^python runners/\w+\.py (.*data=\./.*)$", (DOCS / "text.md").read_text(), re.M
    )
    assert len(found) == 4
    for words in found:
        assert "data=files" in prepare([*shlex.split(words), "tracking=off"], "sweep")
