"""Key a point by what its local files hold: a model, a text or tasks that were overwritten.

Hashes are cached by size and time of change: a sweep that is complete still ends in seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from runners.corpus.source import local_files
from runners.evaluation.tasks import local_task_files
from runners.point_config import PointConfig
from runners.store.files import cache_root, content_hash

MODEL_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py")
"""Weights, config, tokenizer and code of a model's folder."""


def with_content(config: PointConfig) -> PointConfig:
    """Add the hashes of the local files that a point reads to what its fingerprint is of."""
    model = Path(config.model.path)
    is_local = config.model.source == "pretrained" and model.is_dir()
    weights = [file for end in MODEL_FILES for file in model.glob(end)] if is_local else []
    tasks = local_task_files(config.eval).values()
    found = {
        "model": {file.name: file for file in weights},
        "data": local_files(config.data),
        # a task's files lie in a folder of its name
        "eval": {"/".join(file.parts[-2:]): file for file in tasks},
    }
    cache_dir = cache_root(config.store.cache_dir)

    def hashes(files: Mapping[str, Path]) -> dict[str, str]:
        return {name: content_hash(file, cache_dir) for name, file in sorted(files.items())}

    content = {part: hashes(files) for part, files in found.items() if files}
    return replace(config, resolved={**config.resolved, "content": content}) if content else config
