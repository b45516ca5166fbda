"""`MultiwayAdapter` next to two adapters and a concatenation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from against_reference import check_against_reference
from module_cases import (
    BACKENDS,
    D,
    adaptformer,
    assert_same_results,
    randn,
    randomize,
    with_parameters,
)
from torch import Tensor, nn

from fastadapters import (
    BottleneckAdapter,
    MultiwayAdapter,
)

pytestmark = pytest.mark.usefixtures("seeded_on_one_thread")


T = 9


class TwoAdapters(nn.Module):
    """What `MultiwayAdapter` stands for: each adapter on its tokens, then a concatenation."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.adaptmlp_vision = BottleneckAdapter(D, 7, **options)
        self.adaptmlp_text = BottleneckAdapter(D, 7, **options)

    def forward(self, x: Tensor, split: int, residual: Tensor | None = None) -> Tensor:
        split = x.shape[1] if split == -1 else split
        halves = []
        for adapter, part in (
            (self.adaptmlp_vision, slice(None, split)),
            (self.adaptmlp_text, slice(split, None)),
        ):
            halves.append(adapter(x[:, part], None if residual is None else residual[:, part]))
        return torch.cat(halves, dim=1)


MULTIWAY_OPTIONS = [
    {"activation": "gelu", "scale": "learnable"},
    {"layernorm": "in", "scale": "channel", "residual": False},
    {"layernorm": "out", "scale": 0.6},
    {"layernorm": "out", "residual": False},
]


def multiway_tensors(module: nn.Module, explicit: bool) -> Any:
    residual = {"residual": randn(3, T, D, seed=50)} if explicit else {}
    return with_parameters(randomize(module), x=randn(3, T, D), **residual)


