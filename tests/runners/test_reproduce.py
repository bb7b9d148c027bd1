"""The report's command gives a record again: same fingerprint, same numbers."""

from __future__ import annotations

import json
import shlex

import pytest
from hydra.core.hydra_config import HydraConfig

from analysis.frames import Store
from analysis.report_page.records import commands as commands_of
from runners.store.provenance import started_with


@pytest.mark.slow
def test_the_stored_configuration_runs_to_the_same_record(commands):
    first = commands.run("sweep", "method=layer_skip", "sparsity=0.25")
    assert first.code == 0, first.stderr
    store = Store(commands.results)
    (record,), (config,) = store.records, store.configs.values()
    folder = commands.results / record["identity"]["fingerprint"]
    (exact, started) = commands_of(record, config, commands.results)
    assert started[1].startswith("python runners/sweep.py model=tiny")
    assert started[1].endswith("method=layer_skip sparsity=0.25")
    python, script, *words = shlex.split(exact[1])
    assert (python, script) == ("python", "runners/sweep.py")
    again = commands.run("sweep", *words, shrink=False)
    assert again.code == 0, again.stderr
    (path,) = (commands.folder / "reproduced").glob("*/result.json")
    assert path.parent.name == folder.name
    second = json.loads(path.read_text())
    for key in ("perplexity", "sparsity_realised", "flops_ratio", "realised", "threshold"):
        assert second[key] == record[key], key


@pytest.fixture
def hydra_run(monkeypatch):
    """As inside a job of Hydra with these overrides."""

    def make(*words: str) -> None:
        overrides = type("Overrides", (), {"task": list(words)})
        job = type("Job", (), {"name": "sweep"})
        config = type("Config", (), {"overrides": overrides, "job": job})
        monkeypatch.setattr(HydraConfig, "initialized", classmethod(lambda _: True))
        monkeypatch.setattr(HydraConfig, "get", classmethod(lambda _: config))

    return make


def test_command_quotes_and_hides(hydra_run):
    hydra_run("method.targets=[0.3, 0.5]", "+data.hf_token=s3cret", "model.path=https://a:b@c/d")
    line = started_with()
    assert line is not None and "s3cret" not in line and "a:b" not in line
    assert "'method.targets=[0.3, 0.5]'" in line


def test_an_experiment_that_sweeps_runs_one_point(hydra_run):
    hydra_run("experiment=compare", "method=dense")
    assert started_with() == (
        "python runners/sweep.py experiment=compare method=dense hydra.mode=RUN"
    )


def test_without_hydra_there_is_no_command():
    assert not HydraConfig.initialized() and started_with() is None
