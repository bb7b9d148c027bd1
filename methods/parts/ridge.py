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

    def components(self, damping: float, metric: Tensor | None = None) -> Components:
        """Reduced-rank ridge regression, all ranks at once.

        With W the ridge solution and an error e worth eᵀ M e, the optimum of rank r is
        W S V Vᵀ S⁻¹, where S = M^(1/2) and V holds the top r eigenvectors of the fitted
        covariance in that metric, S Wᵀ (XᵀX + lambda I) W S (Izenman 1975; Mukherjee and Zhu
        2011 for M = I).

        Args:
            damping: as for `ridge`.
            metric: M [P, P], symmetric, positive semi-definite; None is the identity.
        """
        weight, _, factor = self.ridge(damping)
        fitted = factor.T @ weight
        inverse: Tensor | None = None
        if metric is not None:
            root, inverse = _roots(metric)
            fitted, weight = fitted @ root, weight @ root
        values, vectors = torch.linalg.eigh(fitted.T @ fitted)
        n = max(self.count, 1.0)
        return Components(weight, vectors, inverse, values / n, self.x / n, self.y / n)


@dataclass(frozen=True)
class Components:
    """Directions of a reduced-rank regression, the worst first; float64."""

    weight: Tensor
    """W S, [D, P]."""
    vectors: Tensor
    """V in ascending order of `values`, [P, P]."""
    inverse: Tensor | None
    """S⁻¹; None for the identity."""
    values: Tensor
    """[P]: the error, in the metric and per observation, that each direction avoids."""
    mean_x: Tensor
    mean_y: Tensor

    def take(self, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """The map of the best `rank` directions: down [D, r], up [r, P], bias [P]."""
        top = self.vectors[:, -rank:]
        down = self.weight @ top
        up = top.T.contiguous() if self.inverse is None else top.T @ self.inverse
        return down, up, self.mean_y - self.mean_x @ down @ up


FLOOR = 0.05
"""Least weight of a direction of a metric, relative to the mean: what few tokens show no gradient
in is not free."""


def _roots(metric: Tensor) -> tuple[Tensor, Tensor]:
    """M^(1/2) and M^(-1/2), float64, eigenvalues bounded below."""
    values, vectors = torch.linalg.eigh(metric.double())
    values = values.clamp_min(FLOOR * float(values.mean().clamp_min(1e-30))).sqrt()
    return vectors * values @ vectors.T, vectors / values @ vectors.T