@pytest.mark.parametrize("split", [-1, 0, 1, 4, T])
@pytest.mark.parametrize("explicit", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("options", MULTIWAY_OPTIONS, ids=str)
def test_multiway_is_two_adapters(options: dict[str, Any], explicit: bool, split: int) -> None:
    """Output and all gradients in float64."""
    module = MultiwayAdapter(D, 7, **options)
    tensors, as_op = multiway_tensors(module, explicit)
    assert_same_results(as_op(module, split), as_op(TwoAdapters(**options), split), tensors)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("explicit", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("options", MULTIWAY_OPTIONS, ids=str)
def test_multiway_backends(
    options: dict[str, Any], explicit: bool, dtype: torch.dtype, backend: str
) -> None:
    """Output and all gradients under the tolerance rule."""
    module = MultiwayAdapter(D, 7, **options)
    tensors, as_op = multiway_tensors(module, explicit)
    rounded = {name: t.to(dtype) for name, t in tensors.items()}
    check_against_reference(as_op(module, 4), rounded, "multiway", backend)


def test_modalities_name_the_adapters() -> None:
    """The first name has the first tokens, whatever the names."""
    module = MultiwayAdapter(D, 7, modalities=("image", "audio"))
    randomize(module)
    assert [name for name, _ in module.named_children()] == ["adaptmlp_image", "adaptmlp_audio"]
    x = randn(3, T, D)
    assert torch.equal(module(x, -1), module.adaptmlp_image(x))
    assert torch.equal(module(x, 0), module.adaptmlp_audio(x))


@pytest.mark.parametrize("split", [-1, 0, 4])
@pytest.mark.parametrize("layernorm", [None, "out"])
def test_add_residual(layernorm: str | None, split: int) -> None:
    module = MultiwayAdapter(D, 7, layernorm=layernorm)
    randomize(module)
    x, residual = randn(3, T, D), randn(3, T, D, seed=1)
    branch = module(x, split, add_residual=False)
    torch.testing.assert_close(module(x, split), x + branch)
    torch.testing.assert_close(module(x, split, residual), residual + branch)
    torch.testing.assert_close(module(x, split, residual, add_residual=False), branch)


def test_adapters_are_found_by_name() -> None:
    """Shared by both modalities, removed and put back, beside another submodule."""
    x = randn(3, T, D)
    module = MultiwayAdapter(D, 7)
    randomize(module)
    expected = module(x, 4)

    first = module.adaptmlp_vision
    del module.adaptmlp_vision
    module.adaptmlp_vision = first
    assert torch.equal(module(x, 4), expected)

    module.probe = nn.Linear(D, 2)
    module.add_module("0", nn.Identity())
    assert torch.equal(module(x, 4), expected)

    module.adaptmlp_text = first
    torch.testing.assert_close(module(x, 4), first(x))
    module(x, 4).sum().backward()
    got = {name: p.grad.clone() for name, p in first.named_parameters()}
    first.zero_grad()
    first(x).sum().backward()
    for name, p in first.named_parameters():
        torch.testing.assert_close(got[name], p.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["vision", "text"])
def test_another_module_in_the_place_of_an_adapter(name: str) -> None:
    """It is called with what was given alone, so that its own defaults hold."""
    x, residual = randn(3, T, D), randn(3, T, D, seed=1)
    module = MultiwayAdapter(D, 7)
    randomize(module)
    expected, with_residual = module(x, 4), module(x, 4, residual, add_residual=True)
    published = adaptformer.Adapter(D, 7, 1.0)
    published.load_state_dict(getattr(module, f"adaptmlp_{name}").state_dict())
    setattr(module, f"adaptmlp_{name}", published)
    torch.testing.assert_close(module(x, 4), expected)
    torch.testing.assert_close(module(x, 4, residual, add_residual=True), with_residual)
    setattr(module, f"adaptmlp_{name}", nn.Identity())
    part = slice(None, 4) if name == "vision" else slice(4, None)
    assert torch.equal(module(x, 4)[:, part], x[:, part])


def test_a_published_checkpoint_has_the_names_crossed() -> None:
    """Its layer calls ``adaptmlp_text`` on images (split -1), ``adaptmlp_vision`` on texts (0)."""
    layer = nn.ModuleDict(
        {f"adaptmlp_{name}": adaptformer.Adapter(D, 7, 0.1) for name in ("text", "vision")}
    )
    randomize(layer)
    module = MultiwayAdapter(D, 7, modalities=("text", "vision"), scale=0.1, residual=False)
    module.load_state_dict(layer.state_dict())
    x = randn(3, T, D)
    for split, name in ((-1, "adaptmlp_text"), (0, "adaptmlp_vision")):
        torch.testing.assert_close(module(x, split), layer[name](x, add_residual=False))


@pytest.mark.parametrize("layernorm", [None, "in", "out"])
@pytest.mark.parametrize("hooked", [False, True])
def test_any_number_of_modalities(layernorm: str | None, hooked: bool) -> None:
    """Each part as its adapter has it alone; layers are called where a hook asks for it."""
    names = ("vision", "text", "audio", "depth")
    module = MultiwayAdapter(D, 7, modalities=names, layernorm=layernorm, scale="learnable")
    randomize(module)
    x, residual = randn(3, 9, D), randn(3, 9, D, seed=1)
    if hooked:
        module.adaptmlp_audio.up_proj.register_forward_hook(lambda *_: None)
    splits = (2, 2, 5)
    y = module(x, residual=residual, splits=splits)
    for name, begin, end in zip(names, (0, *splits), (*splits, 9), strict=True):
        own = getattr(module, f"adaptmlp_{name}")(x[:, begin:end], residual[:, begin:end])
        torch.testing.assert_close(y[:, begin:end], own)
    two = MultiwayAdapter(D, 7)
    assert torch.equal(two(x, 4), two(x, splits=(4,)))


def test_splits_are_checked() -> None:
    module, x = MultiwayAdapter(D, 7, modalities=("a", "b", "c")), randn(3, 9, D)
    for arguments, message in (
        ({"split": 4}, "split: expected splits, one per boundary"),
        ({"splits": (4,)}, "splits: expected 2 integers, got 1"),
        ({"splits": (4, 2)}, "splits: expected 0 <= ... <= T = 9, in order"),
        ({}, "split: expected it or splits, got None and None"),
        ({"split": 1, "splits": (1, 2)}, "split: expected it or splits"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            module(x, **arguments)
    for names in (("a",), ("a", "a"), ("a", "b c"), "ab"):
        with pytest.raises(ValueError, match="modalities: expected different names, two or more"):
            MultiwayAdapter(D, 7, modalities=names)
