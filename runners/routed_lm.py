"""lm-eval's own command line on a saved routed model.

routed_lm --model_args pretrained=results/<fingerprint>/routed --tasks piqa,arc_easy --batch_size 8

lm-eval has no entry point for plug-ins: it finds models in its own registry only, so that this
module, which registers `routed`, has to be imported. The command above does (every option of
`lm_eval` works; `python -m runners.routed_lm` is the same without an installation), or
`import runners.routed_lm` before `lm_eval.simple_evaluate(model="routed", ...)`.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.registry import register_model
from torch import distributed

from methods.engine.checkpoint import hash_model
from methods.engine.routed import routed
from runners.base_model import fsdp
from runners.base_model.saved import open_saved
from runners.corpus.rows import ProbeText, encoder, load_rows
from runners.corpus.source import load_documents
from runners.errors import UserError
from runners.evaluation.builtin_tasks import GENERATORS
from runners.evaluation.harness import HarnessModel
from runners.evaluation.tasks import task_files
from runners.options import parse_section
from runners.point_config import DataConfig, Dtype, Mode, Positive, Share
from runners.runtime.processes import is_main_process, world_size
from runners.store.files import cache_root
from runners.store.stage_cache import content_key
from runners.training.probe import ModelProbe

log = logging.getLogger(__name__)


OWNER = "routebench: the model that gave these answers"
"""Key of a response cache under which it says whose it is."""


@dataclass(frozen=True)
class RoutedOptions:
    """What `--model_args` may say; any other key is refused, because it would do nothing."""

    pretrained: str
    """Folder with routed.json and routed.safetensors."""
    base_model: str | None = None
    """Hub id or folder of the base model; None for the one that the folder names."""
    mode: Mode = "gathered"
    sparsity: Share | None = None
    """None keeps the saved threshold; a number moves it to that target on calibration text."""
    calibration_dir: str | None = None
    """Folder of text as for `data.dir`; None for the embedded addresses of the 1990s."""
    calibration_tokens: Positive = 8192
    calibration_seq_len: Positive = 512
    dtype: Dtype = "auto"
    """`auto` is that of training."""
    check_weights: bool = True
    """False takes a base model of other weights, or in another dtype, than those of training."""
    device: str | None = None
    """As in lm-eval: CUDA that is not there means the CPU."""
    device_map: str | None = None
    """For a base model larger than one device, as in `conf/score.yaml`."""
    cache_dir: str | None = None
    trust_remote_code: bool = False
    trust_method: bool = False
    """True imports a class outside this project that the folder names."""
    batch_size: int | str = 1
    # the following as in `HarnessModel` and lm-eval's `hf`
    max_batch_size: Positive | None = 64
    share_contexts: bool | None = None
    max_length: Positive | None = None
    truncation: bool = False
    logits_cache: bool = True
    softmax_dtype: str | None = None
    prefix_token_id: int | None = None
    think_end_token: str | int | None = None
    enable_thinking: bool | None = None
    chat_template_args: Mapping[str, Any] | None = None


OPENING = (
    "base_model device dtype device_map cache_dir trust_remote_code trust_method check_weights"
).split()
"""Options of `open_saved`."""
PASSED = (
    "batch_size max_batch_size share_contexts max_length truncation logits_cache softmax_dtype "
    "prefix_token_id think_end_token enable_thinking chat_template_args"
).split()
"""Options that the harness takes; all but the first two may change an answer."""


@register_model("routed")
class RoutedLM(HarnessModel):
    """A saved routed model, routed for the life of this object; for options see `RoutedOptions`.

    Processes of `accelerate launch` share out the items, as those of lm-eval's `hf` do.

    Raises:
        UserError: a folder, model or value that cannot be used; an option that does nothing.
    """

    def __init__(self, pretrained: str, **options: Any) -> None:
        own = parse_section(RoutedOptions, {"pretrained": pretrained, **options})
        processes = None if world_size() == 1 else launched(own)
        if processes is not None:
            own = replace(own, device=str(processes.device))
        opened = open_saved(pretrained, **{name: getattr(own, name) for name in OPENING})
        base, method, settings = opened.base, opened.method, opened.settings
        if own.sparsity is not None:
            rows = load_rows(
                DataConfig(dir=own.calibration_dir),
                "calibration",
                encoder(base.tokenizer),
                seq_len=own.calibration_seq_len,
                tokens=own.calibration_tokens,
            )
            text = ProbeText(train=rows, calibration=rows, sensitivity=rows)
            method.calibrate(ModelProbe(base.model, method, text), own.sparsity)
        passed = {name: getattr(own, name) for name in PASSED}
        made = (base.weights_hash, hash_model(method), settings["target"], settings["options"])
        self._answers = content_key(*made, own.mode, [passed[name] for name in PASSED[2:]])
        self._routed = ExitStack()
        self._routed.enter_context(routed(base.model, method, own.mode))
        super().__init__(base.model, base.tokenizer, **passed)
        if processes is not None:
            self.accelerator = processes
            self._rank, self._world_size = processes.process_index, processes.num_processes

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Take a response cache (`--use_cache`) that this model has begun, and no other's.

        lm-eval keys a response by its request alone: a file of another threshold, mode, precision
        or base would answer for this model.

        Raises:
            UserError: the file holds another model's answers.
        """
        held = cache_hook.dbdict
        if held is not None:
            if held.get(OWNER, None if len(held) else self._answers) != self._answers:
                raise UserError("--use_cache: the file holds another model's answers: name another")
            held[OWNER] = self._answers
        super().set_cache_hook(cache_hook)


