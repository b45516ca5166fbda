"""A training step of ViT-B/16 with an adapter in every block, ours against the published module.

The backbone is frozen and random, the images are real. Adapters and head are trained. The class
token asks for a gradient in every form, so that the step without adapters also runs backward
through the trunk: the difference is the adapters' share, the most that faster ones can gain.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastadapters.modules import BottleneckAdapter
from tests.compare import check_all, last_bit

from .adaptformer import Adapter, Block
from .harness import Row, malloc, measure
from .noise import interval, is_settled, ratios

BATCH, BOTTLENECK, SCALE, CLASSES = 2, 64, 0.1, 12
QUICK = ("float32",)  # the dtypes measured without --full


class NoAdapter(nn.Module):
    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return residual


def images() -> tuple[Tensor, Tensor]:
    """scikit-learn's digits, enlarged, and crops of its two photographs: [n, 3, 224, 224]."""
    from sklearn.datasets import load_digits, load_sample_images

    digits = load_digits()
    pixels = torch.from_numpy(digits.images[:48]).float()[:, None].expand(-1, 3, -1, -1)
    pictures = [F.interpolate(pixels / 8.0 - 1.0, size=(224, 224), mode="bilinear")]
    labels = [*digits.target[:48]]
    for label, photograph in enumerate(load_sample_images().images, start=10):
        whole = torch.from_numpy(np.array(photograph)).permute(2, 0, 1) / 127.5 - 1.0
        crops = [whole[:, 25 * i : 25 * i + 224, 50 * i : 50 * i + 224] for i in range(8)]
        pictures.append(torch.stack(crops))
        labels += [label] * len(crops)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return torch.cat(pictures)[order], torch.tensor(labels)[order]


class Trainer(nn.Module):
    """One form of adapter in the shared frozen backbone, with its own head and optimizer."""

    pixels: Tensor
    labels: Tensor

    def __init__(self, backbone: nn.Module, make_adapter: Callable[[int], nn.Module]) -> None:
        super().__init__()
        token = backbone.embeddings.cls_token
        dim = token.shape[-1]
        self.backbone, self.losses = backbone, []
        self.adapters = nn.ModuleList(make_adapter(dim) for _ in backbone.layers)
        self.head = nn.Linear(dim, CLASSES)
        for name, value in zip(("pixels", "labels"), images(), strict=True):
            self.register_buffer(name, value)
        self.to(token.device, token.dtype)
        self.optimizer = torch.optim.AdamW(
            [*self.adapters.parameters(), *self.head.parameters()], lr=1e-3
        )

    def loss(self, images: Tensor) -> Tensor:
        for block, adapter in zip(self.backbone.layers, self.adapters, strict=True):
            block.adapter = adapter
        out = self.backbone(self.pixels[images]).last_hidden_state[:, 0]
        return F.cross_entropy(self.head(out).float(), self.labels[images])

    def step(self) -> None:
        self.zero_grad()
        first = len(self.losses) * BATCH
        loss = self.loss(torch.arange(first, first + BATCH) % len(self.labels))
        loss.backward()
        self.losses.append(loss.item())
        self.optimizer.step()

    @torch.no_grad()
    def image_off_kink(self) -> Tensor:
        """The image of the first batch whose adapters' z keep the largest distance from 0.

        Where rounding pushes a z across relu's kink, the gradients of two right forms differ.
        """
        distances: list[Tensor] = []
        exact = copy.deepcopy(self).double()
        for adapter in exact.adapters:
            adapter.down_proj.register_forward_hook(
                lambda module, args, z: distances.append(z.abs().flatten(1).amin(1))
            )
        exact.loss(torch.arange(BATCH))
        return torch.stack(distances).amin(0).argmax()[None]

    def gradient(self, image: Tensor, dtype: torch.dtype, draw: int = 0) -> dict[str, Tensor]:
        """Of all adapters for one image, with everything in ``dtype``, as one vector."""
        other = copy.deepcopy(self)
        for p in other.adapters.parameters():
            p.data = last_bit(p.data, draw, p.dtype)
        other.to(dtype).loss(image).backward()
        parameters = sorted(other.adapters.named_parameters())
        return {"gradient of all adapters": torch.cat([p.grad.flatten() for _, p in parameters])}


