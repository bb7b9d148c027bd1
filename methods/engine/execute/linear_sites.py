"""Sites whose router and forecaster are plain maps, applied without calling the method."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from methods.base import Decision, LinearUnit, Method, Site
from methods.engine.decoder.unit import Unit
from methods.engine.ops.linear import estimate
from methods.engine.ops.row_ops import RowOps
from methods.engine.routing import Routing

Kept = dict[Site, tuple[LinearUnit, list[Any], LinearUnit]]
_KEPT: WeakKeyDictionary[Method, Kept] = WeakKeyDictionary()
"""The maps of a method's sites, their state, and their copies for row-wise loops: as long as the
method lives, so that no `routed` block but the first copies them; outside of it, so that none is
saved."""


def copied(method: Method, site: Site, linear: LinearUnit, ops: RowOps) -> LinearUnit:
    """Give both maps of a site as `ops` reads them; copied where its weights have changed only."""
    down, up = linear.down_rD, linear.up_Dr
    if down is None or up is None or down.is_inference() or up.is_inference():
        return ops.maps(linear)  # an inference tensor does not count its changes
    state = [ops.dtype, down.data_ptr(), down._version, up.data_ptr(), up._version]
    kept = _KEPT.setdefault(method, {})
    if site not in kept or kept[site][1] != state:
        # the maps are held too: while they are, no other tensor gets their addresses
        kept[site] = linear, state, ops.maps(linear)
    copies = kept[site][2]
    return replace(linear, down_rD=copies.down_rD, up_Dr=copies.up_Dr)


class LinearSites:
    """`Method.linear` of every site, read once; for passes whose decisions nobody watches."""

    def __init__(self, routing: Routing) -> None:
        self.routing = routing
        self._units: dict[Site, LinearUnit | None] = {}
        self._copied: dict[Site, LinearUnit] = {}

    def forget(self) -> None:
        """The method's weights may have changed."""
        self._units.clear()
        self._copied.clear()

    def at(self, site: Site) -> LinearUnit | None:
        """None where the method has to be called."""
        if self.routing.watched or torch.is_grad_enabled():
            return None
        if site not in self._units:
            self._units[site] = self.routing.method.linear(site)
        return self._units[site]

    def for_rows(self, site: Site) -> LinearUnit:
        """The same as the forecast of many rows reads it, of a site whose `at` is not None."""
        linear = self._units[site]
        assert linear is not None
        if not self.routing.ops.compiled:
            return linear
        if site not in self._copied:
            self._copied[site] = copied(self.routing.method, site, linear, self.routing.ops)
        return self._copied[site]

    def estimated(self, unit: Unit) -> Tensor | None:
        """Residual stream after a site of `Method.estimated`; None where the method is called.

        All tokens take the two products at once: nothing is gathered or scattered.
        """
        linear = self.at(unit.site)
        if linear is None:
            return None
        x_BTD, residual_BTD, ops = unit.x_BTD, unit.residual_BTD, self.routing.ops
        alone = x_BTD.numel() == x_BTD.shape[-1]
        if ops.forecasts_all and linear.down_rD is not None and not alone:
            index_N = torch.arange(x_BTD.shape[0] * x_BTD.shape[1])
            into = residual_BTD if unit.owned else ops.output_buffer(residual_BTD, filled=True)
            ops.forecast(self.for_rows(unit.site), x_BTD, residual_BTD, into, index_N)
            return into
        given = estimate(linear, x_BTD.view(-1) if alone else x_BTD)
        if given is None:
            return residual_BTD
        if given.dtype == residual_BTD.dtype:
            return given.view_as(residual_BTD).add_(residual_BTD)
        return residual_BTD + given.view_as(residual_BTD).to(residual_BTD.dtype)

    def decide(self, unit: Unit) -> Decision:
        """What `Routing.decide` gives outside training, to float tolerance of the scores.

        The gate, which no gathered path reads, is the mask itself.
        """
        linear = self.at(unit.site)
        assert linear is not None
        scores_BT = unit.scores(linear.score_D, linear.offset)
        execute_BT = self.routing.apply_mask(unit, scores_BT > self.routing.method.threshold)
        return Decision(execute_BT, execute_BT, scores_BT)
