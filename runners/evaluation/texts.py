"""Read the texts of the field's perplexity tables: WikiText-2, PTB, C4, a YAML file each.

`conf/eval/texts/<name>.yaml` says where a text is on the hub and which field holds it;
`eval.data_dir` replaces the hub by `<data_dir>/<name>/<split>.jsonl`.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from runners.corpus.formats import texts_of
from runners.corpus.source import Document, open_on_hub, reached
from runners.errors import UserError

log = logging.getLogger(__name__)

DESCRIPTIONS = Path(__file__).resolve().parents[2] / "conf" / "eval" / "texts"
FETCHED = "eval.data_dir=<folder filled by runners/fetch.py on a machine that has one>"


def describe_text(name: str) -> dict[str, Any]:
    """Read hub path, configuration, revision, split, field and number of documents of a text.

    Raises:
        UserError: unknown name.
    """
    path = DESCRIPTIONS / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(other.stem for other in DESCRIPTIONS.glob("*.yaml")))
        raise UserError(f"unknown text {name!r} in eval.texts; known: {known}")
    described: dict[str, Any] = yaml.safe_load(path.read_text())
    return described


def text_file(name: str, data_dir: Path) -> Path:
    """Where a data folder keeps a text."""
    return data_dir / name / f"{describe_text(name)['split']}.jsonl"


def missing_texts(names: Sequence[str], data_dir: Path) -> list[str]:
    """List files that are needed and absent; an absent optional text is left out of the record."""
    needed = [text_file(name, data_dir) for name in names if not describe_text(name)["optional"]]
    return [f"{file.parent.name}/{file.name}" for file in needed if not file.is_file()]


def present_texts(names: Sequence[str], data_dir: Path | None) -> list[str]:
    """Leave out the optional texts that the data folder lacks, which the log names."""
    if data_dir is None:
        return list(names)
    files = {name: text_file(name, data_dir) for name in names}
    for name, file in files.items():
        if not file.is_file():
            log.warning("no perplexity on %s: %s is not there", name, file)
    return [name for name, file in files.items() if file.is_file()]


def load_text(name: str, data_dir: Path | None) -> list[Document]:
    """Read the documents of a text.

    Raises:
        UserError: unknown name; a file or network that is missing; a record without the field.
    """
    described = describe_text(name)
    field, limit = described["field"], described["documents"]
    if data_dir is not None:
        texts = list(itertools.islice(texts_of(text_file(name, data_dir), field, "text"), limit))
    else:
        with reached(f"data set {described['path']}", FETCHED):
            options = {key: described[key] for key in ("data_files", "split", "revision")}
            rows = open_on_hub(described["path"], described["config_name"], **options)
            texts = [str(row[field]) for row in itertools.islice(rows, limit)]
    if not texts:
        raise UserError(f"eval.texts: {name} holds no document")
    return [Document(f"{name}-{number}", text) for number, text in enumerate(texts)]
