"""Sites whose router and forecaster are plain maps, applied without calling the method."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from methods.base import Decision, LinearUnit, Site
from methods.engine.unit import Unit
from methods.engine.wrap import Routing


class LinearSites:
    """`Method.linear` of every site, read once; for passes whose decisions nobody watches."""

    def __init__(self, routing: Routing) -> None:
        self.routing = routing
        self._units: dict[Site, LinearUnit | None] = {}

    def forget(self) -> None:
        """The method's weights may have changed."""
        self._units.clear()

    def at(self, site: Site) -> LinearUnit | None:
        """None where the method has to be called."""
        if self.routing.watched or torch.is_grad_enabled():
            return None
        if site not in self._units:
            self._units[site] = self.routing.method.linear(site)
        return self._units[site]

    def decide(self, unit: Unit) -> Decision:
        """What `Routing.decide` gives outside training, to float tolerance of the scores."""
        linear = self.at(unit.site)
        assert linear is not None
        scores_BT = torch.matmul(unit.x_BTD.float(), linear.score_D).add_(linear.offset)
        execute_BT = self.routing.settle(unit, scores_BT > self.routing.method.threshold)
        return Decision(execute_BT, execute_BT.float(), scores_BT)


def estimate(linear: LinearUnit, x: Tensor) -> Tensor | None:
    """What bypassed tokens get, float32: [N, D] -> [N, D] or [D] -> [D]; None means nothing."""
    if linear.down_rD is None or linear.up_Dr is None:
        return None
    hidden = _product(linear.down_rD, linear.down_bias_r, x.float())
    if linear.silu:
        hidden = functional.silu(hidden, inplace=True)
    return _product(linear.up_Dr, linear.bias_D, hidden)


def _product(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    if x.dim() == 1 and bias is not None:
        return torch.addmv(bias, weight, x)
    return functional.linear(x, weight, bias)
