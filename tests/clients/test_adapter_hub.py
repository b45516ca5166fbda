"""`patch` on `adapters`: bottleneck adapters in BERT, ViT and CLIP, and their compositions."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import adapters
import pytest
import torch
import transformers
from adapters import composition
from same_training import assert_trains_the_same
from torch import Tensor, nn

import fastadapters

pytestmark = pytest.mark.usefixtures("seeded_on_one_thread")
D = 32
SIZES = {
    "hidden_size": D, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
}  # fmt: skip
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def bert() -> Any:
    config = transformers.BertConfig(
        vocab_size=50, max_position_embeddings=16, **SIZES, **NO_DROPOUT
    )
    return transformers.BertModel(config, add_pooling_layer=False)


def vit() -> Any:
    config = transformers.ViTConfig(image_size=8, patch_size=4, **SIZES, **NO_DROPOUT)
    return transformers.ViTModel(config, add_pooling_layer=False)


def clip() -> Any:
    text = {"vocab_size": 50, "max_position_embeddings": 16, "eos_token_id": 1, **SIZES}
    vision = {"image_size": 8, "patch_size": 4, **SIZES}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=D)
    return transformers.CLIPModel(config)


MODELS = {"bert": bert, "vit": vit, "clip": clip}


def with_adapters(model: Any, config: Any, names: tuple[str, ...] = ("a",)) -> Any:
    """The model with trainable adapters, none of whose projections is zero."""
    adapters.init(model)
    for name in names:
        model.add_adapter(name, config=config)
    model.train_adapter(names[0] if len(names) == 1 else composition.Stack(*names))
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        if ".adapters." in name or "scaling" in name:
            p.data = torch.randn(p.shape, generator=generator) * 0.1 + (
                p.data if p.dim() < 2 else 0
            )
    return model


def tokens() -> Tensor:
    return torch.randint(2, 50, (4, 7), generator=torch.Generator().manual_seed(1))


def output(model: Any) -> Tensor:
    dtype = next(model.parameters()).dtype
    pixels = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(2)).to(dtype)
    if "CLIP" in type(model).__name__:
        torch.set_default_dtype(dtype)  # the causal mask's
        try:
            out: Tensor = model(input_ids=tokens(), pixel_values=pixels).logits_per_image
        finally:
            torch.set_default_dtype(torch.float32)
        return out
    inputs = {"pixel_values": pixels} if "ViT" in type(model).__name__ else {"input_ids": tokens()}
    out = model(**inputs).last_hidden_state
    return out


def loss(model: nn.Module) -> Tensor:
    y = output(model)
    return (y - torch.linspace(-1, 1, y.shape[-1], dtype=y.dtype)).square().mean()


CONFIGS: dict[str, Any] = {
    "seq_bn": "seq_bn",
    "double_seq_bn": "double_seq_bn",
    "par_bn": "par_bn",
    "mam": "mam",
    "adapter_plus": adapters.AdapterPlusConfig(stochastic_depth=0.0, reduction_factor=4),
    "learned scale": adapters.SeqBnConfig(scaling="learned", reduction_factor=4),
    "layer norms": adapters.SeqBnConfig(
        ln_before=True, ln_after=True, adapter_residual_before_ln=True, reduction_factor=4
    ),
    "residual behind": adapters.SeqBnConfig(ln_after=True, adapter_residual_before_ln=False),
}


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("model", ["bert", "vit"])
def test_trains_the_same(model: str, config: str) -> None:
    report = assert_trains_the_same(with_adapters(MODELS[model](), CONFIGS[config]), loss)
    assert {*report.replaced.values()} == {"adapters"} and not report.skipped
    assert len(report.replaced) == (4 if config == "double_seq_bn" else 2)


def test_clip_trains_the_same() -> None:
    report = assert_trains_the_same(with_adapters(clip(), CONFIGS["adapter_plus"]), loss)
    assert len(report.replaced) == 4 and not report.skipped


SETUPS = {
    "stack": composition.Stack("a", "b"),
    "fuse": composition.Fuse("a", "b"),
    "parallel": composition.Parallel("a", "b"),
    "split": composition.Split("a", "b", splits=[3, 4]),
    "batch split": composition.BatchSplit("a", "b", batch_sizes=[1, 3]),
    "average": composition.Average("a", "b", weights=[0.3, 0.7]),
}


@pytest.mark.parametrize("setup", SETUPS)
def test_compositions(setup: str) -> None:
    """Fuse reads the up-projection alone: no residual may be in it."""
    model = with_adapters(bert(), "seq_bn", ("a", "b"))
    if setup == "fuse":
        model.add_adapter_fusion(SETUPS[setup])
        model.train_adapter_fusion(SETUPS[setup], unfreeze_adapters=True)
    else:
        model.active_adapters = SETUPS[setup]
    report = assert_trains_the_same(model, loss)
    assert len(report.replaced) == 4 and not report.skipped


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"use_gating": True}, "gating: the gate is the mean over all tokens"),
        ({"phm_layer": True, "phm_dim": 2, "reduction_factor": 4}, ".*PHMLayer.*"),
        ({"non_linearity": "tanh"}, ".*Tanh: no op has this activation"),
        ({"non_linearity": "leakyrelu"}, ".*leaky_relu.*: no op has this activation"),
    ],
)
def test_skipped(options: dict[str, Any], reason: str) -> None:
    model = with_adapters(bert(), adapters.SeqBnConfig(**{"reduction_factor": 8, **options}))
    expected = output(model)
    with pytest.warns(UserWarning, match="replaced nothing"):
        report = fastadapters.patch(model)
    assert len(report.skipped) == 2
    for said in report.skipped.values():
        assert re.fullmatch(reason, said), said
    assert torch.equal(output(model), expected)


def test_an_adapter_by_itself_is_skipped() -> None:
    """Its caller might read the second result."""
    model = with_adapters(bert(), "seq_bn")
    single = model.encoder.layer[0].output.adapters["a"]
    with pytest.warns(UserWarning, match="what is around it may read its second result"):
        fastadapters.patch(single)


class Halve(nn.Module):
    """Stands for torchvision's StochasticDepth."""

    def forward(self, x: Tensor) -> Tensor:
        return x / 2 if self.training else x


