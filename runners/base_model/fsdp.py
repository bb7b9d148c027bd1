"""A frozen model's layers spread over the processes that train together (FSDP)."""

from __future__ import annotations

import logging
import os

import torch
from torch import distributed
from transformers import PreTrainedModel

from methods.engine.decoder.families import layers_of

log = logging.getLogger(__name__)


def wanted() -> bool:
    """Whether the launcher's configuration asks for it (`distributed_type: FSDP`)."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def shard(model: PreTrainedModel, device: torch.device) -> None:
    """Keep a share of each decoder layer in each process; a layer is whole while it runs.

    Embeddings, the last norm and the LM head stay whole everywhere: losses read the head's weight
    without calling it. FSDP2 (`fully_shard`), with the options of accelerate's configuration.

    Args:
        model: with all weights, on the host or on `device`.
        device: where the shares go.
    """
    from accelerate.utils import FullyShardedDataParallelPlugin
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    plugin = FullyShardedDataParallelPlugin()
    world = distributed.get_world_size()
    mesh = init_device_mesh(device.type, (world,))
    sharded = [parts.layer for parts in layers_of(model)]
    for layer in sharded:
        fully_shard(
            layer,
            mesh=mesh,
            reshard_after_forward=plugin.reshard_after_forward,
            offload_policy=plugin.cpu_offload,
        )
    held = sum(p.numel() * p.element_size() for layer in sharded for p in layer.parameters())
    log.info("%.3f GB of layers sharded over %d processes", held / 1e9, world)
