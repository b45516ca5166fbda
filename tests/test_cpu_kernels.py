"""The CPU kernels of every instruction set, called as the ops they are, without autograd."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from bottleneck_cases import (
    Case,
    inputs,
    mixed_cases,
    option_cases,
    rectangular_cases,
    reference_pair,
    shape_cases,
)
from compare import check_all
from cpu_kernels import ISAS, OWN_KERNELS, call, check_kernels, choose
from torch import Tensor

from fastadapters.ops.bottleneck import PARAMETERS
from fastadapters.ops.codes import ACTIVATION_CODES


@pytest.mark.parametrize(("isa", "dtype"), OWN_KERNELS, ids=str)
def test_options(isa: str, dtype: torch.dtype, kernels: Any) -> None:
    choose(isa)
    sizes = {"d": 100, "r": 33, "rows": (3, 50)}
    for case in [*option_cases(**sizes), *rectangular_cases(**sizes)]:
        check_kernels(kernels, replace(case, dtype=dtype))


@pytest.mark.parametrize(("isa", "dtype"), OWN_KERNELS, ids=str)
def test_few_rows(isa: str, dtype: torch.dtype, kernels: Any) -> None:
    """Whose weights are not packed: every option, whole and ragged vectors, one row to 16."""
    choose(isa)
    for case in [*option_cases(), *rectangular_cases()]:
        check_kernels(kernels, replace(case, dtype=dtype, d=100, r=33, rows=(2, 4)))
    for rows, d, r in ((1, 5, 3), (1, 768, 64), (3, 300, 4), (16, 64, 16)):
        check_kernels(kernels, Case(rows=(rows,), d=d, r=r, dtype=dtype, scale="learnable"))


@pytest.mark.parametrize(
    ("isa", "dtype"), [own for own in OWN_KERNELS if own[1] != torch.float32], ids=str
)
def test_mixed_precision(isa: str, dtype: torch.dtype, kernels: Any) -> None:
    """Each combination of fp32 and 16 bit for x and y."""
    choose(isa)
    for rows in ((3, 50), (2, 1)):
        for case in mixed_cases(dtype, d=100, r=33, rows=rows):
            check_kernels(kernels, case)
    for case in rectangular_cases(dtype=dtype, x_dtype=torch.float32, param_dtype=torch.float32):
        if (
            case.out_dtype == torch.float32 or case.scale == "number"
        ):  # else the scale's dtype is y's
            check_kernels(kernels, case)


@pytest.mark.parametrize(("isa", "dtype"), OWN_KERNELS, ids=str)
def test_shapes(isa: str, dtype: torch.dtype, kernels: Any) -> None:
    choose(isa)
    for case in shape_cases():
        check_kernels(kernels, replace(case, dtype=dtype))


@pytest.mark.parametrize("isa", ISAS)
def test_blocks_and_panels(isa: str, kernels: Any) -> None:
    """Widths and row counts around the sizes of the register blocks."""
    choose(isa)
    for r in (4, 16, 17, 49, 112):
        check_kernels(kernels, Case(rows=(r + 1,), d=5 * r, r=r, dtype=torch.bfloat16))
    for rows in (7, 9, 16, 31, 33, 97):
        check_kernels(kernels, Case(rows=(rows,), d=64, r=24, dtype=torch.bfloat16, norm="both"))


def test_row_dimensions(kernels: Any) -> None:
    """Rows whose strides merge into one, two or three dimensions, or into none the kernels take."""
    case = Case(rows=(2, 3, 4, 5), d=40, r=12)
    tensors = inputs(case)
    expected = call(kernels, case, tensors)
    for order in ((0, 1, 2, 3), (3, 2, 1, 0), (1, 0, 2, 3), (2, 0, 3, 1)):
        back = tuple(order.index(i) for i in range(4))
        for name in ("x", "cotangent"):
            permuted = tensors[name].permute(*order, 4).contiguous().permute(*back, 4)
            out = call(kernels, case, {**tensors, name: permuted})
            for key in expected:
                assert torch.allclose(out[key], expected[key], rtol=1e-5, atol=1e-5), (order, key)


def test_outputs_in_slices(kernels: Any) -> None:
    """The _out ops write the slices they are given and nothing beside them."""
    case = Case(rows=(5, 7), d=72, r=20, scale="channel", norm="both")
    tensors = inputs(case)
    expected = call(kernels, case, tensors)
    parameters = [tensors.get(name) for name in PARAMETERS]
    x, cotangent = tensors["x"], tensors["cotangent"]
    options = (None, 1.0, 1e-5, 0.0, 0.0, ACTIVATION_CODES[case.activation], 0, 0, True)
    wide = torch.full((5, 12, 72), 123.0)
    y, z, stats = wide[:, 2:9], torch.empty(35, 20), torch.empty(35, 2)
    kernels.bottleneck_forward_out(y, z, stats, x, None, *parameters, *options)
    assert torch.equal(y, expected["y"])
    assert (wide[:, :2] == 123).all() and (wide[:, 9:] == 123).all()
    d_wide = torch.full((5, 12, 72), 123.0)
    dx, d_up_weight = d_wide[:, 2:9], torch.empty(72, 20)
    gradients = (dx, None, None, d_up_weight, None, None, None, None)
    kernels.bottleneck_backward_out(*gradients, cotangent, x, z, stats, *parameters, *options)
    assert torch.equal(dx, expected["d_x"])
    # Slices are cut into other tiles, whose sums are added up in another order.
    check_all({**expected, "d_up_weight": d_up_weight}, reference_pair(case, tensors))
    assert (d_wide[:, :2] == 123).all() and (d_wide[:, 9:] == 123).all()


@pytest.mark.parametrize("isa", ISAS)
def test_threads(isa: str, kernels: Any) -> None:
    """Equal bits from run to run; more threads change no more than the rule allows."""
    choose(isa)
    case = Case(rows=(400,), d=256, r=40, dtype=torch.bfloat16, dropout=0.1, scale="channel")
    tensors = inputs(case)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out, again = call(kernels, case, tensors), call(kernels, case, tensors)
            for name in out:
                assert torch.equal(out[name], again[name]), f"{threads} threads: {name}"
            check_all(out, reference_pair(case, tensors), f"{threads} threads")
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("isa", ISAS)
def test_activations_over_their_range(isa: str, kernels: Any) -> None:
    """Values and derivatives from saturation to saturation: with weights of 1, z is x."""
    choose(isa)
    x = torch.cat([torch.linspace(-12, 12, 2000), torch.tensor([-1e4, -90.0, -0.0, 90.0, 1e4])])
    x = x.reshape(1, -1).T.contiguous()
    small = x.abs() < 20
    one = torch.ones(1, 1)
    for name, code in ACTIVATION_CODES.items():
        case = Case(rows=(x.shape[0],), d=1, r=1, activation=name, residual="none", scale="number")
        case = replace(case, down_bias=False, up_bias=False)
        tensors = {"x": x, "down_weight": one, "up_weight": one, "cotangent": torch.ones_like(x)}
        parameters = [tensors.get(p) for p in PARAMETERS]
        options = (None, 0.6, 1e-5, 0.0, 0.0, code, 0, 0, False)
        y, z, stats = kernels.bottleneck_forward(x, None, *parameters, *options, True)
        dx = kernels.bottleneck_backward(torch.ones_like(x), x, z, stats, *parameters, *options, 1)
        pair = reference_pair(case, tensors, needs={"x"}.__contains__)

        def where_small(draw: int, pair: Any = pair) -> list[dict[str, Tensor]]:
            return [{key: t[small] for key, t in side.items()} for side in pair(draw)]

        check_all({"y": y[small], "d_x": dx[0][small]}, where_small, name)
        assert torch.isfinite(y).all() and torch.isfinite(dx[0]).all(), name


def test_unwanted_results_are_empty(kernels: Any) -> None:
    case = Case()
    tensors = inputs(case)
    parameters = [tensors.get(name) for name in PARAMETERS]
    options = (None, 1.0, 1e-5, 0.0, 0.0, 1, 0, 0, True)
    y, z, stats = kernels.bottleneck_forward(tensors["x"], None, *parameters, *options, False)
    assert y.shape == tensors["x"].shape and z.shape == stats.shape == (0,)
    _, z, stats = kernels.bottleneck_forward(tensors["x"], None, *parameters, *options, True)
    assert z.shape == (math.prod(case.rows), case.r)
    for i in range(5):
        gradients = kernels.bottleneck_backward(
            tensors["cotangent"], tensors["x"], z, stats, *parameters, *options, 1 << i
        )
        assert [g.numel() > 0 for g in gradients] == [i == j for j in range(8)]


@pytest.mark.parametrize("norm", ["none", "both"])
def test_x_and_z_where_they_are_needed(norm: str, kernels: Any) -> None:
    """Each gradient alone, with what it is not made of left empty; what it is made of is missed."""
    case = Case(norm=norm, scale="channel")
    tensors = inputs(case)
    expected = call(kernels, case, tensors)
    parameters = [tensors.get(name) for name in PARAMETERS]
    options = (None, 1.0, 1e-5, 0.0, 0.0, 1, 0, 0, True)
    x, dy = tensors["x"], tensors["cotangent"]
    _, z, stats = kernels.bottleneck_forward(x, None, *parameters, *options, True)
    through_norm = {"x"} if norm != "none" else set()
    of_x = {"down_weight", "norm_weight"} | through_norm
    for i, name in enumerate(("x", *PARAMETERS)):
        if name not in tensors:
            continue
        kept = (x if name in of_x else x.new_empty(0), z.new_empty(0) if name == "up_bias" else z)
        out = kernels.bottleneck_backward(dy, *kept, stats, *parameters, *options, 1 << i)
        assert torch.equal(out[i], expected[f"d_{name}"]), name
        if name in of_x:
            with pytest.raises(RuntimeError, match="x: expected its values"):
                kernels.bottleneck_backward(
                    dy, x.new_empty(0), z, stats, *parameters, *options, 1 << i
                )
        if name != "up_bias":
            with pytest.raises(RuntimeError, match=r"z: expected \[M, r\]"):
                kernels.bottleneck_backward(
                    dy, x, z.new_empty(0), stats, *parameters, *options, 1 << i
                )


def test_memory_safety(kernels: Any) -> None:
    """What would read or write out of bounds is refused, whoever calls."""
    tensors = inputs(Case(rows=(6,), d=16, r=4))
    x, options = tensors["x"], (None, 1.0, 1e-5, 0.0, 0.0, 1, 0, 0, True)

    def forward(x: Tensor = x, **changed: Tensor) -> None:
        parameters = [{**tensors, **changed}.get(name) for name in PARAMETERS]
        kernels.bottleneck_forward(x, None, *parameters, *options, True)

    forward()
    names = {name: name for name in ("up_weight", "down_bias", "up_bias")}
    for name, named in {"down_weight": "x: expected", **names}.items():
        with pytest.raises(RuntimeError, match=named):
            forward(**{name: tensors[name][..., :-1].contiguous()})
        with pytest.raises(RuntimeError, match="float32, bfloat16 or float16"):
            forward(**{name: tensors[name].double()})
    with pytest.raises(RuntimeError, match="float32, bfloat16 or float16"):
        forward(x.double())
    parameters = [tensors.get(name) for name in PARAMETERS]
    _, z, stats = kernels.bottleneck_forward(x, None, *parameters, *options, True)
    for dy, saved in ((x[:-1], z), (x, z[:-1]), (x, z.bfloat16()), (x.bfloat16(), z)):
        with pytest.raises(RuntimeError, match=r"dy|z|x: expected"):
            kernels.bottleneck_backward(dy, x, saved, stats, *parameters, *options, 255)
