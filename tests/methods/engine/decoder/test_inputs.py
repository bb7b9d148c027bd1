"""Validity and positions from every form of attention mask."""

from __future__ import annotations

import pytest
import torch

from methods.engine.decoder.inputs import valid_and_positions

MASK = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 0, 0]])


def read(mask, *, tokens=6, past=0, rows=3):
    return valid_and_positions(
        mask, batch=rows, tokens=tokens, past=past, device=torch.device("cpu")
    )


def square(mask):
    """Who may attend to whom, bool [B, 1, S, S]."""
    size = mask.shape[1]
    causal = torch.ones(size, size, dtype=torch.bool).tril()
    return (causal & mask.bool()[:, None, :])[:, None]


def additive(allowed):
    return torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)


FORMS = {
    "row": lambda mask: mask,
    "bool row": lambda mask: mask.bool(),
    "square": square,
    "additive": lambda mask: additive(square(mask)),
    "by type": lambda mask: {"full_attention": square(mask)},
}


@pytest.mark.parametrize("form", FORMS)
def test_whole_sequences(form):
    valid, positions = read(FORMS[form](MASK))
    assert valid.dtype == torch.bool
    assert torch.equal(valid, MASK.bool())
    for row in range(3):
        assert positions[row][valid[row]].tolist() == list(range(int(MASK[row].sum())))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tokens", [1, 2])
def test_the_last_tokens_after_a_cache(form, tokens):
    mask = MASK[:2]
    full = FORMS[form](mask)
    if form in ("square", "additive"):
        full = full[:, :, -tokens:]
    elif form == "by type":
        full = {"full_attention": full["full_attention"][:, :, -tokens:]}
    valid, positions = read(full, tokens=tokens, past=6 - tokens, rows=2)
    assert valid.all() and valid.shape == (2, tokens)
    assert positions[0].tolist() == [4 - tokens + t for t in range(tokens)]
    assert positions[1].tolist() == [6 - tokens + t for t in range(tokens)]


def test_no_mask_means_no_padding():
    valid, positions = read(None, tokens=2, past=4)
    assert valid.all() and positions.tolist() == [[4, 5]] * 3


@pytest.mark.parametrize("bad", [torch.ones(3, 5), torch.ones(3, 6, 6)])
def test_a_mask_that_does_not_cover_the_tokens_is_refused(bad):
    with pytest.raises(ValueError, match="does not cover 6 tokens"):
        read(bad)
