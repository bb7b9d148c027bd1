"""Least squares from streamed sufficient statistics: full, reduced-rank, single output."""

from __future__ import annotations

import torch
from torch import Tensor


class Moments:
    """Streaming sums for a linear regression of Y on X; float64 totals, float32 products.

    Args:
        inputs: D, outputs: P.
    """

    def __init__(self, *, inputs: int, outputs: int, device: torch.device) -> None:
        self.count = 0
        self.x = torch.zeros(inputs, dtype=torch.float64, device=device)
        self.y = torch.zeros(outputs, dtype=torch.float64, device=device)
        self.xx = torch.zeros(inputs, inputs, dtype=torch.float64, device=device)
        self.xy = torch.zeros(inputs, outputs, dtype=torch.float64, device=device)

    def add(self, x_ND: Tensor, y_NP: Tensor) -> None:
        """Add N observations (any float dtype)."""
        x, y = x_ND.float(), y_NP.float()
        self.count += len(x)
        self.x += x.sum(0)
        self.y += y.sum(0)
        self.xx += x.T @ x
        self.xy += x.T @ y

    def ridge(self, damping: float) -> tuple[Tensor, Tensor, Tensor]:
        """Centred ridge solution in float64.

        Args:
            damping: penalty relative to the mean diagonal of the covariance of X.

        Returns:
            W [D, P] and b [P] with Y ~ X W + b, and the Cholesky factor L of the damped
            covariance sum, L Lᵀ = XᵀX + lambda I.
        """
        n = max(self.count, 1)
        mean_x, mean_y = self.x / n, self.y / n
        cov = self.xx - n * torch.outer(mean_x, mean_x)
        cross = self.xy - n * torch.outer(mean_x, mean_y)
        penalty = damping * cov.diagonal().mean().clamp_min(1e-12)
        cov.diagonal().add_(penalty)
        factor = torch.linalg.cholesky(cov)
        weight = torch.cholesky_solve(cross, factor)
        return weight, mean_y - mean_x @ weight, factor

    def reduced_rank(self, rank: int, damping: float) -> tuple[Tensor, Tensor, Tensor]:
        """Reduced-rank ridge regression: the best rank-r map for the penalised squared error.

        With W the ridge solution, the optimum is W V Vᵀ, where V holds the top r eigenvectors
        of the fitted covariance Wᵀ (XᵀX + lambda I) W (Izenman 1975; Mukherjee and Zhu 2011).

        Returns:
            down [D, r], up [r, P], bias [P].
        """
        weight, _, factor = self.ridge(damping)
        fitted = factor.T @ weight
        _, vectors = torch.linalg.eigh(fitted.T @ fitted)
        top = vectors[:, -rank:]
        down = weight @ top
        n = max(self.count, 1)
        bias = self.y / n - (self.x / n) @ down @ top.T
        return down, top.T.contiguous(), bias
