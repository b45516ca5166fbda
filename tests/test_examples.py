"""Each example runs, small: ours trains as the published module does, and a picture comes out."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parent.parent))

SMALL: dict[str, dict[str, Any]] = {
    "adaptformer_vit": {"dim": 32, "layers": 1, "bottleneck": 8, "batch": 4},
    "clip_few_shot": {"classes": 7, "shots": 2, "dim": 32, "attn_dim": 16, "batch": 4},
    "grouped_tasks": {"tasks": 3, "dim": 24, "bottleneck": 4, "items": 8, "tokens": 3},
    "wander_ragged": {"dim": 24, "bottleneck": 4, "items": 8, "batch": 4},
}


def test_every_example_is_here() -> None:
    files = (Path(__file__).parent.parent / "examples").glob("*.py")
    assert {f.stem for f in files} - {"__init__", "side_by_side"} == set(SMALL)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.usefixtures("seeded_on_one_thread")
def test_example(name: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    example = importlib.import_module(f"examples.{name}")
    picture = tmp_path / "pictures" / f"{name}.png"
    runs = example.main(picture, steps=3, **SMALL[name])
    assert list(runs) == ["published", "fastadapters"]
    for ours, published in zip(*(run.losses for run in runs.values()), strict=True):
        assert ours == pytest.approx(published, rel=1e-4)
    assert len({*runs["fastadapters"].losses}) == 3  # it trains
    assert picture.read_bytes().startswith(b"\x89PNG")
