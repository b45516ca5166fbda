"""The dropout stream against the published known answers, and its statistics."""

from __future__ import annotations

import pytest
import torch

from fastadapters.reference import philox

# Known answers of Philox4x32-10 from the Random123 distribution: counter, key, result.
KNOWN = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(counter: list[int], key: list[int], expected: list[int]) -> None:
    words = philox.philox4x32(
        tuple(torch.tensor(c) for c in counter), tuple(torch.tensor(k) for k in key)
    )
    assert words.tolist() == expected


def test_bits_depend_on_row_and_column_alone() -> None:
    seed = torch.tensor([123456789123456789, 42])
    full = philox.random_bits(seed, 50, 10)
    assert torch.equal(full[:7], philox.random_bits(seed, 7, 10))
    assert torch.equal(full[:, :9], philox.random_bits(seed, 50, 9))
    assert not torch.equal(full, philox.random_bits(seed + 1, 50, 10))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_share_dropped(p: float) -> None:
    seed = torch.tensor([5, 6])
    multiplier = philox.dropout_multiplier(seed, 400, 250, p, torch.float64)
    kept = multiplier != 0
    sigma = (p * (1 - p) / kept.numel()) ** 0.5
    assert abs(1 - kept.double().mean().item() - p) < 5 * sigma
    assert torch.equal(multiplier[kept], torch.full_like(multiplier[kept], 1 / (1 - p)))
