"""`MultiModalAdapter` next to the published forward pass."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from module_cases import (
    INF,
    PLAIN,
    D,
    assert_exact,
    inputs,
    randn,
    randomize,
    sample,
)
from torch import Tensor

import fastadapters
from fastadapters import (
    MultiModalAdapter,
)

pytestmark = pytest.mark.usefixtures("seeded_on_one_thread")


MASKS = [
    ("masked", ((-INF, 0.0), (0.0, -INF))),
    ("additive", ((0.0, 1.0), (1.0, 0.0))),
    (((0.5, -1.0), (-INF, 2.0)),) * 2,
]


def published(module: MultiModalAdapter, tokens: Tensor, bias: Any) -> Tensor:
    """The published forward pass: `torch.nn.MultiheadAttention` with a mask of numbers."""
    modality = torch.tensor([0] * (len(tokens) - 1) + [1])
    mask = torch.tensor(bias, dtype=tokens.dtype)[modality[:, None], modality]
    x = module.downsampler(tokens)
    out: Tensor = module.upsampler(module.mha(x, x, x, attn_mask=mask, need_weights=False)[0])
    return out


@pytest.mark.parametrize("backend", PLAIN)
@pytest.mark.parametrize(("mask", "bias"), MASKS)
@pytest.mark.parametrize("per_item", [False, True])
@pytest.mark.parametrize(
    ("down", "up"), [("linear", "linear"), ("factored", "mlp"), ("mlp", "mlp")]
)
def test_multimodal_is_the_published_one(
    down: str, up: str, per_item: bool, mask: Any, bias: Any, backend: str
) -> None:
    module = sample("multimodal", torch.float64, downsample=down, upsample=up, mask=mask)
    text, image = inputs("multimodal", torch.float64)
    texts = text.expand(3, 6, D)
    if per_item:
        text = texts = randn(3, 6, D, seed=7, dtype=torch.float64)
    tokens = torch.cat([texts.transpose(0, 1), image[None]])
    with fastadapters.backend(backend):
        new_text, new_image = module(text, image)
        sequence = module(tokens)
    expected = published(module, tokens, bias)
    assert_exact(sequence, expected)
    assert_exact(new_text, expected[:-1].transpose(0, 1))
    assert_exact(new_image, expected[-1])


@pytest.mark.parametrize("backend", PLAIN)
@pytest.mark.parametrize("mask", ["masked", "additive", ((0.5, -1.0), (-1.0, 2.0))])
@pytest.mark.parametrize("adapt", ["both", "image", "text"])
def test_logits(adapt: str, mask: Any, backend: str) -> None:
    """[B, C]: cosines of the blends of what CLIP and the adapter give."""
    module = sample("multimodal", torch.float64, mask=mask, blend=0.3)
    text, image = inputs("multimodal", torch.float64)
    with fastadapters.backend(backend):
        got = module.logits(text, image, 50.0, adapt=adapt)
        new_text, new_image = module(text, image)
    unit = partial(F.normalize, dim=-1)
    text = unit(text).expand_as(new_text)
    image = image if adapt == "image" else unit(image)
    if adapt != "image":
        text = unit(0.3 * unit(new_text) + 0.7 * text)
    if adapt != "text":
        image = 0.3 * unit(new_image) + 0.7 * image
    assert got.shape == (3, 6)
    assert_exact(got, 50 * (unit(image)[:, None] * text).sum(-1))


ATTENTIONS: dict[str, dict[str, Any]] = {
    "without biases": {"bias": False},
    "biases on keys": {"add_bias_kv": True},
    "a key of zeros": {"add_zero_attn": True},
    "dropout": {"dropout": 0.5},
    "other heads": {"num_heads": 2},
}


@pytest.mark.parametrize("name", ATTENTIONS)
def test_another_attention_is_what_runs(name: str) -> None:
    """Whatever somebody puts in the place of ``mha``, in its own mode of training."""
    module = sample("multimodal", torch.float64, mask="additive").eval()
    module.mha = torch.nn.MultiheadAttention(
        16, **{"num_heads": 4, **ATTENTIONS[name]}, dtype=torch.float64
    )
    randomize(module.mha)
    text, image = inputs("multimodal", torch.float64)
    tokens = torch.cat([text[:, None].expand(-1, 3, -1), image[None]])
    torch.manual_seed(3)
    expected = published(module, tokens, ((0.0, 1.0), (1.0, 0.0)))
    torch.manual_seed(3)
    assert_exact(module(tokens), expected)
    (decision,) = fastadapters.explain(module, tokens)
    assert (decision.backend == "layers") == (name != "other heads")


def test_logits_adapt_both_by_default() -> None:
    module, (text, image) = sample("multimodal"), inputs("multimodal")
    logits = [module.logits(text, image, 50.0, adapt=adapt) for adapt in ("both", "image", "text")]
    assert torch.equal(module.logits(text, image, torch.tensor(50.0)), logits[0])
    for one, other in itertools.combinations(logits, 2):
        assert not torch.equal(one, other)


BAD_MULTIMODAL = [
    (lambda m, t, i: m(t[:, 1:], i), "text: expected [C, D] = [6, 24], got [6, 23]"),
    (lambda m, t, i: m(t.expand(2, 6, D), i), "text: expected [B, C, D] = [3, 6, 24]"),
    (lambda m, t, i: m(t[:0], i), "text: expected [C, D] with C >= 1"),
    (lambda m, t, i: m(t, i[0]), "image: expected [B, D]"),
    (lambda m, t, i: m.logits(t, i, 1.0, adapt="none"), "adapt: expected one of both, text"),
    (lambda m, t, i: m.logits(t, i, torch.ones(2)), "logit_scale: expected one element"),
    (lambda m, t, i: m.logits(t.expand(3, 6, D), i, 1.0), "text: expected [C, D]"),
    (lambda m, t, i: m(i), "text: expected tokens [C + 1, B, D] without image"),
    (lambda m, t, i: m(i[None]), "text: expected tokens [C + 1, B, D] without image"),
]


@pytest.mark.parametrize(("bad", "message"), BAD_MULTIMODAL)
def test_bad_multimodal_input(bad: Callable[..., Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        bad(sample("multimodal"), *inputs("multimodal"))


@pytest.mark.parametrize("used", [0, 1])
def test_hooks_on_a_module_of_whose_features_one_are_used(used: int) -> None:
    """A module's backward hooks hand on that the others have no gradient at all."""
    module, tensors = sample("multimodal"), inputs("multimodal")
    seen: list[Any] = []
    grads = []
    for hook in (False, True):
        module.zero_grad()
        if hook:
            module.register_full_backward_hook(lambda m, given, got: seen.append(got))
        module(*(t.requires_grad_() for t in tensors))[used].square().sum().backward()
        grads.append({name: p.grad for name, p in module.named_parameters()})
    assert [g is None for g in seen[0]] == [used != 0, used != 1]
    for name, t in grads[0].items():
        assert torch.equal(grads[1][name], t), name
