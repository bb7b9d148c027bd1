"""The language-model head, with what a family does to its logits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Head:
    """Turns final hidden states into the model's own logits, float32.

    Granite divides them (`logits_scaling`), Gemma 2 bends them to a range
    (`final_logit_softcapping`); a loss of the bare projection would be of another model.

    Attributes:
        module: the projection itself.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.module: Any = model.get_output_embeddings()  # type: ignore[operator]
        self.divisor: float = getattr(model.config, "logits_scaling", None) or 1.0
        self.cap: float | None = getattr(model.config, "final_logit_softcapping", None)

    def __call__(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., V]."""
        logits: Tensor = self.module(hidden).float()
        if self.divisor != 1.0:
            logits = logits / self.divisor
        return logits if self.cap is None else (logits / self.cap).tanh() * self.cap

    def pulled_back(self, logits: Tensor, gradient: Tensor) -> Tensor:
        """Gradient at the projection's output, from that at the logits."""
        if self.cap is not None:
            gradient = gradient * (1 - (logits / self.cap).square())
        return gradient / self.divisor if self.divisor != 1.0 else gradient
