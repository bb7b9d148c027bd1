"""docs/errors.md is true: what a row speaks of is done here, and has to say what the row says."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
from collections.abc import Callable
from dataclasses import replace
from importlib import util
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
import torch
from omegaconf import OmegaConf
from pyarrow import parquet

from analysis import cli, frames, speedup
from analysis.frames import AnalysisError
from methods.base import Stage
from methods.engine.decoder import families
from methods.engine.decoder.placement import place_on_devices
from methods.engine.model import RoutedModel
from methods.random import Random
from runners import job, point
from runners.base_model import device_map
from runners.base_model.load import Base
from runners.base_model.saved import require_weights
from runners.base_model.synthetic import tiny_model
from runners.corpus.source import _hub_split, check_source
from runners.errors import UserError
from runners.launching import command_line, points
from runners.launching.points import CommandLine
from runners.point_config import DataConfig, PlacementConfig, PointConfig
from runners.runtime import workers
from runners.runtime.signals import Interrupted
from runners.store.files import disk_error
from runners.store.record import Record
from runners.store.run_folder import RunFolder
from runners.store.stage_cache import StageCache
from runners.tracking.base import Safe
from runners.training.state import Batches, Checkpoint
from tests.analysis.store import write_point
from tests.conftest import ROOT, compose_tiny
from tests.methods.conftest import small_model
from tests.runners.faults.test_survive_loop import limited, train

PAGE = (ROOT / "docs/errors.md").read_text()
MESSAGES = [
    message
    for row in re.findall(r"^\| (.*?) \|", PAGE, re.M)[2:]
    for message in re.findall(r"`([^`]+)`", row)
]


class Scene:
    """Where a message is provoked."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.patch = tmp_path, monkeypatch

    def processes(self, number: int) -> None:
        """As one of several that were launched together."""
        self.patch.setenv("WORLD_SIZE", str(number))

    def gpus(self, number: int) -> None:
        self.patch.setattr("torch.cuda.device_count", lambda: number)

    def config(self, *words: str) -> dict[str, Any]:
        places = (f"results_dir={self.folder / 'results'}", f"cache_dir={self.folder / 'cache'}")
        return compose_tiny(*places, *words)


Provoke = Callable[[Scene], Any]


def command(*words: str, entry: str = "sweep", processes: int = 1, gpus: int = 0) -> Provoke:
    """The words of a command; FOLDER is that of the test."""

    def run(scene: Scene) -> None:
        scene.processes(processes)
        scene.gpus(gpus)
        fixed = [] if entry == "score" else ["model=tiny"]
        own = [word.replace("FOLDER", str(scene.folder)) for word in words]
        fixed = [word for word in fixed if not any(w.startswith("model=") for w in own)]
        command_line.prepare([*fixed, "tracking=off", *own], entry)

    return run


def text(content: Any, name: str, *words: str) -> Provoke:
    """A command on a folder with one text file: a table, or what the file holds."""

    def run(scene: Scene) -> None:
        if isinstance(content, dict):
            parquet.write_table(pa.table(content), scene.folder / name)
        elif content is not None:
            (scene.folder / name).write_bytes(content)
        command("data=files", "data.dir=FOLDER", *words)(scene)

    return run


def lines(number: int) -> bytes:
    return b"".join(b'{"text": "the people of this union %d"}\n' % n for n in range(number))


def hub(raised: Exception | None = None, **options: Any) -> Provoke:
    """A data set of the hub: a folder in its form, or a hub that does not answer."""

    def run(scene: Scene) -> None:
        def refuse(*_: Any, **__: Any) -> None:
            assert raised is not None
            raise raised

        _hub_split.cache_clear()
        if raised is not None:
            scene.patch.setattr(datasets, "load_dataset", refuse)
        folder = scene.folder / "set"
        folder.mkdir()
        if options.pop("script", False):
            (folder / "set.py").write_text("import datasets\n")
        else:
            parquet.write_table(pa.table({"text": ["a", "b"]}), folder / "train.parquet")
        splits = {"train": "train", "calibration": "train", "test": "train"}
        splits |= options.pop("splits", {})
        check_source(DataConfig(source="hub", path=str(folder), splits=splits, **options))

    return run