@pytest.mark.parametrize("training", [True, False])
def test_what_is_behind_the_up_projection_is_the_clients(training: bool) -> None:
    """Dropout, whose mask is PyTorch's own, and stochastic depth."""
    config = adapters.SeqBnConfig(dropout=0.5, scaling="channel", reduction_factor=4)
    own = with_adapters(bert(), config)
    for layer in own.encoder.layer:
        layer.output.adapters["a"].DropPath = Halve()
    own.train(training)
    model = copy.deepcopy(own)
    assert len(fastadapters.patch(model).replaced) == 2
    results = []
    for m in (own, model):
        torch.manual_seed(3)
        results.append(output(m))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


def test_hooks_get_what_the_client_gives() -> None:
    model = with_adapters(bert(), "seq_bn")
    fastadapters.patch(model)
    seen: list[Any] = []
    adapter = model.encoder.layer[0].output.adapters["a"]
    adapter.register_forward_hook(lambda module, args, out: seen.append(out))
    output(model)
    assert [type(t) for t in seen[0]] == [Tensor] * 3


def test_functions_of_the_client_go_on(tmp_path: Path) -> None:
    """Save, load, delete, add, deactivate."""
    own = with_adapters(bert(), "double_seq_bn").eval()
    expected = output(own)
    model = copy.deepcopy(own)
    fastadapters.patch(model)
    model.save_adapter(str(tmp_path / "patched"), "a")
    own.save_adapter(str(tmp_path / "own"), "a")
    states = [
        {p.name: p.stat().st_size for p in (tmp_path / kind).iterdir()}
        for kind in ("own", "patched")
    ]
    assert states[0] == states[1]
    for kind in ("patched", "own"):
        model.load_adapter(str(tmp_path / kind), load_as=kind, set_active=True)
        torch.testing.assert_close(output(model), expected, rtol=1e-4, atol=1e-5)
    report = fastadapters.patch(model)
    assert len(report.replaced) == 12
    for kind in ("patched", "own"):
        model.set_active_adapters(kind)
        torch.testing.assert_close(output(model), expected, rtol=1e-4, atol=1e-5)
        model.delete_adapter(kind)
    model.set_active_adapters(None)
    own.set_active_adapters(None)
    assert torch.equal(output(model), output(own))


def test_heads_and_whole_models_load(tmp_path: Path) -> None:
    own = with_adapters(bert(), "par_bn")
    patched = copy.deepcopy(own)
    fastadapters.patch(patched)
    patched.save_all_adapters(str(tmp_path / "adapters"))
    patched.save_pretrained(str(tmp_path / "model"))
    loaded = transformers.BertModel.from_pretrained(tmp_path / "model", add_pooling_layer=False)
    adapters.init(loaded)
    loaded.load_adapter(str(tmp_path / "adapters" / "a"))
    loaded.set_active_adapters("a")
    torch.testing.assert_close(output(loaded.eval()), output(patched.eval()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ln_before": True, "scaling": "learned"},
        {"ln_after": True, "adapter_residual_before_ln": False},
        {"is_parallel": True, "scaling": 4.0},
    ],
)
@pytest.mark.parametrize("patched", [False, True])
def test_from_module(patched: bool, options: dict[str, Any]) -> None:
    config = adapters.SeqBnConfig(**{"reduction_factor": 4, "non_linearity": "gelu", **options})
    model = with_adapters(bert(), config)
    module = model.encoder.layer[0].output.adapters["a"]
    x, residual = torch.randn(3, 5, D), torch.randn(3, 5, D)
    expected, _, up = module(x, residual)
    if patched:
        fastadapters.patch(model)
    ours = fastadapters.BottleneckAdapter.from_module(module)
    parallel = "is_parallel" in options
    torch.testing.assert_close(ours(x, None if parallel else residual), expected)
    if "ln_after" not in options:
        torch.testing.assert_close(ours(x, add_residual=False), up)
    assert {id(p) for p in ours.parameters()} == {id(p) for p in module.parameters()}


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"dropout": 0.1}, "dropout or stochastic depth is behind the up-projection"),
        (
            {"ln_after": True, "adapter_residual_before_ln": True},
            "the LayerNorm is behind the residual",
        ),
        (
            {"ln_before": True, "ln_after": True, "adapter_residual_before_ln": False},
            "there are two LayerNorms",
        ),
        ({"use_gating": True}, "gating"),
    ],
)
def test_from_module_errors(options: dict[str, Any], reason: str) -> None:
    model = with_adapters(bert(), adapters.SeqBnConfig(reduction_factor=4, **options))
    with pytest.raises(ValueError, match=f"module: {reason}"):
        fastadapters.BottleneckAdapter.from_module(model.encoder.layer[0].output.adapters["a"])
