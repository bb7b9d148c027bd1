"""A point is keyed by what its local files hold, so that nothing stale is taken for complete."""

from __future__ import annotations

import json
import shutil

import pytest

from runners.content import with_content
from runners.point_config import PointConfig
from tests.conftest import compose_tiny


@pytest.fixture
def folders(tmp_path):
    """A model's, a text's and an evaluation's folder, and the words that name them."""
    for name in ("model", "text", "eval/piqa"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "model" / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "text" / "train.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "eval" / "piqa" / "validation.jsonl").write_text("{}\n")
    local = ["model=pretrained", f"model.path={tmp_path / 'model'}", "eval.tasks=[piqa]"]
    local += ["data=files", f"data.dir={tmp_path / 'text'}", f"eval.data_dir={tmp_path / 'eval'}"]
    return tmp_path, [*local, f"cache_dir={tmp_path / 'cache'}"]


FILES = ["model/model.safetensors", "model/config.json", "text/train.jsonl"]
FILES += ["eval/piqa/validation.jsonl"]


@pytest.mark.parametrize("name", FILES)
def test_another_content_under_the_same_path_is_another_point(folders, name):
    folder, words = folders
    config = PointConfig.parse(compose_tiny(*words))

    def key():
        return with_content(config).fingerprint

    before, content = key(), (folder / name).read_bytes()
    (folder / name).write_bytes(content + b" ")
    assert key() != before
    (folder / name).write_bytes(content)
    assert key() == before


def test_a_point_without_local_files_keeps_its_name():
    config = PointConfig.parse(compose_tiny())
    assert with_content(config).fingerprint == config.fingerprint


def test_a_folder_under_another_name_is_the_same_point(tmp_path):
    """A path is no part of what is computed."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "train.jsonl").write_text('{"text": "some text"}\n')
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    dirs = (tmp_path / "a", tmp_path / "b", tmp_path / "b" / ".." / "a")
    words = [("data=files", f"data.dir={d}", f"cache_dir={tmp_path / 'cache'}") for d in dirs]
    configs = [PointConfig.parse(compose_tiny(*own)) for own in words]
    assert len({with_content(config).fingerprint for config in configs}) == 1
