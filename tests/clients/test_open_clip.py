"""What docs/designs/multimodal.md says of `open_clip`, on a model of random weights."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import fastadapters
from fastadapters import MultiModalAdapter

try:
    import torchvision  # noqa: F401
except RuntimeError:
    # A build for CUDA beside a CPU build of PyTorch loads no library, but wants to say what ops of
    # it give.
    missing = torch.library.Library("torchvision", "DEF")
    missing.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    missing.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
import open_clip

pytestmark = pytest.mark.usefixtures("seeded_on_one_thread")
PAGE = Path(__file__).parents[2] / "docs" / "designs" / "multimodal.md"


def test_the_lines_of_the_docs_train() -> None:
    """Logits by the definition of the head, from features that open_clip has not normalised."""
    (code,) = re.findall(r"^```py\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    torch.manual_seed(0)
    head = MultiModalAdapter(64, attn_dim=32, upsample="mlp")
    names: dict[str, Any] = {
        "torch": torch, "head": head, "prompts": torch.randint(3, 100, (50, 8)),
        "pixels": torch.randn(16, 3, 32, 32),
    }  # fmt: skip
    exec(compile(code, str(PAGE), "exec"), names)
    clip, logits = names["clip"], names["logits"]
    assert type(clip) is open_clip.CLIP and logits.shape == (16, 50)
    text, image = names["class_features"], names["image_features"]
    assert not torch.allclose(text.norm(dim=-1), torch.ones(50))

    new_text, new_image = head(text, image)
    blended = []
    for new, old in ((new_text, text), (new_image, image)):
        unit = 0.2 * F.normalize(new, dim=-1) + 0.8 * F.normalize(old, dim=-1)
        blended.append(F.normalize(unit, dim=-1))
    expected = torch.einsum("bcd,bd->bc", *blended) / 0.07
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    with fastadapters.backend("reference"):
        again = head.logits(text, image, clip.logit_scale.exp())
    torch.testing.assert_close(logits, again, rtol=1e-4, atol=1e-4)

    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2)
    losses = []
    for _ in range(5):
        loss = F.cross_entropy(head.logits(text, image, clip.logit_scale.exp()), torch.arange(16))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and not any(p.requires_grad for p in clip.parameters())
