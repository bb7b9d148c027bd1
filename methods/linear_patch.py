"""LinearPatch: rescale the channels of the stream where layers were cut out."""

from __future__ import annotations

import torch
from torch import Tensor

from methods.base import Probe, Shape, UnitView
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


def hadamard(order: int) -> Tensor:
    """Build an orthogonal Hadamard matrix, scaled by order ** -0.5, float64 [order, order].

    Sylvester's doubling of one that Paley's constructions give (Paley 1933: a prime q, which
    makes q + 1 if q is 3 modulo 4, and 2 (q + 1) if it is 1). Model widths are covered: powers of
    two, and 576 = 16 * 36, 896 = 32 * 28, 960 = 16 * 60, 5120 = 256 * 20.

    Raises:
        ValueError: none is known this way, for example at an order that 4 does not divide.
    """
    made = _signs(order)
    if made is None:
        raise ValueError(f"no Hadamard matrix of order {order} is made of a prime's by doubling")
    return made / order**0.5


def _signs(order: int) -> Tensor | None:
    if order == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    half = _signs(order // 2) if order % 2 == 0 else None
    if half is not None:
        return torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), half)
    if order % 4 == 0 and _prime(order - 1):
        return torch.eye(order, dtype=torch.float64) + _conference(order - 1)
    if order % 8 == 4 and _prime(order // 2 - 1):
        pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        corner = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        core = _conference(order // 2 - 1)
        return torch.kron(core, pair) + torch.kron(torch.eye(len(core)).double(), corner)
    return None


def _conference(q: int) -> Tensor:
    """Paley's matrix of order q + 1 of a prime q: zero diagonal, C Cᵀ = q I."""
    squares = {place * place % q for place in range(1, q)}
    character = torch.tensor([0.0, *(1.0 if p in squares else -1.0 for p in range(1, q))])
    place = torch.arange(q)
    made = torch.ones(q + 1, q + 1, dtype=torch.float64)
    made[0, 0] = 0.0
    made[1:, 1:] = character[(place[:, None] - place[None]) % q].double()
    if q % 4 == 3:  # skew, so that the identity may be added
        made[1:, 0] = -1.0
    return made


def _prime(number: int) -> bool:
    return number > 1 and all(number % d for d in range(2, int(number**0.5) + 1))
