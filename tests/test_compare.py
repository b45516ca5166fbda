"""The tolerance rule: what it lets pass, and what not."""

from __future__ import annotations

import pytest
import torch
from compare import Tensors, check_all, last_bit
from torch import Tensor


def noise(size: int, seed: int) -> Tensor:
    """Rounding errors, as large as those of a sum of a few terms."""
    gen = torch.Generator().manual_seed(seed)
    return 1e-6 * torch.randn(size, generator=gen)


def pair_of(gold: Tensor, lucky: bool = False):
    """(gold, base) of a draw; if ``lucky``, the first base is exact."""

    def pair(draw: int) -> tuple[Tensors, Tensors]:
        base = gold if lucky and draw == 0 else gold + noise(gold.numel(), 1 + draw)
        return {"t": gold.double()}, {"t": base}

    return pair


def test_errors_like_those_of_base_pass_whatever_the_size() -> None:
    for size in (1, 3, 1000):
        gold = torch.zeros(size)
        for seed in range(1000, 1100):
            check_all({"t": noise(size, seed)}, pair_of(gold))


@pytest.mark.parametrize("size", [1, 3, 40])
def test_a_base_that_is_exact_by_luck_is_drawn_again(size: int) -> None:
    check_all({"t": noise(size, 1000)}, pair_of(torch.zeros(size), lucky=True))


@pytest.mark.parametrize("size", [100, 1000, 30000])
def test_twice_the_errors_fail_where_there_are_enough(size: int) -> None:
    with pytest.raises(AssertionError, match=r"t: (rms|max) error"):
        check_all({"t": 2.0 * noise(size, 1000)}, pair_of(torch.zeros(size)))


def test_one_wrong_element_fails() -> None:
    out = noise(100_000, 1000)
    out[77] = 2e-5
    with pytest.raises(AssertionError, match="max error"):
        check_all({"t": out}, pair_of(torch.zeros(100_000)))


def test_dtype_shape_and_names_count() -> None:
    gold = torch.zeros(3)
    for out in ({"t": gold.bfloat16()}, {"t": gold[:2]}, {"u": gold}, {"t": gold / 0}):
        with pytest.raises(AssertionError):
            check_all(out, pair_of(gold))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_last_bit_is_not_lost_where_the_op_rounds(dtype: torch.dtype) -> None:
    t = torch.rand(1000) + 1.0
    assert torch.equal(last_bit(t, 0, dtype), t)
    moved = last_bit(t, 1, dtype)
    changed = (moved.to(dtype) != t.to(dtype)).float().mean()
    assert changed > 0.3
    assert (moved.double() / t.double() - 1).abs().max() <= 1.5 * torch.finfo(dtype).eps
