"""Texts of the field's perplexity tables: WikiText-2, PTB, C4, each described by a YAML file.

`conf/eval/texts/<name>.yaml` says where a text is on the hub and which field holds it;
`eval.data_dir` replaces the hub by `<data_dir>/<name>/<split>.jsonl`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from runners.corpus.source import Document
from runners.errors import UserError

log = logging.getLogger(__name__)

DESCRIPTIONS = Path(__file__).resolve().parents[2] / "conf" / "eval" / "texts"


def known_texts() -> list[str]:
    """Names that `eval.texts` may hold."""
    return sorted(path.stem for path in DESCRIPTIONS.glob("*.yaml"))


def describe_text(name: str) -> dict[str, Any]:
    """Hub path, configuration, revision, split, field and number of documents of a text.

    Raises:
        UserError: unknown name.
    """
    path = DESCRIPTIONS / f"{name}.yaml"
    if not path.is_file():
        raise UserError(f"unknown text {name!r} in eval.texts; known: {', '.join(known_texts())}")
    described: dict[str, Any] = yaml.safe_load(path.read_text())
    return described


def text_file(name: str, data_dir: Path) -> Path:
    """Where a data folder keeps a text."""
    return data_dir / name / f"{describe_text(name)['split']}.jsonl"


def missing_texts(names: Sequence[str], data_dir: Path) -> list[str]:
    """Files that are needed and absent; an absent optional text is left out of the record."""
    absent = [name for name in names if not text_file(name, data_dir).is_file()]
    return [
        f"{name}/{text_file(name, data_dir).name}"
        for name in absent
        if not describe_text(name)["optional"]
    ]


def present_texts(names: Sequence[str], data_dir: Path | None) -> list[str]:
    """Names less the optional ones that the data folder lacks, which the log names."""
    if data_dir is None:
        return list(names)
    kept = [name for name in names if text_file(name, data_dir).is_file()]
    for name in sorted(set(names) - set(kept)):
        log.warning("no perplexity on %s: %s is not there", name, text_file(name, data_dir))
    return kept


def load_text(name: str, data_dir: Path | None) -> list[Document]:
    """Documents of a text.

    Raises:
        UserError: unknown name; a file or network that is missing; a record without the field.
    """
    described = describe_text(name)
    if data_dir is not None:
        rows = _read_lines(text_file(name, data_dir), described["field"])
    else:
        rows = _read_hub(described)
    documents: list[Document] = []
    for text in rows:
        if described["documents"] is not None and len(documents) >= described["documents"]:
            break
        documents.append(Document(f"{name}-{len(documents)}", text))
    if not documents:
        raise UserError(f"eval.texts: {name} holds no document")
    return documents


def _read_lines(path: Path, field: str) -> Iterator[str]:
    """Texts of a JSON Lines file, from the hub's field or one named `text`."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"eval.data_dir lacks {path.parent.name}/{path.name}") from error
    for number, line in enumerate(lines, start=1):
        try:
            record: Mapping[str, Any] = json.loads(line)
            yield str(record[field] if field in record else record["text"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}, line {number}: no JSON object with a field {field!r}"
            ) from error


def _read_hub(described: Mapping[str, Any]) -> Iterator[str]:
    import datasets

    path, field = described["path"], described["field"]
    try:
        rows = datasets.load_dataset(
            path,
            described["config_name"],
            data_files=described["data_files"],
            split=described["split"],
            revision=described["revision"],
            streaming=True,
        )
        for row in rows:
            yield str(row[field])
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"cannot read {path}: {reason} (without a network: eval.data_dir=<folder>, filled by "
            "runners/fetch.py on a machine that has one)"
        ) from error
