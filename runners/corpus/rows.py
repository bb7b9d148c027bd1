"""Token rows for fitting, training and calibration; test text never passes through here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from methods.base import Budget, StageBudget
from runners.corpus.packing import ReadOnce, pack_tokens
from runners.corpus.source import Document, digest
from runners.training.probe import ProbeText


class Texts:
    """Cuts documents into rows without padding, deterministically from the seed.

    Args:
        documents: by split; `train` and `calibration` are read.
        seq_len: tokens per row of the training-free fits and the calibration.
        seed: order of the documents.
        fit_tokens: of train, read by the fits; stages train on the text after them, because a
            forecaster errs less on the tokens that it was solved on.
    """

    def __init__(
        self,
        documents: Mapping[str, Sequence[Document]],
        tokenizer: PreTrainedTokenizerBase | ReadOnce,
        seq_len: int,
        seed: int,
        fit_tokens: int = 0,
    ) -> None:
        once = tokenizer if isinstance(tokenizer, ReadOnce) else ReadOnce(tokenizer)
        self.documents, self.tokenizer = documents, once
        self.seq_len, self.seed, self.fit_tokens = seq_len, seed, fit_tokens

    def for_probe(self, budget: Budget) -> ProbeText:
        """What the probe reads: fit and sensitivity from train, calibration from its own split."""
        train = self._pack("train", budget.fit_tokens, self.seq_len)
        rows = max(1, budget.sensitivity_tokens // self.seq_len)
        calibration = self._pack("calibration", budget.calibration_tokens, self.seq_len)
        return ProbeText(train=train, calibration=calibration, sensitivity=train[:rows])

    def rows(self, budget: StageBudget) -> Tensor:
        """Training rows of a stage, int64 [n, seq_len]: its token budget, or all the text."""
        wanted = max(1, budget.tokens // budget.seq_len)
        return self._pack("train", self.fit_tokens + budget.tokens, budget.seq_len)[-wanted:]

    def digest(self, budget: Budget) -> str:
        """Hash of all that this class can return under a budget: the text and how it is cut."""
        probe = self.for_probe(budget)
        texts = [[d.text for d in self.documents[name]] for name in ("train", "calibration")]
        parts = [probe.train, probe.calibration, *texts]
        return "-".join(digest(part)[:16] for part in parts)

    def _pack(self, split: str, tokens: int, seq_len: int) -> Tensor:
        return pack_tokens(
            self.documents[split],
            self.tokenizer,
            seq_len=seq_len,
            max_tokens=max(tokens, seq_len),
            seed=self.seed,
        )