def places(asked: dict[str, Any]) -> Provoke:
    def run(scene: Scene) -> None:
        model, _ = tiny_model()
        found = device_map.asked(PlacementConfig("auto", "auto", asked, None))
        assert found is not None
        device_map.layout(model, found)

    return run


def saves_too_little(scene: Scene) -> None:
    config = PointConfig.parse(scene.config("method=d_llm", "target=flops", "sparsity=0.9"))
    point.build_method(config, tiny_model()[0])


def out_of_reach(scene: Scene) -> None:
    config = PointConfig.parse(scene.config("method=mod", "sparsity=0.7"))
    model, _ = tiny_model()
    point.check_reach(point.build_method(config, model), "mod")


def no_hadamard_matrix(scene: Scene) -> None:
    config = PointConfig.parse(scene.config("method=linear_patch", "sparsity=0.5"))
    point.build_method(config, small_model(width=52))


def another_family(scene: Scene) -> None:
    (scene.folder / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    command("model=FOLDER")(scene)


def unwritable(scene: Scene) -> None:
    (scene.folder / "file").touch()
    command("results_dir=FOLDER/file/results")(scene)


def shared_module(scene: Scene) -> None:
    """HeRo's layers share a module; the model seems to lie on two devices."""
    config = PointConfig.parse(scene.config("method=hero", "sparsity=0.2"))
    model, _ = tiny_model()
    method = point.build_method(config, model)
    devices = [torch.device("cpu"), torch.device("meta")] * 2
    scene.patch.setattr("methods.engine.decoder.placement.placed", lambda model: True)
    scene.patch.setattr("methods.engine.decoder.placement.layer_devices", lambda model: devices)
    place_on_devices(model, method)


def several_gpus(scene: Scene) -> None:
    point.check_gradients("informed", [Stage("routers", loss=sum)])


def few_rows(scene: Scene) -> None:
    Batches(torch.zeros(2, 8, dtype=torch.long), 3, torch.device("cpu"))


def no_tensorboard(scene: Scene) -> None:
    real = util.find_spec
    scene.patch.setattr(util, "find_spec", lambda n, *a: None if n == "tensorboard" else real(n))
    command("tracking=tensorboard")(scene)


def no_key(scene: Scene) -> None:
    scene.patch.delenv("WANDB_API_KEY", raising=False)
    scene.patch.setenv("HOME", str(scene.folder))
    command("tracking=wandb", "tracking.mode=online")(scene)


def no_launcher(scene: Scene) -> None:
    scene.patch.setattr(points, "find_spec", lambda name: None)
    command("hydra/launcher=joblib", "-m")(scene)


def disk(number: int) -> Provoke:
    def run(scene: Scene) -> None:
        raise disk_error(scene.folder / "x", OSError(number, os.strerror(number)))

    return run


def damaged(scene: Scene) -> None:
    cache = StageCache(scene.folder)
    cache.value("key", lambda: {"a": 1})
    file = cache.values / "key.json"
    file.write_bytes(file.read_bytes()[:-4])
    assert cache.value("key", lambda: {"a": 2}) == ({"a": 2}, False)


def no_checkpoint(scene: Scene) -> None:
    (scene.folder / "file").touch()
    Checkpoint(scene.folder / "file" / "x", 0.0).save({"a": torch.zeros(1)}, {})


def stopped(scene: Scene) -> None:
    with pytest.raises(Interrupted), job._caught("informed"):
        raise Interrupted(signal.SIGTERM)


def no_row_fits(scene: Scene) -> None:
    limited(scene.patch, 0)
    model, _ = tiny_model(seed=3)
    train(model.eval().requires_grad_(False))


def failed_before(scene: Scene) -> None:
    config = PointConfig.parse(scene.config("retry_failed=false"))
    folder = RunFolder(scene.folder)
    folder.fail(Record(**config.identity, status="failed", reason="of disk"))
    job._to_skip(config, folder)


def complete(scene: Scene) -> None:
    cfg = OmegaConf.create(scene.config("method=random"))
    config = PointConfig.parse(job.resolve(cfg))
    folder = RunFolder(scene.folder / "results" / config.fingerprint)
    folder.begin(config.redacted)
    folder.complete(Record(**config.identity))
    job.run_point(cfg)


def speed_of_two(scene: Scene) -> None:
    scene.processes(2)
    scene.patch.setattr(workers, "failed_points", [])
    with pytest.raises(SystemExit):
        job.measure_speed(OmegaConf.create(scene.config("method=random")))


def no_record(scene: Scene) -> None:
    frames.Store(scene.folder)


def nothing_timed(scene: Scene) -> None:
    write_point(scene.folder, "informed", 0.3, perplexity=30.0)
    cli.write(speedup.VIEW, cli.Paths(scene.folder, scene.folder))


def two_dense_models(scene: Scene) -> None:
    for target in (0.3, 0.5):
        write_point(scene.folder, "informed", target, perplexity=30.0)
    file = next(scene.folder.glob("*0.5*/result.json"))
    file.write_text(file.read_text().replace('"dense": 20.0', '"dense": 21.0'))
    frames.Store(scene.folder)


def wrong_family(scene: Scene) -> None:
    line = replace(families.FAMILIES["llama"], mlp_norm=None)
    scene.patch.setitem(families.FAMILIES, "llama", line)
    point.build_method(PointConfig.parse(scene.config()), tiny_model(seed=3)[0])


def other_weights(scene: Scene) -> None:
    base = Base(*tiny_model(seed=3), "a", "mine", None)
    require_weights("saved", base, trained_on="b", check=True)


def uncalibrated(scene: Scene) -> None:
    model, tokenizer = tiny_model(seed=3)
    RoutedModel(model, tokenizer, Random(sparsity=0.5)).generate("a", max_new_tokens=1)


def tracker_that_fails(scene: Scene) -> None:
    Safe(object()).log({"a": 1.0})  # type: ignore[arg-type]


DRIFTED = Record(
    *("random", "", "tiny", "sotu", 0, 0.4),
    sparsity_realised=0.33,
    realised={"achievable": 0.4, "calibration": 0.4},
)
TWO_ROWS = tuple(f"budget.{stage}.batch_size=2" for stage in ("routers", "lora"))
SMALL = ("budget.seq_len=4", "eval.tasks=[]")
CASES: dict[str, Provoke] = {
    "unknown method": command("method=informd"),
    "unknown model": command("model=nope"),
    "unknown data": command("data=nope"),
    "unknown option": command("+sparcity=0.3"),
    "... must be one of": command("mode=fast"),
    "... must be a whole": command("budget.routers.steps=0"),
    "unknown flag": command("--multrun"),
    "--cfg and --info": lambda scene: CommandLine(["--cfg", "job", "-m"], "sweep").check_keys(),
    "several values": command("sparsity=0.1,0.2"),
    "sparsity must": command("sparsity=30"),
    "method ...: sparsity": out_of_reach,
    "method ...: target=flops": saves_too_little,
    "method linear_patch: no Hadamard": no_hadamard_matrix,
    "no adapter": another_family,
    "cannot write results_dir": unwritable,
    "device_map must be": command("device_map=everywhere"),
    "a place is": command("device_map={lm_head:tpu}"),
    "max_memory must": command("device_map=auto", "max_memory=20GiB"),
    "max_memory.cpu": command("device_map=auto", "max_memory={cpu:much}"),
    "max_memory takes": command("device_map=auto", "max_memory={disk:1GiB}"),
    "max_memory does": command("max_memory={cpu:1GiB}"),
    "max_memory goes": command("device_map={model:cpu,lm_head:cpu}", "max_memory={cpu:1GiB}"),
    "device_map, max_memory": command("device_map={model:0,lm_head:0}"),
    "device_map or max_memory": command("device_map={model:2,lm_head:0}", gpus=2),
    "device=cpu, but": command("device=cpu", "device_map={model:0,lm_head:0}", gpus=2),
    "device=cuda:1": command("device='cuda:1'", "device_map=auto", gpus=2),
    "device_map places": command("device_map=auto", *TWO_ROWS, processes=2),
    "merge_lora=true": command("device_map=auto", "merge_lora=true"),
    "speed.graphs=true": command("device_map=auto", "speed.graphs=true"),
    "speed.graphs=true needs a model": command("device=cpu", "speed.graphs=true"),
    "device_map names": places({"": "cpu", "model.layer.0": "disk"}),
    "device_map has": places({"model": "cpu"}),
    "device_map splits": places({"": 0, "model.layers.1.mlp": 1}),
    "device_map: ": places({"": "cpu", "lm_head": "disk"}),
    "layers share": shared_module,
    "method ... trains": several_gpus,
    "the training text": few_rows,
    "the ... text has": text(lines(60), "train.jsonl", "budget.seq_len=9999", "eval.tasks=[]"),
    "data.dir=... holds": text(None, "", *SMALL),
    "... has no column": text({"content": ["a"], "n": [1]}, "train.parquet", *SMALL),
    "..., line": text(lines(40) + b"no json\n", "train.jsonl", *SMALL),
    "..., line ...: no CSV": text(b"text\na, b\n", "train.csv", *SMALL),
    "..., line ... is no UTF-8": text(b"\xe9t\xe9\n", "train.txt", *SMALL),
    "..., row": text({"text": ["a", None] * 40}, "train.parquet", *SMALL),
    "... cannot be read as Parquet": text(b"PAR1 torn", "train.parquet", *SMALL),
    "... cannot be read as JSON": text(b"no zip", "train.jsonl.gz", *SMALL),
    "no documents in": text(lines(1), "train.jsonl", *SMALL),
    "cannot read data set ...: Couldn't": hub(ConnectionError("Couldn't reach it")),
    "data set ... has no split": hub(splits={"test": "dev"}),
    "cannot read data set ...: Builder": hub(config_name="en"),
    "cannot read data set ...: Dataset": hub(script=True),
    "continuation_choice": text(lines(40), "train.jsonl", "budget.seq_len=4"),
    "eval.data_dir": command("eval.data_dir=FOLDER", "eval.tasks=[piqa]"),
    "tracking.mode=online": no_key,
    "tracking=tensorboard": no_tensorboard,
    "no space left": disk(errno.ENOSPC),
    "cannot lock": disk(errno.ENOLCK),
    "hydra/launcher=... needs": no_launcher,
    "sweep stopped": lambda scene: workers.end_points(signal.SIGTERM),
    "... is damaged": damaged,
    "no checkpoint": no_checkpoint,
    "... stopped by": stopped,
    "out of memory": no_row_fits,
    "it did before": failed_before,
    "budget.routers.batch_size": command("budget.routers.batch_size=2", processes=3),
    "hydra/launcher=...: processes": command("hydra/launcher=joblib", "-m", processes=2),
    "speed is measured": speed_of_two,
    "no complete result": no_record,
    "nothing to show": nothing_timed,
    "the dense perplexity": two_dense_models,
    "the adapter of": wrong_family,
    "... was trained on": other_weights,
    "... was never": uncalibrated,
    "recalibrate cannot": command("saved=FOLDER", "+recalibrate=true", entry="score"),
    "saved=...": command("saved=FOLDER", entry="score"),
    "realised": lambda scene: print(DRIFTED.drift),
    "complete in": complete,
    "tracking stopped": tracker_that_fails,
}
"""By how the page's message begins."""


def case_of(message: str) -> str:
    return max((start for start in CASES if message.startswith(start)), key=len)


def test_no_case_is_left_over():
    assert {case_of(message) for message in MESSAGES} == CASES.keys()


@pytest.mark.parametrize("message", MESSAGES)
def test_what_the_page_says(message, tmp_path, monkeypatch, caplog, capsys):
    caplog.set_level("INFO")
    said = ""
    try:
        CASES[case_of(message)](Scene(tmp_path, monkeypatch))
    except (UserError, AnalysisError, ValueError) as error:
        said = str(error)
        assert "\n" not in said
    said += caplog.text + capsys.readouterr().out
    wanted = ".*".join(map(re.escape, message.split("...")))
    assert re.search(wanted, said), said
