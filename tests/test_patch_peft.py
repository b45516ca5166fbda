"""`patch` on LoRA of `peft`, in BERT and in a Llama whose attention has fewer heads of keys."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from same_training import assert_trains_the_same
from torch import Tensor, nn

import fastadapters

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("seeded_on_one_thread")
D = 32


def bert(**options: Any) -> Any:
    """Random weights; LoRA on its square and on its rectangular layers, B not zero."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=D, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=16, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    options = {"r": 4, "target_modules": ["query", "value", "output.dense"], **options}
    lora = peft.LoraConfig(init_lora_weights=False, **options)
    return peft.get_peft_model(transformers.BertModel(config, add_pooling_layer=False), lora)


def tokens(seed: int = 0) -> Tensor:
    return torch.randint(50, (3, 7), generator=torch.Generator().manual_seed(seed))


def output(model: nn.Module) -> Tensor:
    y: Tensor = model(input_ids=tokens()).last_hidden_state
    return y


def loss(model: nn.Module) -> Tensor:
    y = output(model)
    return (y - torch.linspace(-1, 1, D, dtype=y.dtype)).square().mean()


def test_bert_trains_the_same() -> None:
    report = assert_trains_the_same(bert(), loss)
    inside = "base_model.model.encoder.layer"
    names = ["attention.self.query", "attention.self.value", "attention.output.dense"]
    names.append("output.dense")  # 64 to 32 channels
    assert report.replaced == {f"{inside}.{i}.{n}": "peft" for i in range(2) for n in names}
    assert not report.skipped


@pytest.mark.parametrize("options", [{"lora_bias": True}, {"use_rslora": True}, {"r": 40}])
def test_options(options: dict[str, Any]) -> None:
    assert_trains_the_same(bert(**options), loss)


def linear(p: float) -> tuple[Any, Any]:
    """LoRA on a layer of 64 to 96 channels with dropout ``p``, and its patched copy."""
    lora = peft.LoraConfig(r=4, target_modules=["0"], lora_dropout=p, init_lora_weights=False)
    torch.manual_seed(0)
    own = peft.get_peft_model(nn.Sequential(nn.Linear(64, 96)), lora).train()
    model = copy.deepcopy(own)
    assert len(fastadapters.patch(model).replaced) == 1
    return own, model


def test_dropout_in_front_is_the_op_s() -> None:
    """Another mask of the same distribution: mean and variance over many rows; none in eval."""
    own, model = linear(0.5)
    row = torch.randn(1, 64)
    x = row.expand(20_000, 64)
    with fastadapters.backend("cpu"):
        assert {d.backend for d in fastadapters.explain(model, x)} == {"cpu"}
    with torch.no_grad():
        ys = [m(x) for m in (own, model)]
    assert (ys[0] - ys[1]).abs().max() > 0.01
    spread = ys[0].std(0)
    assert (ys[0].mean(0) - ys[1].mean(0)).abs().div(spread).max() < 0.06
    torch.testing.assert_close(ys[1].std(0), spread, rtol=0.06, atol=0)
    own.eval(), model.eval()
    torch.testing.assert_close(model(row), own(row), rtol=1e-4, atol=1e-5)


def test_dropout_with_a_hook_is_called() -> None:
    """The same mask, drawn by the same module."""
    own, model = linear(0.5)
    x, ys, calls = torch.randn(9, 64), [], []
    for m in (own, model):
        layer = m.base_model.model[0].lora_dropout["default"]
        layer.register_forward_hook(lambda *args: calls.append(args[1]))
        torch.manual_seed(1)
        ys.append(m(x))
    assert len(calls) == 2
    torch.testing.assert_close(ys[1], ys[0], rtol=1e-4, atol=1e-5)


def test_dora_is_skipped() -> None:
    with pytest.warns(UserWarning, match="replaced nothing; skipped"):
        report = fastadapters.patch(bert(use_dora=True, target_modules=["query"]))
    assert {*report.skipped.values()} == {"default is a variant of LoRA: DoraLinearVariant"}


def test_functions_of_peft_go_on(tmp_path: Path) -> None:
    """Save and load, several adapters, disabling, merging, mixed batches, unloading."""
    own = bert(target_modules=["query"])
    own.add_adapter(
        "other", peft.LoraConfig(r=2, target_modules=["query"], init_lora_weights=False)
    )
    own.eval()
    model = copy.deepcopy(own)
    fastadapters.patch(model)

    def same() -> Tensor:
        expected = output(own)
        torch.testing.assert_close(output(model), expected, rtol=1e-4, atol=1e-5)
        return expected

    first = same()
    for m in (own, model):
        m.set_adapter("other")
    assert (same() - first).abs().max() > 1e-3
    for m in (own, model):
        m.base_model.set_adapter(["default", "other"])
    same()
    names = ["default", "other", "__base__"]
    mixed = [m(input_ids=tokens(), adapter_names=names).last_hidden_state for m in (own, model)]
    assert torch.equal(*mixed)
    for m in (own, model):
        m.set_adapter("default")
    with own.disable_adapter(), model.disable_adapter():
        assert torch.equal(output(model), output(own))
    for m in (own, model):
        m.merge_adapter()
    assert torch.equal(output(model), output(own))
    for m in (own, model):
        m.unmerge_adapter()
    same()
    model.save_pretrained(tmp_path)
    state = peft.get_peft_model_state_dict(model)
    assert state.keys() == peft.get_peft_model_state_dict(own).keys()
    loaded = peft.PeftModel.from_pretrained(own.get_base_model(), tmp_path, adapter_name="loaded")
    torch.testing.assert_close(output(loaded), output(model), rtol=1e-4, atol=1e-5)
    fastadapters.patch(loaded)
    assert torch.equal(output(loaded), output(model))
    merged = [m.merge_and_unload() for m in (own, model)]
    assert not any("lora" in type(m).__module__ for m in merged[1].modules())
    torch.testing.assert_close(output(merged[1]), output(merged[0]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_mixed_precision(autocast: bool, base: torch.dtype) -> None:
    """A bf16 model with fp32 adapters, as peft makes it, and autocast."""
    own = bert().to(base)
    for name, p in own.named_parameters():
        if "lora" in name:
            p.data = p.data.float()
    model = copy.deepcopy(own)
    fastadapters.patch(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected, got = output(own), output(model)
    torch.testing.assert_close(got, expected, rtol=0.05, atol=0.05)


def test_llama_with_grouped_queries() -> None:
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=D, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=64,
    )  # fmt: skip
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    lora = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
    report = assert_trains_the_same(
        peft.get_peft_model(transformers.LlamaModel(config), lora), loss
    )
    assert sorted(n.rpartition(".")[2] for n in report.replaced) == sorted(targets)
