"""ReplaceMe: a linear map of the MLP's output before the cut stands for the layers cut out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from methods.base import Decision, Probe, RouteContext, Site, UnitView
from methods.options import Count, NonNegative, Positive, Sparsity
from methods.parts.layer_cut import LayerCut
from methods.parts.ridge import Moments


class ReplaceMe(LayerCut):
    """Replace layers i .. j by T, with (h_i - m_i) + m_i T near h_j (arXiv 2505.02819).

    h_i and h_j are the streams before and after the cut, m_i what the MLP before it added.
    Training-free in the paper's words: T is solved or fitted on streams of the dense model, and
    nothing is trained through it. Published, T is folded into that MLP's down projection; here it
    is a product of its own, which counts 2 D D FLOPs a token.

    Args:
        fit: `lstsq` is least squares in float64; `cosine` descends on 1 - cosine from the identity.
        damping: ridge penalty of `lstsq`, relative to the mean square of m (published: 0).
        tokens: that `cosine` holds in memory, at most.
        epochs: of `cosine` over them.
        batch_tokens: of a step of `cosine`.
        lr: of `cosine`, Adam.
    """

    paper = "arXiv 2505.02819"

    def __init__(
        self,
        *,
        sparsity: Sparsity,
        fit: Literal["lstsq", "cosine"] = "lstsq",
        damping: NonNegative = 0.0,
        tokens: Count = 65536,
        epochs: Count = 10,
        batch_tokens: Count = 1024,
        lr: Positive = 1e-4,
    ) -> None:
        super().__init__(sparsity=sparsity)
        self.objective, self.damping, self.tokens = fit, damping, tokens
        self.epochs, self.batch_tokens, self.lr = epochs, batch_tokens, lr

    def fixed(self) -> Mapping[Site, bool]:
        """As the cut says; the MLP before it is asked, so that its input can be kept."""
        first, end = self._cut()
        before = Site(first - 1, "mlp")
        return {s: runs for s, runs in super().fixed().items() if s != before or first == end}

    def route(self, site: Site, x_BTD: Tensor, ctx: RouteContext) -> Decision:
        """Execute every token, and keep the stream that enters."""
        ctx.memory["entering"] = ctx.residual_BTD
        return self.decide(torch.full(x_BTD.shape[:2], torch.inf, device=x_BTD.device))

    def _reads(self, ctx: RouteContext) -> Tensor:
        entering: Tensor = ctx.memory["entering"]
        return ctx.residual_BTD - entering.to(ctx.residual_BTD.device)

    def _fit(self, probe: Probe) -> None:
        if self.objective == "lstsq":
            self._solve(probe)
        else:
            self._descend(probe)

    @torch.no_grad()
    def _solve(self, probe: Probe) -> None:
        """T = (MᵀM + lambda I)⁻¹ Mᵀ (h_j - (h_i - m_i)); the shortest one if M lacks rank."""
        width = self.patch.in_features
        sums = Moments(inputs=width, outputs=width, device=self.patch.weight.device)

        def visit(mlp: UnitView, after_ND: Tensor) -> None:
            sums.add(mlp.y_ND, after_ND.float() - mlp.residual_ND.float())

        self._stream(probe, visit)
        sums.xx.diagonal().add_(self.damping * sums.xx.diagonal().mean())
        map_DD = torch.linalg.pinv(sums.xx, hermitian=True) @ sums.xy
        self.patch.weight.copy_(map_DD.T - torch.eye(width).to(map_DD))

    @torch.enable_grad()
    def _descend(self, probe: Probe) -> None:
        """Adam on 1 - cos((h_i - m_i) + m_i T, h_j), from T = I."""
        held: list[Tensor] = []

        def visit(mlp: UnitView, after_ND: Tensor) -> None:
            if sum(rows.shape[1] for rows in held) < self.tokens:
                held.append(torch.stack([mlp.residual_ND, mlp.y_ND, after_ND]).float())

        self._stream(probe, visit)
        rows_3ND = torch.cat(held, 1)[:, : self.tokens].to(self.patch.weight.device)
        nn.init.zeros_(self.patch.weight)
        weight = self.patch.weight.requires_grad_(True)
        adam = torch.optim.Adam([weight], lr=self.lr)
        for _ in range(self.epochs):
            for rows in torch.randperm(rows_3ND.shape[1]).split(self.batch_tokens):
                entering, mlp, after = rows_3ND[:, rows.to(rows_3ND.device)]
                near = entering + mlp + self.patch(mlp)
                loss = 1.0 - functional.cosine_similarity(near, after, dim=-1).mean()
                adam.zero_grad()
                loss.backward()
                adam.step()
        weight.requires_grad_(False).grad = None

    def _fit_bytes(self, tokens: int) -> int:
        if self.objective == "lstsq":
            return super()._fit_bytes(tokens)
        return 3 * 4 * self.patch.in_features * min(tokens, self.tokens)
