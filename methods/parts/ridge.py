"""Least squares from streamed sufficient statistics: full, reduced-rank, single output."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


class Moments:
    """Streaming sums for a linear regression of Y on X; float64 totals, float32 products.

    Args:
        inputs: D, outputs: P.
    """

    def __init__(self, *, inputs: int, outputs: int, device: torch.device) -> None:
        self.count = 0.0
        self.x = torch.zeros(inputs, dtype=torch.float64, device=device)
        self.y = torch.zeros(outputs, dtype=torch.float64, device=device)
        self.xx = torch.zeros(inputs, inputs, dtype=torch.float64, device=device)
        self.xy = torch.zeros(inputs, outputs, dtype=torch.float64, device=device)

    def add(self, x_ND: Tensor, y_NP: Tensor, weight_N: Tensor | None = None) -> None:
        """Add N observations (any float dtype), each counted `weight_N` times (default once)."""
        x, y = x_ND.float(), y_NP.float()
        weighted = x if weight_N is None else x * weight_N[:, None]
        self.count += float(len(x) if weight_N is None else weight_N.sum())
        self.x += weighted.sum(0)
        self.y += (y if weight_N is None else y * weight_N[:, None]).sum(0)
        self.xx += weighted.T @ x
        self.xy += weighted.T @ y

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
        """Reduced-rank ridge regression: down [D, r], up [r, P], bias [P] of `components`."""
        return self.components(damping).take(rank)

    def components(self, damping: float) -> Components:
        """Reduced-rank ridge regression, all ranks at once.

        With W the ridge solution, the best map of rank r for the penalised squared error is
        W V Vᵀ, where V holds the top r eigenvectors of the fitted covariance
        Wᵀ (XᵀX + lambda I) W (Izenman 1975; Mukherjee and Zhu 2011).
        """
        weight, _, factor = self.ridge(damping)
        fitted = factor.T @ weight
        values, vectors = torch.linalg.eigh(fitted.T @ fitted)
        n = max(self.count, 1.0)
        return Components(weight, vectors, values / n, self.x / n, self.y / n)


@dataclass(frozen=True)
class Components:
    """Directions of a reduced-rank regression, the worst first; float64."""

    weight: Tensor
    """W, [D, P]."""
    vectors: Tensor
    """V in ascending order of `values`, [P, P]."""
    values: Tensor
    """[P]: the squared error per observation that each direction avoids."""
    mean_x: Tensor
    mean_y: Tensor

    def take(self, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """The map of the best `rank` directions: down [D, r], up [r, P], bias [P]."""
        top = self.vectors[:, -rank:]
        down = self.weight @ top
        return down, top.T.contiguous(), self.mean_y - self.mean_x @ down @ top.T
