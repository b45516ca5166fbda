"""The modules inside a model of Hugging Face: initial values, loading, saving."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from module_cases import KINDS, D, every_module, randn, randomize, reset
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
        self.adapter = BottleneckAdapter(D, 7)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.adapter(self.layer(x))
        return y


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
    """The trunk's checkpoint has none of them: they start as the identity once they are reset.

    An `_init_weights` that resets them is not enough: for a class of a user's, Hugging Face calls
    it on no module without parameters of its own.
    """
    trunk = Trunk(Config())
    trunk.save_pretrained(tmp_path)
    model, info = Adapted.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == {f"adapter.{key}" for key in model.adapter.state_dict()}
    model.adapter.reset_parameters()
    assert torch.equal(model.layer.weight, trunk.layer.weight)
    x = randn(3, D)
    assert torch.equal(model(x), model.layer(x))
    assert model.adapter.down_proj.weight.abs().max() > 0.1  # Kaiming-uniform


@every_module
def test_every_module_added_saved_and_loaded(kind: str, tmp_path: Path) -> None:
    class Model(Trunk):
        def add_adapters(self) -> None:
            self.adapter = KINDS[kind][0]()

    Trunk(Config()).save_pretrained(tmp_path / "trunk")
    model: Any = Model.from_pretrained(tmp_path / "trunk")
    reset(model.adapter)
    for name, p in model.named_parameters():
        assert p.abs().max() < 5, name
    randomize(model)
    model.save_pretrained(tmp_path / "all")
    loaded, info = Model.from_pretrained(tmp_path / "all", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for name, p in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), p), name
