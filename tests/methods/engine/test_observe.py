"""Units under the dense forward against hooks on the plain model."""

from __future__ import annotations

import gc
import itertools
import weakref

import pytest
import torch

from methods.base import Site
from methods.engine.observe import bypassed, observed, observed_routed, unit_gradients
from tests.methods.conftest import small_ids, small_model
from tests.methods.engine.scripted import Scripted, all_sites, brute_force, norms_of, padded


def module_of(model, site):
    layer = model.model.layers[site.layer]
    return layer.self_attn if site.kind == "attention" else layer.mlp


def delta(output):
    return output[0] if isinstance(output, tuple) else output


@torch.no_grad()
def test_what_a_unit_gave_is_freed_once_it_was_visited():
    """At once: garbage is collected too late for tensors of a pass over a large model."""
    visited, alive = [], []

    def visit(view):
        visited.append(weakref.ref(view.x_ND))
        alive.append(sum(x_ND() is not None for x_ND in visited))

    model = small_model()
    gc.disable()
    try:
        with observed(model, visit):
            model(input_ids=small_ids(1, 8))
    finally:
        gc.enable()
    assert alive == [1] * len(all_sites(model, "unit"))


@pytest.mark.parametrize("side", ["left", "right"])
def test_views_are_the_modules_inputs_and_outputs_without_padding(family_model, side):
    ids, mask = padded(small_ids(2, 9), (0, 3), side)
    inputs, outputs, hooks = {}, {}, []
    for site in all_sites(family_model, "unit"):

        def keep(module, args, kwargs, out, site=site):
            inputs[site] = args[0] if args else kwargs["hidden_states"]
            layer = family_model.model.layers[site.layer]
            after = norms_of(layer, family_model.config.model_type)[1][site.kind == "mlp"]
            outputs[site] = after(delta(out)) * getattr(layer, "residual_multiplier", 1.0)

        module = module_of(family_model, site)
        hooks.append(module.register_forward_hook(keep, with_kwargs=True))
    views = []
    with torch.no_grad(), observed(family_model, views.append):
        logits = family_model(input_ids=ids, attention_mask=mask).logits
    for hook in hooks:
        hook.remove()
    assert torch.equal(logits, family_model(input_ids=ids, attention_mask=mask).logits)
    assert [view.site for view in views] == all_sites(family_model, "unit")
    real = mask.bool()
    for view in views:
        assert view.x_ND.shape == view.y_ND.shape == view.residual_ND.shape == (15, 32)
        assert torch.equal(view.x_ND, inputs[view.site][real])
        assert torch.allclose(view.y_ND, outputs[view.site][real], atol=1e-5)
    for before, after in itertools.pairwise(views):
        assert torch.allclose(before.residual_ND + before.y_ND, after.residual_ND, atol=1e-5)


def test_bypassed_sites_are_skipped_by_every_token():
    model, ids = small_model(layers=3), small_ids(1, 8)
    sites = frozenset({Site(0, "mlp"), Site(1, "attention"), Site(2, "block")})
    with torch.no_grad(), bypassed(model, sites):
        found = model(input_ids=ids).logits[0]
    never = Scripted({site: torch.zeros(1, 8, dtype=torch.bool) for site in sites})
    assert torch.allclose(found, brute_force(model, ids[0], never, 0), atol=2e-4)


def loss_of(model, ids, mask):
    logits = model(input_ids=ids, attention_mask=mask).logits.log_softmax(-1)
    return logits[..., 7][mask.bool()].sum()


def test_unit_gradients_equal_retained_gradients():
    model = small_model()
    ids, mask = padded(small_ids(2, 9), (0, 3), "left")
    seen = {}
    with unit_gradients(model, lambda site, g: seen.setdefault(site, []).append(g)):
        for _ in range(2):
            loss_of(model, ids, mask).backward()
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    assert not model.get_input_embeddings()._forward_hooks
    kept = {}
    for site in all_sites(model, "unit"):

        def keep(module, args, out, site=site):
            kept[site] = delta(out)
            kept[site].retain_grad()

        module_of(model, site).register_forward_hook(keep)
    model.requires_grad_(True)
    loss_of(model, ids, mask).backward()
    assert seen.keys() == kept.keys()
    for site, output in kept.items():
        assert len(seen[site]) == 2
        for gradient in seen[site]:
            assert torch.allclose(gradient, output.grad[mask.bool()], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("side", ["left", "right"])
def test_routed_views_are_what_the_routed_model_computes(side):
    """Inputs and outputs of the modules, in the stream that bypasses have changed."""
    model = small_model()
    ids, mask = padded(small_ids(2, 9), (0, 3), side)
    sites = all_sites(model, "unit")
    generator = torch.Generator().manual_seed(3)
    execute = {site: torch.rand(2, 9, generator=generator) > 0.4 for site in sites}
    if side == "left":
        execute[sites[0]] = execute[sites[0]] | (mask == 0)
    method = Scripted(execute)
    inputs, outputs, views = {}, {}, []
    for site in sites:

        def keep(module, args, kwargs, out, site=site):
            inputs[site] = args[0] if args else kwargs["hidden_states"]
            outputs[site] = delta(out)

        module_of(model, site).register_forward_hook(keep, with_kwargs=True)
    with torch.no_grad(), observed_routed(model, method, views.append):
        model(input_ids=ids, attention_mask=mask)
    real = mask.bool()
    assert [view.site for view in views] == sites
    for view in views:
        assert torch.equal(view.x_ND, inputs[view.site][real])
        assert torch.allclose(view.y_ND, outputs[view.site][real], atol=1e-5)
    decided = {view.site: view.execute_N for view in views}
    for before, after in itertools.pairwise(views):
        passed = torch.where(decided[before.site][:, None], before.y_ND, 0.0)
        assert torch.allclose(before.residual_ND + passed, after.residual_ND, atol=1e-5)
    assert 0.2 < float(torch.cat(list(decided.values())).float().mean()) < 0.9
    assert not hasattr(model, "routing")