def launched(options: RoutedOptions) -> Any:
    """Join the processes that were launched together, as accelerate's `Accelerator`.

    Raises:
        UserError: they were to share out the layers.
    """
    from accelerate import Accelerator

    if fsdp.wanted():
        raise UserError("a saved routed model is not sharded: launch it without FSDP")
    return Accelerator(cpu=options.device == "cpu" or not torch.cuda.is_available())


def completed(words: Sequence[str]) -> list[str]:
    """Words of lm-eval's command line, where `routed` is the model unless another is named.

    A task that is built in here, and with `--data_dir <folder>` any single one of lm-eval's, is
    named by a file that is written for it.

    Raises:
        UserError: as `task_files`.
    """
    if words and words[0] in ("ls", "validate"):
        return list(words)
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--model", "-M", default="routed")
    parser.add_argument("--tasks", "-t", nargs="+", default=[])
    parser.add_argument("--num_fewshot", "-f", type=int)
    parser.add_argument("--data_dir")
    given, rest = parser.parse_known_args(words)
    if {"--config", "-C", "--help", "-h"} & set(rest):
        return list(words)
    names = [name for word in given.tasks for name in word.split(",")]
    folder = None if given.data_dir is None else Path(given.data_dir).expanduser().resolve()
    ours = [name for name in names if name in GENERATORS or folder is not None]
    shots = {} if given.num_fewshot is None else dict.fromkeys(ours, given.num_fewshot)
    files = task_files(
        ours,
        load_documents(DataConfig(), "test"),
        seed=0,
        cache_dir=cache_root(None),
        data_dir=folder,
        num_fewshot=shots,
    )
    tasks = ["--tasks", ",".join(str(files.get(name, name)) for name in names)] if names else []
    few = [] if given.num_fewshot is None else ["--num_fewshot", str(given.num_fewshot)]
    start = rest[:1] if rest[:1] == ["run"] else []
    return [*start, "--model", given.model, *tasks, *few, *rest[len(start) :]]


def main() -> None:
    """lm-eval's command line, with `routed` among the models."""
    if "--version" in sys.argv[1:]:
        from runners.launching.command_line import version

        sys.stdout.write(f"{version()}\n")
        return
    from lm_eval.__main__ import cli_evaluate

    try:
        sys.argv[1:] = completed(sys.argv[1:])
        cli_evaluate()
    except UserError as error:
        if is_main_process():
            sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


if __name__ == "__main__":
    main()