def share(samples: dict[str, list[float]]) -> tuple[float, float]:
    """What of the published step the adapters take, as an interval."""
    pairs = zip(samples["without adapters"], samples["reference"], strict=True)
    return interval([1.0 - without / published for without, published in pairs])


def said(share: tuple[float, float], gain: tuple[float, float]) -> str:
    """Both intervals in words."""
    low, high = share
    if low <= 0.0:
        what = f"the adapters' share of the published step is below the noise, {low:.1%} to"
        what += f" {high:.1%}"
    else:
        what = f"adapters take {low:.1%} to {high:.1%} of the published step: without them it"
        what += f" would be at most {1 / (1 - high):.2f} x as fast"
    return f"{what}; with ours it is {gain[0]:.2f} to {gain[1]:.2f} x as fast"


def test_vit_training_step(record, dtype, threads, pytestconfig):
    transformers = pytest.importorskip("transformers")
    device, full = pytestconfig.getoption("--device"), pytestconfig.getoption("--full")
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    backbone = transformers.ViTModel(transformers.ViTConfig(), add_pooling_layer=False)
    backbone.requires_grad_(False).to(device, dtype)
    backbone.embeddings.cls_token.requires_grad_()
    backbone.layers = nn.ModuleList(Block(layer, NoAdapter()) for layer in backbone.layers)
    published = Trainer(backbone, lambda dim: Adapter(dim, BOTTLENECK, SCALE))
    ours = Trainer(backbone, lambda dim: BottleneckAdapter(dim, BOTTLENECK, scale=SCALE))
    without = Trainer(backbone, lambda dim: NoAdapter())
    for p in published.parameters():  # not the zeros of a fresh adapter: every gradient is to show
        if p.requires_grad:
            nn.init.normal_(p, std=0.02)
    ours.adapters.load_state_dict(published.adapters.state_dict())
    for other in (ours, without):
        other.head.load_state_dict(published.head.state_dict())
    image = published.image_off_kink()
    right = "yes"
    try:
        check_all(
            ours.gradient(image, dtype),
            lambda d: tuple(published.gradient(image, t, d) for t in (torch.float64, dtype)),
        )
    except AssertionError as error:
        right = str(error).splitlines()[0]
    row = Row(
        "end to end", f"ViT-B/16, AdaptFormer r {BOTTLENECK}, batch {BATCH}", "training step",
        str(dtype).removeprefix("torch."), device, threads, malloc(), "", right, {}, {}, {},
    )  # fmt: skip
    if right != "yes":
        record(row, [])
    steps = {"ours": ours.step, "reference": published.step, "without adapters": without.step}
    for step in steps.values():
        step()
    samples = measure(
        steps,
        device,
        budget=120.0 if full else 40.0,
        min_rounds=6,
        settled=lambda samples: is_settled(*share(samples), 0.0),
    )
    seconds = {name: statistics.median(values) for name, values in samples.items()}
    rounds = len(samples["ours"])
    difference = max(abs(a - b) for a, b in zip(ours.losses, published.losses, strict=True))
    notes = (
        f"{rounds} rounds; {said(share(samples), ratios(samples, ['reference'])['reference'])}; "
        f"loss over {len(ours.losses)} steps {ours.losses[0]:.4f} to {ours.losses[-1]:.4f}, "
        f"published {published.losses[0]:.4f} to {published.losses[-1]:.4f}, at most "
        f"{difference:.1e} apart"
    )
    record(row._replace(seconds=seconds, notes=notes), samples["ours"])
