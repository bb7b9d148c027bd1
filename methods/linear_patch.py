"""LinearPatch: rescale the channels of the stream where layers were cut out."""

from __future__ import annotations

import torch
from torch import Tensor

from methods.base import Probe, Shape, UnitView
from methods.parts.hadamard import hadamard
from methods.parts.layer_cut import LayerCut


class LinearPatch(LayerCut):
    """Scale the stream to the size that the cut layers gave it (Chen et al., arXiv 2505.24680).

    The patch is W = H diag(mean |h_j H| / mean |h_i H|) Hᵀ, with h_i and h_j the streams before and
    after the cut and H a Hadamard matrix, in whose basis no channel carries a massive activation.
    Training-free; the published distillation of W alone is left out.
    """

    paper = "arXiv 2505.24680"

    def setup(self, shape: Shape) -> None:
        super().setup(shape)
        hadamard(shape.width)  # raises where there is none

    def _fit(self, probe: Probe) -> None:
        rotation_DD = hadamard(self.patch.in_features).to(self.patch.weight.device)
        sums_2D = rotation_DD.new_zeros(2, len(rotation_DD))

        def visit(mlp: UnitView, after_ND: Tensor) -> None:
            for place, stream_ND in enumerate((mlp.residual_ND + mlp.y_ND, after_ND)):
                rotated_ND = stream_ND.float() @ rotation_DD.to(stream_ND.device).float()
                sums_2D[place] += rotated_ND.abs().sum(0).to(sums_2D.device)

        self._stream(probe, visit)
        scale_D = sums_2D[1] / sums_2D[0]
        # a row is a token: h W - h is added, and W is symmetric
        added_DD = (rotation_DD * (scale_D - 1.0)) @ rotation_DD.T
        with torch.no_grad():
            self.patch.weight.copy_(added_DD)
