"""A few-shot head on the features of CLIP: clip-mma's adapter, and ours in its place.

python -m examples.clip_few_shot      draws docs/examples/clip_few_shot.png, in 30 seconds

The features are drawn: a direction for each class, which texts and images see through two
different noises, as CLIP's two towers do. With a CLIP at hand they are what `get_text_features` and
`get_image_features` of transformers, or `encode_text` and `encode_image` of open_clip give.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastadapters import MultiModalAdapter
from tests.published import MaskedAttentionDownsampled

from .side_by_side import Form, Run, place, report, train

SCALE, BLEND = 50.0, 0.2


def features(classes: int, shots: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Texts [C, D], images [C * shots, D], labels [C * shots]."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    directions = randn(classes, dim)
    text = directions + 2.0 * randn(classes, dim) + randn(dim)
    labels = torch.arange(classes).repeat(shots)
    image = directions[labels] + 4.0 * randn(len(labels), dim) + randn(dim)
    return text, image, labels


def published_logits(adapter: nn.Module, text: Tensor, image: Tensor) -> Tensor:
    """As in clip-mma: tokens [C + 1, B, D] through the adapter, both features blended."""
    tokens = torch.cat([text[:, None].expand(-1, len(image), -1), image[None]])
    adapted = F.normalize(adapter(tokens), dim=-1)
    blended = F.normalize(BLEND * adapted + (1.0 - BLEND) * tokens, dim=-1)
    logits: Tensor = SCALE * (blended[:-1] * blended[-1]).sum(dim=-1).T
    return logits


def main(
    out: Path, classes: int = 100, shots: int = 2, dim: int = 512, attn_dim: int = 128,
    batch: int = 32, steps: int = 40,
) -> dict[str, Run]:  # fmt: skip
    torch.manual_seed(0)
    text, image, labels = features(classes, shots, dim)
    text_unit, image_unit = F.normalize(text, dim=-1), F.normalize(image, dim=-1)
    ours = MultiModalAdapter(
        dim, attn_dim, downsample="factored", upsample="mlp", hidden_dim=8, mask="additive",
        blend=BLEND,
    )  # fmt: skip
    published = MaskedAttentionDownsampled(dim, attn_dim)
    published.load_state_dict(ours.state_dict())
    order = torch.randperm(shots * classes)

    def items(step: int) -> Tensor:
        return order[torch.arange(step * batch, (step + 1) * batch) % len(order)]

    def published_loss(step: int) -> Tensor:
        chosen = items(step)
        return F.cross_entropy(
            published_logits(published, text_unit, image_unit[chosen]), labels[chosen]
        )

    def our_loss(step: int) -> Tensor:
        chosen = items(step)  # nothing as large as the tokens is built
        logits = ours.logits(text_unit, image_unit[chosen], SCALE)
        return F.cross_entropy(logits, labels[chosen])

    forms = {
        "published": Form(published.parameters(), published_loss),
        "fastadapters": Form(ours.parameters(), our_loss),
    }
    runs = train(forms, steps, lr=3e-3)
    report(runs, f"Multi-Modal Adapter on CLIP features, {classes} classes, batch {batch}", out)
    return runs


if __name__ == "__main__":
    main(place("clip_few_shot"))
