"""lm-eval's own command line on a saved routed model.

python -m runners.routed_lm --model routed --model_args pretrained=results/<fingerprint>/routed \
    --tasks piqa,arc_easy --batch_size 8

lm-eval finds models in its registry only, so that this module, which registers `routed`, has to be
imported: by the command above (every option of `lm_eval` works), or by `import runners.routed_lm`
before `lm_eval.simple_evaluate(model="routed", ...)`.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from lm_eval.api.registry import register_model

from methods.engine.checkpoint import hash_model
from methods.engine.routed import routed
from runners.base_model.saved import open_saved
from runners.corpus.rows import ProbeText, encoder, load_rows
from runners.errors import UserError
from runners.evaluation.harness import HarnessModel
from runners.options import parse_section
from runners.point_config import DataConfig, Dtype, Mode, Positive, Share
from runners.runtime.processes import world_size
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

    Raises:
        UserError: a folder, model or value that cannot be used; an option that does nothing.
    """

    def __init__(self, pretrained: str, **options: Any) -> None:
        own = parse_section(RoutedOptions, {"pretrained": pretrained, **options})
        if world_size() > 1:
            raise UserError("a saved routed model is evaluated in one process: start no launcher")
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


def main() -> None:
    """lm-eval's command line, with `routed` among the models."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)


if __name__ == "__main__":
    main()
