"""The CPU kernels of sequence fusion, every instruction set, called as the ops they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from against_reference import Tensors
from compare import check_all
from cpu_kernels import ISAS, choose
from test_sequence_fusion import GROUPS, fuse, sample
from torch import Tensor

import fastadapters
from fastadapters.ops.codes import ACTIVATION_CODES, DTYPE_CODES

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def groups(tensors: Tensors) -> list[list[Tensor]]:
    """The lists of the schema; an absent bias is an empty tensor."""
    modalities = [name.split()[1] for name in tensors if name.startswith("x ")]
    empty = torch.empty(0)
    return [[tensors.get(f"{group} {i}", empty) for i in modalities] for group in GROUPS]


def call(
    kernels: Any,
    tensors: Tensors,
    *,
    dtype: torch.dtype = torch.float32,
    out_dtype: torch.dtype | None = None,
    activation: str = "gelu",
    lengths: Tensor | None = None,
    summed: bool = False,
    leading: bool = False,
    saved_z: bool = True,
    needs: int = -1,
) -> Tensors:
    """``out 0`` and the gradients asked for, named as `against_reference.run` does."""
    inputs, *parameters = groups(tensors)
    codes = DTYPE_CODES[dtype], DTYPE_CODES[out_dtype or dtype]
    options = (lengths, ACTIVATION_CODES[activation], *codes, summed, leading)
    y, products, z = kernels.sequence_fusion_forward(
        inputs, tensors.get("residual"), *parameters, *options, True
    )
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    flat = kernels.sequence_fusion_backward(
        cotangent, inputs, products, z if saved_z else z.new_empty(0), *parameters, *options, needs
    )
    gradients = zip((t for group in (inputs, *parameters) for t in group), flat, strict=True)
    ids = {id(t): name for name, t in tensors.items()}
    results = {"out 0": y}
    for t, gradient in gradients:
        if gradient.numel():
            results[f"d_{ids[id(t)]}"] = gradient
    if "residual" in tensors:
        results["d_residual"] = cotangent
    return results


def reference(tensors: Tensors, compute: torch.dtype, **options: Any) -> Any:
    """What `check_all` wants: gold and base, of `call` with the same ``options``."""
    from against_reference import run
    from compare import last_bit

    def fn(t: Tensors) -> Tensor:
        with torch.autocast("cpu", compute, enabled=autocast and t["x 0"].dtype == torch.float32):
            return fuse(t, **options)

    autocast = any(t.dtype != compute for t in tensors.values())

    def pair(draw: int) -> tuple[Tensors, Tensors]:
        moved = {key: last_bit(t, draw, compute) for key, t in tensors.items()}
        gold = run(fn, {key: t.double() for key, t in moved.items()}, "reference")
        return gold, run(fn, moved, "reference")

    return pair


SAMPLES: list[dict[str, Any]] = [
    {},
    {"rank": 3, "width": 20, "out_len": 5, "dims": (31, 7, 64), "out_dim": 33},
    # Several splits of an item, rows that are no multiple of any block.
    {"lengths": (1, 131, 300), "batch": 2, "width": 33, "out_len": 9, "out_dim": 50},
    # Many items in a unit; a folded down-projection of an odd D.
    {"lengths": (1, 3), "dims": (17, 5), "batch": 150, "width": 4, "out_len": 1, "rank": 2},
    {"lengths": (5, 3, 9, 4, 6, 2, 7, 1), "dims": (16,) * 8, "width": 3, "bias": False},
    {"lengths": (70,), "dims": (700,), "width": 60, "out_len": 40, "residual": False},
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_matches_reference(isa: str, dtype: torch.dtype, kernels: Any) -> None:
    choose(isa)
    for options in SAMPLES:
        tensors = sample(**options, dtype=dtype)
        pair = reference(tensors, dtype)
        for saved_z in (True, False):
            out = call(kernels, tensors, dtype=dtype, saved_z=saved_z)
            check_all(out, pair, f"{options}, z {'saved' if saved_z else 'made again'}")


@pytest.mark.parametrize("isa", ISAS)
def test_activations(isa: str, kernels: Any) -> None:
    choose(isa)
    tensors = sample(rank=2, batch=9)
    for activation in ACTIVATION_CODES:
        pair = reference(tensors, torch.float32, activation=activation)
        check_all(call(kernels, tensors, activation=activation), pair, activation)


@pytest.mark.parametrize("isa", ISAS)
def test_summed_factors(isa: str, kernels: Any) -> None:
    """Ranks that differ; a rank's gradient is that of the sum."""
    choose(isa)
    tensors = sample(rank=3, batch=9)
    for i in range(3):
        tensors[f"feature_factor {i}"] = tensors[f"feature_factor {i}"][:2].contiguous()
    out = call(kernels, tensors, summed=True)
    check_all(out, reference(tensors, torch.float32, fusion="summed"), "summed")
    for i in range(3):
        for factor in (f"d_time_factor {i}", f"d_feature_factor {i}"):
            assert all(torch.equal(rank, out[factor][0]) for rank in out[factor])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_mixed_precision(isa: str, dtype: torch.dtype, kernels: Any) -> None:
    """float32 tensors with 16-bit products, as under autocast."""
    choose(isa)
    tensors = sample(batch=9, residual=False)
    out = call(kernels, tensors, dtype=dtype)
    check_all(out, reference(tensors, dtype), "autocast")
    tensors = sample(batch=9)
    out = call(kernels, tensors, dtype=dtype, out_dtype=torch.float32)
    check_all(out, reference(tensors, dtype), "autocast, a residual in float32")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_lengths(isa: str, dtype: torch.dtype, kernels: Any) -> None:
    """An item of any lengths: the bits of that item alone, cut, whatever its other tokens hold."""
    choose(isa)
    whole = sample((7, 150, 20), batch=4, residual=False, rank=2, dtype=dtype)
    lengths = torch.tensor([[7, 3, -1, 6], [150, 129, 40, 64], [20, 1, 25, 8]])
    for i in range(3):
        for item in range(4):
            whole[f"x {i}"][item, max(int(lengths[i, item]), 0) :] = torch.nan
    out = call(kernels, whole, lengths=lengths, leading=True, dtype=dtype)
    assert all(torch.isfinite(t).all() for t in out.values())
    again = call(kernels, whole, lengths=lengths, leading=True, dtype=dtype, saved_z=False)
    for item in range(4):
        cut = {name: t.clone() for name, t in whole.items()}
        n = [min(max(int(lengths[i, item]), 0), whole[f"x {i}"].shape[1]) for i in range(3)]
        for i in range(3):
            cut[f"x {i}"] = whole[f"x {i}"][item : item + 1, : max(n[i], 1)]
            if n[i] == 0:
                cut[f"x {i}"] = torch.zeros_like(cut[f"x {i}"])
        # A tensor has at least one token: one that does not count stands for none.
        of_item = torch.tensor(n)[:, None] if 0 in n else None
        alone = {}
        inputs, *parameters = groups(cut)
        options = (of_item, ACTIVATION_CODES["gelu"], *[DTYPE_CODES[dtype]] * 2, False, True)
        y, products, z = kernels.sequence_fusion_forward(inputs, None, *parameters, *options, True)
        dy = torch.randn(out["out 0"].shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        flat = kernels.sequence_fusion_backward(
            dy[item : item + 1], inputs, products, z, *parameters, *options, 0b111
        )
        alone = {"out 0": y, **{f"d_x {i}": flat[i] for i in range(3)}}
        assert torch.equal(out["out 0"][item], alone["out 0"][0])
        for i in range(3):
            gradient = out[f"d_x {i}"][item]
            assert torch.equal(gradient[: n[i]], alone[f"d_x {i}"][0, : n[i]]), (item, i)
            assert not gradient[n[i] :].any()
            if dtype == torch.float32:
                assert torch.equal(again[f"d_x {i}"][item], gradient)
    with fastadapters.backend("reference"):
        pair = reference(
            {name: torch.nan_to_num(t) for name, t in whole.items()}, dtype,
            lengths=lengths, residual="leading",
        )  # fmt: skip
    check_all(out, pair, "lengths")


@pytest.mark.parametrize("isa", ISAS)
def test_gradients_one_by_one(isa: str, kernels: Any) -> None:
    """Each gradient alone has the bits it has among all, and nothing else is written."""
    choose(isa)
    tensors = sample((11, 70), (32, 40), rank=2)
    for leading in (False, True):
        chosen = tensors if not leading else sample((11, 70), (32, 32), rank=2, residual=False)
        expected = call(kernels, chosen, leading=leading)
        names = [f"d_{group} {i}" for group in GROUPS for i in range(2)]
        for bit, name in enumerate(names):
            out = call(kernels, chosen, leading=leading, needs=1 << bit)
            assert [key for key in out if key in names] == [name]
            assert torch.equal(out[name], expected[name]), name


@pytest.mark.parametrize("isa", ISAS)
def test_threads(isa: str, kernels: Any) -> None:
    """Equal bits from run to run; more threads change no more than the rule allows."""
    choose(isa)
    tensors = sample((200, 300), (256, 128), batch=5, width=24, out_dim=256)
    pair = reference(tensors, torch.float32)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out, again = call(kernels, tensors), call(kernels, tensors)
            for name in out:
                assert torch.equal(out[name], again[name]), f"{threads} threads: {name}"
            check_all(out, pair, f"{threads} threads")
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("isa", ISAS)
def test_sums_over_many_items(isa: str, kernels: Any) -> None:
    """Gradients of parameters are summed in levels: as right as PyTorch's pairwise sums."""
    choose(isa)
    tensors = sample((40, 3), (24, 24), batch=500, width=8, out_len=4, out_dim=24)
    check_all(call(kernels, tensors), reference(tensors, torch.float32), "500 items")


def test_zero_factor(kernels: Any) -> None:
    """The gradient of what multiplies a zero is 0, that of the zero is not: nothing divides."""
    tensors = sample(rank=2)
    tensors["time_factor 1"] = torch.zeros_like(tensors["time_factor 1"])
    out = call(kernels, tensors)
    assert torch.equal(out["out 0"], tensors["residual"])
    check_all(out, reference(tensors, torch.float32), "zeros")
    assert out["d_time_factor 1"].any() and not out["d_time_factor 0"].any()


def test_no_items(kernels: Any) -> None:
    out = call(kernels, sample(batch=0))
    assert out["out 0"].shape == (0, 8, 32)
    assert not any(t.any() for name, t in out.items() if name != "out 0")


def test_memory_safety(kernels: Any) -> None:
    """What would read or write out of bounds is refused, whoever calls."""
    tensors = sample((6, 4), (16, 16))
    call(kernels, tensors)
    for name, t in tensors.items():
        if name.startswith("x ") or name == "time_factor 0":
            continue
        with pytest.raises(RuntimeError, match="expected"):
            call(kernels, {**tensors, name: t[..., :-1].contiguous()})
    short = {**tensors, "time_factor 0": tensors["time_factor 0"][:, :-1].contiguous()}
    with pytest.raises(RuntimeError, match="one row or more for each token"):
        call(kernels, short)
    with pytest.raises(RuntimeError, match="lengths: expected"):
        call(kernels, tensors, lengths=torch.ones(2, 2, dtype=torch.int64))
