"""AdaptFormer in a ViT of transformers, on our ops by one call of `fastadapters.patch`.

python -m examples.adaptformer_vit    draws docs/examples/adaptformer_vit.png, in half a minute

The backbone is frozen (and random, for want of a network); adapters and head learn scikit-learn's
digits.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from sklearn.datasets import load_digits
from torch import Tensor, nn

import fastadapters
from benches.adaptformer import Block
from tests.published import AdaptFormer

from .side_by_side import Form, Run, place, report, train


class Classifier(nn.Module):
    """A ViT with AdaptFormer's adapter beside each MLP; what is not of them is frozen."""

    def __init__(self, config: transformers.ViTConfig, bottleneck: int) -> None:
        super().__init__()
        vit = transformers.ViTModel(config, add_pooling_layer=False).requires_grad_(False)
        dim = config.hidden_size
        vit.layers = nn.ModuleList(
            Block(layer, AdaptFormer(dim, bottleneck, scale=0.1)) for layer in vit.layers
        )
        self.vit, self.head = vit, nn.Linear(dim, 10)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.vit(images).last_hidden_state.mean(dim=1))
        return logits


def digits(size: int) -> tuple[Tensor, Tensor]:
    """[n, 1, size, size] and labels."""
    data = load_digits()
    pixels = torch.from_numpy(data.images).float()[:, None] / 8.0 - 1.0
    return F.interpolate(pixels, size=(size, size), mode="bilinear"), torch.from_numpy(data.target)


def main(
    out: Path, dim: int = 192, layers: int = 4, bottleneck: int = 32, batch: int = 16,
    steps: int = 40,
) -> dict[str, Run]:  # fmt: skip
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=dim, intermediate_size=2 * dim, num_hidden_layers=layers,
        num_attention_heads=4, image_size=32, patch_size=4, num_channels=1,
    )  # fmt: skip
    images, labels = digits(config.image_size)
    published = Classifier(config, bottleneck)
    ours = copy.deepcopy(published)
    print(fastadapters.patch(ours))

    def form(model: nn.Module) -> Form:
        def loss(step: int) -> Tensor:
            items = torch.arange(step * batch, (step + 1) * batch) % len(labels)
            return F.cross_entropy(model(images[items]), labels[items])

        return Form([p for p in model.parameters() if p.requires_grad], loss)

    runs = train({"published": form(published), "fastadapters": form(ours)}, steps, lr=1e-2)
    report(runs, f"AdaptFormer, {layers} layers, D {dim}, r {bottleneck}, batch {batch}", out)
    return runs


if __name__ == "__main__":
    main(place("adaptformer_vit"))
