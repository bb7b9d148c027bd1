"""Draw models with random weights and a byte tokenizer: for tests, and for speed at real sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from methods.engine.decoder.families import FAMILIES
from runners.errors import UserError


def tiny_model(*, family: str = "llama", seed: int = 0) -> tuple[Any, Any]:
    """A random model of a family (4 layers, width 64) and a byte tokenizer, without a download.

    Raises:
        UserError: unknown family.
    """
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 2048,
        "initializer_range": 0.1,
        "tie_word_embeddings": True,
    }
    if family in FAMILIES and FAMILIES[family].experts:
        sizes |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    return random_model(family=family, sizes=sizes, seed=seed)


def random_model(
    *, family: str, sizes: Mapping[str, Any], seed: int, device: Any = "cpu", dtype: Any = None
) -> tuple[Any, Any]:
    """A model with random weights and a byte tokenizer, in evaluation mode.

    Args:
        sizes: fields of the Hugging Face config; the vocabulary is the tokenizer's unless given.
        dtype: float32 unless given.

    Raises:
        UserError: unknown family.
    """
    if family not in FAMILIES:
        raise UserError(f"unknown model family {family!r}; known: {', '.join(sorted(FAMILIES))}")
    tokenizer = byte_tokenizer()
    special = ("pad_token_id", "bos_token_id", "eos_token_id")
    config = AutoConfig.for_model(
        family,
        **{
            "vocab_size": len(tokenizer),
            **{name: getattr(tokenizer, name) for name in special},
            **sizes,
        },
    )
    place = torch.device(device)
    devices = [place] if place.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), place:
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype or torch.float32)
    return model.to(place).eval(), tokenizer


def byte_tokenizer() -> Any:
    """256 bytes after <pad>, <bos> and <eos>; no merges, built in memory."""
    special = ["<pad>", "<bos>", "<eos>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )
