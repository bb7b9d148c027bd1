"""lm-eval's Hugging Face model for a dense or routed model.

Scores are those of the stock `hf` class. Three things differ: a routed model is told what padding
is (a router would see it as text, and count it); in float32 a context is computed once for all its
choices; and rolling log-likelihoods hold the logits of a few hundred tokens at a time.

Shapes: R rows of a forward pass, T tokens.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Sequence
from typing import Any

import torch
from lm_eval import utils
from lm_eval.api import model as api_model
from lm_eval.api import task as api_task
from lm_eval.models import huggingface
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from methods.engine.decoder.placement import input_device
from runners.evaluation.perplexity import Window, window_nlls
from runners.evaluation.shared_contexts import Answer, SharedContexts
from runners.runtime.memory import Fitting
from runners.runtime.progress import Bar, progress

log = logging.getLogger(__name__)

Request = tuple[Any, list[int], list[int]]
"""What lm-eval caches the answer under (or None), context and continuation as token ids."""

for module in (api_model, api_task, huggingface):
    module.tqdm = Bar  # type: ignore[attr-defined]  # its own bars fill a log, some without a name


class HarnessModel(HFLM):
    """A built causal LM as lm-eval wants it.

    Args:
        model: dense, or inside a `routed` block.
        batch_size: rows (context and one continuation) of a forward pass; `auto` as in lm-eval.
        share_contexts: compute a context once for all its continuations. None does so in float32,
            where scores are the same to about 1e-5 nats; in half precision rounding depends on the
            shape of a pass, and the stock batches give the stock scores to the bit.
        options: any other argument of lm-eval's `hf` class (`max_length`, `softmax_dtype`, ...).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int | str,
        share_contexts: bool | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            pretrained=model,  # type: ignore[arg-type]
            tokenizer=tokenizer,  # type: ignore[arg-type]
            batch_size=batch_size,
            **options,
        )
        self._device = input_device(model)
        if share_contexts is None:
            share_contexts = next(model.parameters()).dtype == torch.float32
        self.share_contexts = share_contexts and self.batch_size != "auto"
        self.generated_tokens, self.generation_s = 0, 0.0
        """By `generate` so far: the end token included, what follows a row's end not."""
        self._row_lengths: list[int] | None = None
        self.fitting = Fitting(model)

    @property
    def oom_halvings(self) -> int:
        """How often memory did not suffice for a pass, which was then made in parts."""
        return self.fitting.halvings

    def get_model_info(self) -> dict[str, Any]:
        """As in the base class, which asks the hub for a revision; here nothing is asked."""
        model = self.model
        return {"model_num_parameters": model.num_parameters(), "model_dtype": model.dtype}

    @torch.no_grad()
    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in nats, in the windows of the base class.

        The base class holds [rows, max_length, V] logits, tens of GiB for a long context; here
        the head is applied to parts, and the sum is in float64.
        """
        windows = [w for i, request in enumerate(requests) for w in self._windows(i, *request.args)]
        windows.sort(key=lambda window: -len(window.inputs))
        rows = self.batch_size if isinstance(self.batch_size, int) else 1
        totals = [0.0] * len(requests)
        batches = [windows[start : start + rows] for start in range(0, len(windows), rows)]
        for batch in progress(batches, "rolling log-likelihood"):
            nlls = self.fitting.run(batch, lambda part: window_nlls(self.model, part))
            for window, nll in zip(batch, nlls, strict=True):
                totals[window.document] -= nll
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _windows(self, index: int, text: str) -> list[Window]:
        pairs = utils.get_rolling_token_windows(
            token_list=self.tok_encode(text),
            prefix_token=self.prefix_token_id,
            max_seq_len=self.max_length,
            context_len=1,
        )
        windows = []
        for context, continuation in map(utils.make_disjoint_window, pairs):
            inputs = (*context, *continuation)[:-1][-self.max_length :]
            windows.append(Window(index, 0, tuple(inputs), tuple(continuation)))
        return windows

    def _loglikelihood_tokens(
        self,
        requests: Sequence[Request],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[Answer]:
        if not self.share_contexts:
            return self._score_stock(requests, disable_tqdm, override_bs)
        assert isinstance(self.batch_size, int)
        shared = SharedContexts(
            self.model,
            rows_per_pass=self.batch_size,
            max_length=self.max_length,
            softmax_dtype=self.softmax_dtype,
            apart=lambda indices: self._score_stock([requests[i] for i in indices], disable_tqdm),
        )
        answers = shared.score([(context, end) for _, context, end in requests])
        self.fitting.halvings += shared.fitting.halvings
        for (request, _, _), answer in zip(requests, answers, strict=True):
            if request is not None:
                self.cache_hook.add_partial("loglikelihood", request, answer)
        return answers

    def _score_stock(
        self, requests: Sequence[Request], disable_tqdm: bool, override_bs: int | None = None
    ) -> list[Answer]:
        """As in the base class, with smaller batches where memory does not suffice."""

        def score() -> list[Answer]:
            self._row_lengths = self._expected_rows(requests)
            try:
                return base(list(requests), disable_tqdm, override_bs)
            finally:
                self._row_lengths = None

        base = super()._loglikelihood_tokens
        # lm-eval runs its longest rows first, so that a batch that is too large is noticed early
        while True:
            rows = override_bs or self.batch_size
            found = self.fitting.attempt(score, rows != 1)
            if found is not None:
                return found
            largest = rows if isinstance(rows, int) else max(self.batch_sizes.values(), default=2)
            self.batch_size_per_gpu, override_bs = max(1, largest // 2), None
            log.warning(
                "out of memory: evaluation goes on with %d rows a pass", self.batch_size_per_gpu
            )

    def _expected_rows(self, requests: Sequence[Request]) -> list[int]:
        """Input tokens of each row that the base class will run, in its order: longest first.

        It merges requests that differ in their last token alone, because one row answers them.
        """
        inputs = [tuple((context + end)[:-1]) for _, context, end in requests]
        rows = set(inputs) if self.logits_cache else inputs
        return sorted((min(len(row), self.max_length) for row in rows), reverse=True)

    def _model_call(
        self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        """Logits of right-padded rows; a routed model also gets the mask of their real tokens."""
        if self._row_lengths is None or getattr(self.model, "routing", None) is None:
            return super()._model_call(inps, attn_mask, labels)
        rows, longest = inps.shape
        lengths, self._row_lengths = self._row_lengths[:rows], self._row_lengths[rows:]
        assert len(lengths) == rows and lengths[0] == longest, "lm-eval orders its rows otherwise"
        ends = torch.tensor(lengths, device=inps.device)[:, None]
        mask_RT = (torch.arange(longest, device=inps.device) < ends).long()
        with torch.no_grad():
            logits: Tensor = self.model(input_ids=inps, attention_mask=mask_RT).logits
        return logits

    def _detect_batch_size(self, requests: Any = None, pos: int = 0) -> int:
        """As in the base class; its trial passes are dense, so that they are not counted."""
        pending, self._row_lengths = self._row_lengths, None
        routing = getattr(self.model, "routing", None)
        with routing.dense() if routing is not None else contextlib.nullcontext():
            size: int = super()._detect_batch_size(requests, pos)
        self._row_lengths = pending
        return size

    @torch.no_grad()
    def _model_generate(
        self, context: Tensor, max_length: int, stop: list[str], **options: Any
    ) -> Tensor:
        """Rows generated together, or in parts that memory holds; then padded to one length."""
        base, mask = super()._model_generate, options.pop("attention_mask", None)

        def generate(rows: Sequence[int]) -> list[Tensor]:
            own = {} if mask is None else {"attention_mask": mask[list(rows)]}
            return list(base(context[list(rows)], max_length, stop, **own, **options))

        started, pad = time.perf_counter(), int(self.tokenizer.pad_token_id)
        done = self.fitting.run(range(context.shape[0]), generate)
        out = pad_sequence(done, batch_first=True, padding_value=float(pad))
        new = out[:, context.shape[1] :].cpu()
        self.generation_s += time.perf_counter() - started
        self.generated_tokens += _new_tokens(new, pad)
        return out


def _new_tokens(new_RT: Tensor, pad: int) -> int:
    """Generated tokens without the padding behind each row's end; an end token is often the pad."""
    real_RT = new_RT != pad
    last = (real_RT * torch.arange(1, new_RT.shape[1] + 1)).amax(dim=1, keepdim=True)
    ended = last < new_RT.shape[1]
    return int((last + ended).sum()) if new_RT.numel() else 0
