"""The modules inside a model of Hugging Face: initial values, loading, saving."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from module_cases import KINDS, D, every_module, randn
from torch import Tensor, nn

from fastadapters import BottleneckAdapter

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("seeded_on_one_thread")


class Config(transformers.PretrainedConfig):  # type: ignore[misc, name-defined]
    model_type = "tests-adapted"


class Trunk(transformers.PreTrainedModel):  # type: ignore[misc, name-defined]
    """A model without an adapter."""

    config_class = Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.layer = nn.Linear(D, D)
        self.add_adapters()
        self.post_init()

    def add_adapters(self) -> None:
        pass


class Adapted(Trunk):
    def add_adapters(self) -> None:
        self.adapter = BottleneckAdapter(D, 7, layernorm="in", scale="learnable")

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.adapter(self.layer(x))
        return y

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, BottleneckAdapter):
            module.reset_parameters()


@every_module
def test_post_init_leaves_initial_values_alone(kind: str) -> None:
    expected: dict[str, Tensor] = {}

    class Model(Trunk):
        def add_adapters(self) -> None:
            self.adapter = KINDS[kind][0]()
            expected.update({n: t.clone() for n, t in self.adapter.state_dict().items()})

    model = Model(Config())
    for name, t in model.adapter.state_dict().items():
        assert torch.equal(t, expected[name]), name
    assert model.layer.weight.std() < 0.03  # Hugging Face's 0.02, not PyTorch's 0.12


def test_adapters_added_to_a_pretrained_trunk(tmp_path: Path) -> None:
    """The trunk's checkpoint has none of them: they start as the identity."""
    trunk = Trunk(Config())
    trunk.save_pretrained(tmp_path)
    model = Adapted.from_pretrained(tmp_path)
    assert torch.equal(model.layer.weight, trunk.layer.weight)
    x = randn(3, D)
    assert torch.equal(model(x), model.layer(x))
    assert model.adapter.down_proj.weight.abs().max() > 0.1  # Kaiming-uniform


def test_save_and_load(tmp_path: Path) -> None:
    model = Adapted(Config())
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p))
    model.save_pretrained(tmp_path)
    loaded: Any = Adapted.from_pretrained(tmp_path)
    for name, p in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), p), name
