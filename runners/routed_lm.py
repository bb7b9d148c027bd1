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
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lm_eval.api.registry import register_model

from methods.engine.checkpoint import BadCheckpoint, from_pretrained
from methods.engine.routed import routed
from runners.base_model import device_map as places
from runners.base_model.load import Base, load_base
from runners.corpus.rows import ProbeText, encoder, load_rows
from runners.errors import UserError
from runners.evaluation.harness import HarnessModel
from runners.options import parse_value
from runners.point_config import (
    DataConfig,
    Dtype,
    Mode,
    ModelConfig,
    PlacementConfig,
    Share,
    read_saved,
    saved_model,
)
from runners.training.probe import ModelProbe

log = logging.getLogger(__name__)


@register_model("routed")
class RoutedLM(HarnessModel):
    """A saved routed model, routed for the life of this object.

    Args:
        pretrained: folder with routed.json and routed.safetensors.
        base_model: hub id or folder of the base model; None for the one that the folder names.
        mode: gathered computes what is executed; masked computes all and blends.
        sparsity: None keeps the saved threshold; a number moves it to that target on calibration
            text.
        calibration_dir: folder with calibration or training text as for `data.dir`; None for the
            embedded addresses of the 1990s.
        calibration_tokens, calibration_seq_len: how much of it is read, and the length of a row.
        dtype, device, batch_size: as in lm-eval; dtype auto is the project's choice.
        device_map: for a base model larger than one device, as in `conf/score.yaml`.
        cache_dir: of the embedded model.
        options: as for `HarnessModel` and lm-eval's `hf`.

    Raises:
        UserError: a folder, model or value that cannot be used.
    """

    def __init__(
        self,
        pretrained: str,
        *,
        base_model: str | None = None,
        mode: str = "gathered",
        sparsity: float | None = None,
        calibration_dir: str | None = None,
        calibration_tokens: int = 8192,
        calibration_seq_len: int = 512,
        dtype: str = "auto",
        device: str | None = None,
        device_map: str | None = None,
        batch_size: int | str = 1,
        cache_dir: str | None = None,
        trust_remote_code: bool = False,
        **options: Any,
    ) -> None:
        parse_value(Mode, mode, "mode")
        parse_value(Dtype, dtype, "dtype")
        parse_value(Share | None, sparsity, "sparsity")
        base = base_of(
            pretrained,
            base_model=base_model,
            dtype=dtype,
            device=device,
            device_map=device_map,
            cache_dir=cache_dir,
            trust_remote_code=trust_remote_code,
        )
        try:
            method = from_pretrained(pretrained, base.model)
        except BadCheckpoint as error:
            raise UserError(str(error)) from error
        if sparsity is not None:
            rows = load_rows(
                DataConfig(dir=calibration_dir),
                "calibration",
                encoder(base.tokenizer),
                seq_len=calibration_seq_len,
                tokens=calibration_tokens,
            )
            text = ProbeText(train=rows, calibration=rows, sensitivity=rows)
            method.calibrate(ModelProbe(base.model, method, text), float(sparsity))
        self._routed = ExitStack()
        self._routed.enter_context(routed(base.model, method, mode))  # type: ignore[arg-type]
        super().__init__(base.model, base.tokenizer, batch_size=batch_size, **options)


def base_of(
    folder: str,
    *,
    base_model: str | None = None,
    dtype: str = "auto",
    device: str | None = None,
    device_map: str | None = None,
    cache_dir: str | None = None,
    trust_remote_code: bool = False,
) -> Base:
    """The dense model that a saved routed model was trained on, or `base_model`.

    Raises:
        UserError: a folder without a saved routed model, or a base that cannot be loaded.
    """
    settings = read_saved(Path(folder))
    model = {**saved_model(settings, base_model), "trust_remote_code": trust_remote_code}
    placement = PlacementConfig(device or "auto", dtype, device_map, None)  # type: ignore[arg-type]
    places.check(placement, None, merge_lora=False, here=True)
    base = load_base(ModelConfig(**model), placement, settings["base"]["seed"], cache_dir)
    if settings["base"]["weights_sha256"] != base.weights_hash:
        log.warning("%s was trained on other weights (or another dtype) than these", Path(folder))
    return base


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
