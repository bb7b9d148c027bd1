"""Log-likelihoods of continuations with each context computed once.

Multiple choice asks for several continuations of one context. lm-eval runs the context anew for
each; here its keys and values are computed once and copied. Scores are those of separate passes
to float tolerance; in half precision the rounding differs, because a pass has another shape.

Shapes: R rows of a forward pass, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from runners.out_of_memory import Fitting

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


class SharedContexts:
    """Scores (context, continuation) pairs, contexts shared.

    Args:
        model: causal LM, routed or not.
        rows_per_pass: rows (context and one continuation) of a forward pass.
        max_length: tokens that the model reads at most; a longer context is cut on the left.
        softmax_dtype: of the log-probabilities; None for the logits' own.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        rows_per_pass: int,
        max_length: int,
        softmax_dtype: torch.dtype | None,
    ) -> None:
        self.model, self.rows_per_pass = model, rows_per_pass
        self.max_length, self.softmax_dtype = max_length, softmax_dtype
        self.device = next(model.parameters()).device
        self.fitting = {single: Fitting(model) for single in (True, False)}
        """A part is of groups; those with several continuations are larger."""

    @torch.no_grad()
    def score(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Answer]:
        """Answer of each (context, continuation) pair of token ids.

        Raises:
            ValueError: an empty context or continuation, or a continuation longer than the model's
                maximum length.
        """
        groups: dict[Tokens, Group] = {}
        for index, (context, continuation) in enumerate(pairs):
            if not context or not 0 < len(continuation) <= self.max_length:
                raise ValueError("a context or continuation is empty or longer than the model's")
            whole = tuple([*context, *continuation][-(self.max_length + 1) :])
            start, end = whole[: -len(continuation)], whole[-len(continuation) :]
            group = groups.setdefault(start, Group(start))
            group.continuations.setdefault(end, []).append(index)

        answers: list[Answer] = [(0.0, False)] * len(pairs)
        for batch, single in _batches(list(groups.values()), self.rows_per_pass):
            if single:
                scored = self.fitting[True].run(batch, self._score_single)
            else:
                scored = self.fitting[False].run(batch, self._score_shared, self._score_apart)
            askers = [asked for group in batch for asked in group.continuations.values()]
            for indices, answer in zip(askers, scored, strict=True):
                for index in indices:
                    answers[index] = answer
        return answers

    def _score_single(self, groups: Sequence[Group]) -> list[Answer]:
        """One continuation per context: a single pass over both."""
        ends = [next(iter(group.continuations)) for group in groups]
        inputs = [group.context + end[:-1] for group, end in zip(groups, ends, strict=True)]
        ids_RT, mask_RT = _pad(inputs, left=True)
        keep = max(map(len, ends))
        logits = self._forward(ids_RT, mask_RT, logits_to_keep=keep, use_cache=False).logits
        return [self._answer(logits[row, keep - len(end) :], end) for row, end in enumerate(ends)]

    def _score_apart(self, group: Group) -> list[Answer]:
        """A context whose continuations do not fit into memory together."""
        apart = [Group(group.context, {end: []}) for end in group.continuations]
        return self.fitting[True].run(apart, self._score_single)

    @property
    def halvings(self) -> int:
        """How often memory did not suffice."""
        return sum(fitting.halvings for fitting in self.fitting.values())

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
        return [self._answer(logits[i, : len(end)], end) for i, (_, end) in enumerate(rows)]

    def _forward(self, ids_RT: Tensor, mask: Tensor, **options: Any) -> Any:
        positions = (mask.cumsum(1) - 1).clamp_min(0)[:, -ids_RT.shape[1] :]
        return self.model(
            input_ids=ids_RT.to(self.device),
            attention_mask=mask.to(self.device),
            position_ids=positions.to(self.device),
            **options,
        )

    def _answer(self, logits_TV: Tensor, continuation: Tokens) -> Answer:
        """Score of a continuation from the logits that predict it, [tokens, V]."""
        target = torch.tensor(continuation, device=logits_TV.device)
        log_p = torch.log_softmax(logits_TV, dim=-1, dtype=self.softmax_dtype)
        chosen = log_p.gather(1, target[:, None])
        return float(chosen.sum()), bool((logits_TV.argmax(-1) == target).all())


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
