"""lm-eval's Hugging Face model, with padding masked and shared contexts computed once.

The stock class pads on the right without an attention mask (a router would see padding as text,
and count it) and runs a context anew for each of its choices. Scores are the same up to float
tolerance; a test compares them.

Shapes: R rows of a forward pass, T tokens, V vocabulary.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

Tokens = tuple[int, ...]
Answer = tuple[float, bool]
"""Sum of log p of the continuation in nats, and whether greedy decoding would give it."""


@dataclass
class Group:
    """One context and its continuations."""

    context: Tokens
    continuations: dict[Tokens, list[int]] = field(default_factory=dict)
    """Continuation -> requests that ask for it."""

    @property
    def rows(self) -> int:
        """Rows of a pass over the continuations."""
        return len(self.continuations)


class HarnessModel(HFLM):
    """A built causal LM as lm-eval wants it.

    Args:
        batch_size: rows (context and one continuation) of a forward pass.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, batch_size: int
    ) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        self.rows_per_pass = batch_size

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[Answer]:
        """As in the base class, without bars in a log file."""
        answers: list[Answer] = super().loglikelihood(
            requests, disable_tqdm=disable_tqdm or not sys.stderr.isatty()
        )
        return answers

    @torch.no_grad()
    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[Answer]:
        groups: dict[Tokens, Group] = {}
        for index, (_, context, continuation) in enumerate(requests):
            if not context or not 0 < len(continuation) <= self.max_length:
                raise ValueError("a context or continuation is empty or longer than the model's")
            whole = tuple((context + continuation)[-(self.max_length + 1) :])
            start, end = whole[: -len(continuation)], whole[-len(continuation) :]
            group = groups.setdefault(start, Group(start))
            group.continuations.setdefault(end, []).append(index)

        answers: list[Answer] = [(0.0, False)] * len(requests)
        for batch, single in _batches(list(groups.values()), self.rows_per_pass):
            scored = self._score_single(batch) if single else self._score_shared(batch)
            pairs = [pair for group in batch for pair in group.continuations.values()]
            for indices, answer in zip(pairs, scored, strict=True):
                for index in indices:
                    answers[index] = answer
        for (request, _, _), answer in zip(requests, answers, strict=True):
            if request is not None:
                self.cache_hook.add_partial("loglikelihood", request, answer)
        return answers

    def _score_single(self, groups: Sequence[Group]) -> list[Answer]:
        """One continuation per context: a single pass over both."""
        ends = [next(iter(group.continuations)) for group in groups]
        inputs = [group.context + end[:-1] for group, end in zip(groups, ends, strict=True)]
        ids_RT, mask_RT = _pad(inputs, left=True)
        keep = max(map(len, ends))
        logits = self._forward(ids_RT, mask_RT, logits_to_keep=keep, use_cache=False).logits
        return [
            _answer(logits[row, keep - len(end) :], end, self.device)
            for row, end in enumerate(ends)
        ]

    def _score_shared(self, groups: Sequence[Group]) -> list[Answer]:
        """Each context once, then its continuations on copies of its keys and values."""
        context_ids, context_mask = _pad([group.context for group in groups], left=True)
        cache = DynamicCache(config=self.model.config)
        first = self._forward(
            context_ids, context_mask, logits_to_keep=1, use_cache=True, past_key_values=cache
        ).logits
        rows = [(owner, end) for owner, group in enumerate(groups) for end in group.continuations]
        owners = torch.tensor([owner for owner, _ in rows], device=self.device)
        logits = first[owners]
        if max(len(end) for _, end in rows) > 1:
            cache.batch_select_indices(owners)
            ids_RT, mask_RT = _pad([end[:-1] for _, end in rows], left=False)
            mask = torch.cat([context_mask[owners.cpu()], mask_RT], dim=1)
            rest = self._forward(ids_RT, mask, use_cache=True, past_key_values=cache).logits
            logits = torch.cat([logits, rest], dim=1)
        return [_answer(logits[i, : len(end)], end, self.device) for i, (_, end) in enumerate(rows)]

    def _forward(self, ids_RT: Tensor, mask: Tensor, **options: Any) -> Any:
        positions = (mask.cumsum(1) - 1).clamp_min(0)[:, -ids_RT.shape[1] :]
        return self.model(
            input_ids=ids_RT.to(self.device),
            attention_mask=mask.to(self.device),
            position_ids=positions.to(self.device),
            **options,
        )


def _batches(groups: list[Group], rows_per_pass: int) -> Iterator[tuple[list[Group], bool]]:
    """Groups of similar length, at most `rows_per_pass` rows; True marks single continuations."""
    kinds: dict[bool, list[Group]] = defaultdict(list)
    for group in groups:
        kinds[group.rows == 1].append(group)
    for single, members in kinds.items():
        members.sort(key=lambda group: (-len(group.context), group.context))
        batch: list[Group] = []
        for group in members:
            if batch and sum(g.rows for g in batch) + group.rows > rows_per_pass:
                yield batch, single
                batch = []
            batch.append(group)
        if batch:
            yield batch, single


def _pad(sequences: Sequence[Tokens], *, left: bool) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, int64 [R, T]; padding is id 0 and masked."""
    longest = max(map(len, sequences))
    ids = torch.zeros(len(sequences), longest, dtype=torch.long)
    mask = torch.zeros(len(sequences), longest, dtype=torch.long)
    for row, sequence in enumerate(sequences):
        place = slice(longest - len(sequence), longest) if left else slice(0, len(sequence))
        ids[row, place] = torch.tensor(sequence, dtype=torch.long)
        mask[row, place] = 1
    return ids, mask


def _answer(logits_TV: Tensor, continuation: Tokens, device: torch.device) -> Answer:
    """Score of a continuation from the logits that predict it, [tokens, V]."""
    target = torch.tensor(continuation, device=device)
    chosen = torch.log_softmax(logits_TV.float(), dim=-1).gather(1, target[:, None])
    return float(chosen.sum()), bool((logits_TV.argmax(-1) == target).all())
