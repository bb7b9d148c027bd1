"""The real method configs, shrunk, and small random models of every family."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from methods.base import Method
from methods.engine.decoder.families import FAMILIES
from runners.base_model.load import build_budget
from runners.corpus.rows import ProbeText
from runners.point import build_method
from runners.point_config import PointConfig
from runners.training.loop import Loop
from runners.training.probe import ModelProbe
from tests.conftest import CONF, compose_tiny, token_rows

METHODS = sorted(path.stem for path in (CONF / "method").glob("*.yaml"))
SMALL = {"rank": 4, "router_width": 8, "neurons": 6}


def method_config(name: str, *overrides: str) -> dict[str, Any]:
    """A resolved point of a real method config, its modules small enough for the tiny model."""
    config = compose_tiny(f"method={name}", *overrides)
    options = config["method"]
    for key in SMALL.keys() & options.keys():
        options[key] = SMALL[key]
    if "router" in options and "width" in options["router"]:
        options["router"]["width"] = SMALL["router_width"]
    return config


@pytest.fixture(params=METHODS)
def config(request: pytest.FixtureRequest) -> dict[str, Any]:
    return method_config(request.param, "sparsity=0.4")


@pytest.fixture(params=sorted(FAMILIES))
def family_model(request: pytest.FixtureRequest) -> PreTrainedModel:
    """Each supported family in turn."""
    return small_model(request.param)


PLAIN = ("llama", "mistral", "qwen2", "qwen3")
"""Families that every path covers."""
HEADS_OF_WIDTH = ("qwen2",)
"""Families whose heads are as wide as the model together."""
OWN: dict[str, dict[str, Any]] = {
    "gemma2": {"query_pre_attn_scalar": 10, "attn_logit_softcapping": 4.0},
    "gemma3_text": {"query_pre_attn_scalar": 10, "sliding_window_pattern": 2},
    "granite": {
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.4,
        "residual_multiplier": 0.6,
        "logits_scaling": 2.5,
        "mlp_bias": True,
    },
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "phi3": {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 20,
        "mlp_only_layers": [1],
    },
    "smollm3": {"no_rope_layer_interval": 2, "mlp_bias": True},
}
"""What a family's config says that others do not: none of it neutral."""
BIASED = ("gemma2", "gemma3_text", "granite", "olmo2", "qwen3_moe", "smollm3")


def small_model(
    family: str = "llama", *, layers: int = 2, width: int = 32, **options: Any
) -> PreTrainedModel:
    """Frozen, float32, grouped heads, no end-of-text token.

    Head sizes differ from width / heads where the family allows it, norms and biases from their
    neutral start, so a mix-up of sizes, norms or projections shows.
    """
    sizes: dict[str, Any] = {
        "vocab_size": 61,
        "hidden_size": width,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": width // 4 if family in HEADS_OF_WIDTH else 12,
        "initializer_range": 0.2,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
        "attention_bias": family in BIASED,
    }
    config = AutoConfig.for_model(family, **{**sizes, **OWN.get(family, {}), **options})
    torch.manual_seed(11)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    frozen: PreTrainedModel = model.eval().requires_grad_(False)
    return frozen


def small_ids(*shape: int, seed: int = 0) -> torch.Tensor:
    """Token ids of `small_model`, special ones left out."""
    return torch.randint(3, 61, shape, generator=torch.Generator().manual_seed(seed))


def probe_for(model: PreTrainedModel, method: Method) -> ModelProbe:
    """Random byte rows for every question, for the tiny model of the configs."""
    text = ProbeText(
        train=token_rows(16, 32),
        calibration=token_rows(32, 32, seed=1),
        sensitivity=token_rows(2, 32),
    )
    return ModelProbe(model, method, text)


Train = Callable[[dict[str, Any], PreTrainedModel], Method]


@pytest.fixture
def trained() -> Train:
    """Run a method's whole recipe on random text, calibration included."""

    def run(config: dict[str, Any], model: PreTrainedModel) -> Method:
        method = build_method(PointConfig.parse(config), model)
        probe = probe_for(model, method)
        loop = Loop(
            model,
            method,
            probe,
            lambda stage: token_rows(8, stage.seq_len, seed=4),
            objective=config["objective"],
            seed=0,
        )
        method.fit(probe)
        for stage in method.stages(build_budget(PointConfig.parse(config).budget)):
            loop.run(stage)
        method.calibrate(probe, method.sparsity)
        return method

    return run
