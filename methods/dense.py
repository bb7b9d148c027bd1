"""The untouched model, as a method: the reference line of every plot."""

from __future__ import annotations

from collections.abc import Sequence

from methods.base import Method, Probe, Site


class Dense(Method):
    """Routes nowhere."""

    def sites(self) -> Sequence[Site]:
        return []

    def achievable(self, sparsity: float) -> float:
        """Nothing is ever bypassed."""
        return 0.0

    def calibrate(self, probe: Probe, sparsity: float) -> None:
        """Nothing to set; the realised sparsity is 0 whatever the target."""
