"""One block of contiguous layers cut out for every token, and one linear map where it was."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping

import torch
from torch import Tensor, nn

from methods.base import Budget, Method, Probe, RouteContext, Shape, Site, SiteCost, Stage, UnitView
from methods.options import Sparsity
from methods.parts.static_order import best_cuts, count_below


class LayerCut(Method):
    """What ReplaceMe and LinearPatch share: where the cut is, and that one map stands for it.

    A method fits the map (`_fit`) and says what it reads (`_reads`). The cut begins where the
    stream turns least (`best_cuts`), after the first layer, whose MLP a map may read.
    """

    starts: Tensor
    """int64 [layers]: first layer of the best cut of so many layers."""
    cut: Tensor
    """int64 [2]: first layer and number of layers that the map was fitted for."""

    def __init__(self, *, sparsity: Sparsity) -> None:
        super().__init__(sparsity=sparsity)

    def setup(self, shape: Shape) -> None:
        super().setup(shape)
        self.patch = nn.Linear(shape.width, shape.width, bias=False)
        """What the map adds to the stream, in place of the cut layers."""
        nn.init.zeros_(self.patch.weight)
        self.register_buffer("starts", torch.ones(shape.layers, dtype=torch.int64))
        self.register_buffer("cut", torch.ones(2, dtype=torch.int64))

    def fixed(self) -> Mapping[Site, bool]:
        first, end = self._cut()
        return {site: not first <= site.layer < end for site in self.sites()}

    def estimated(self) -> Collection[Site]:
        first, end = self._cut()
        return [Site(first, "attention")] if first < end else []

    def estimate(self, site: Site, x_BTD: Tensor, ctx: RouteContext) -> Tensor:
        added: Tensor = self.patch(self._reads(ctx).float())
        return added.to(x_BTD.dtype)

    def cost(self, site: Site) -> SiteCost:
        """Two FLOPs a weight of the map, at the site that it stands for."""
        return SiteCost(approximate=2.0 * self.patch.weight.numel() * (site in self.estimated()))

    def fit(self, probe: Probe) -> None:
        """Find the best cut of each size."""
        self.starts.copy_(torch.tensor(best_cuts(probe)))

    def stages(self, budget: Budget) -> Iterable[Stage]:
        """The map of the target's cut."""
        kept = self._fit_bytes(budget.fit_tokens)
        yield Stage("patch", fit=self._patch, fit_bytes=kept, per_target=True)

    def _patch(self, probe: Probe) -> None:
        self.calibrate(probe, self.sparsity)

    def calibrate(self, probe: Probe, sparsity: float) -> None:
        """Cut the nearest possible number of layers, and fit their map if it is another's."""
        layers = self._count(sparsity)
        self.threshold.fill_(layers - 0.5)
        wanted = torch.tensor([int(self.starts[layers]), layers])
        if layers and not torch.equal(self.cut.cpu(), wanted):
            self.cut.copy_(wanted)
            self._fit(probe)

    def achievable(self, sparsity: float) -> float:
        """Nearest sparsity that a whole number of layers gives; the first layer stays."""
        return self._count(sparsity) / len(self.starts)

    def _count(self, sparsity: float) -> int:
        return min(round(sparsity * len(self.starts)), len(self.starts) - 1)

    def _cut(self) -> tuple[int, int]:
        """First layer of the cut, and the one after it."""
        count = count_below(self.threshold, len(self.starts) - 1)
        first = int(self.starts[count])
        return first, first + count

    def _reads(self, ctx: RouteContext) -> Tensor:
        """What the map reads, [B, T, D]; by default the residual stream before the cut."""
        return ctx.residual_BTD

    def _fit(self, probe: Probe) -> None:
        """Set `patch` from what `_stream` shows."""
        raise NotImplementedError(f"{type(self).__name__} must define _fit()")

    def _fit_bytes(self, tokens: int) -> int:
        """What that keeps beside the model; by default two D x D matrices in float64."""
        return 2 * 8 * int(self.patch.weight.numel())

    def _stream(self, probe: Probe, visit: Callable[[UnitView, Tensor], None]) -> None:
        """Call `visit` with the MLP before the cut and the stream after the cut, [N, D].

        One dense pass over training text, batch by batch, padding removed.
        """
        first, end = self._cut()
        before: list[UnitView] = []

        def see(view: UnitView) -> None:
            if view.site == Site(first - 1, "mlp"):
                before[:] = [view]
            if view.site == Site(end - 1, "mlp"):
                mlp = before.pop()
                visit(mlp, (view.residual_ND + view.y_ND).to(mlp.y_ND.device))

        probe.stream(see)
