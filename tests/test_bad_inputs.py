"""A sweep of bad arguments: each is refused by name, in our own lines, before PyTorch sees it."""

from __future__ import annotations

import math
import re
import traceback
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastadapters
from fastadapters import functional

D, R = 8, 3
PACKAGE = str(Path(fastadapters.__file__).parent)

NUMBER = (
    None, "0.1", [0.1], {}, np.ones(2), torch.ones(2), torch.tensor(True), True, 1j, math.nan,
    torch.ones((), device="meta"), torch.ones((), requires_grad=True), 10**400, object(),
)  # fmt: skip
PROBABILITY = (*NUMBER, -0.1, 1.1, math.inf)
EPS = (*NUMBER, -1e-5, math.inf)
INTEGER = (
    None, "2", 2.0, [2], True, np.ones(2), np.bool_(True), torch.ones(2, dtype=torch.int64),
    torch.tensor(2.0), torch.tensor(True), torch.ones((), dtype=torch.int64, device="meta"),
    math.nan, 1j, object(),
)  # fmt: skip
SIZE = (*INTEGER, 0, -1)
FLAG = (0, 1, "yes", [], {}, math.nan, torch.tensor(True), np.bool_(True), object())
DEVICE = ("gpu", 1.5, [], {}, object())
DTYPE = (torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fn, "float32", float, 1, [])


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # nested tensors are a prototype, PyTorch says
    NESTED = torch.nested.nested_tensor([torch.ones(2, D), torch.ones(3, D)])


def word(*good: str | None) -> tuple[object, ...]:
    bad = ([], {}, set(), 1, True, b"relu", np.array(["relu", "gelu"]), torch.ones(2), "swish", "")
    return (*bad, *(() if None in good else (None,)))


def no_tensors(*like: int) -> tuple[object, ...]:
    """What is no floating-point tensor, or no dense one."""
    good = torch.ones(like)
    kinds = (torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn)
    return (
        good.numpy(), good.tolist(), "x", True, {}, object(), *(good.to(kind) for kind in kinds),
        good.to_sparse(), NESTED,
    )  # fmt: skip


def tensors(*shape: int, optional: bool = False, free: int | None = None) -> tuple[object, ...]:
    """What is not of this shape, but in dimension ``free``, beside what is no tensor."""
    sizes = ([*shape[:i], n + 1, *shape[i + 1 :]] for i, n in enumerate(shape) if i != free)
    wrong = (torch.ones(size) for size in ([1, *shape], [], *sizes))
    return (
        *no_tensors(*shape), *wrong, torch.ones(shape, device="meta"), *([] if optional else [None])
    )  # fmt: skip


def lists(*good: Any, at: tuple[object, ...] = ()) -> tuple[object, ...]:
    """No list, one of another length, or with an item of ``at``."""
    items = ([*good[:-1], item] for item in at)
    return (None, 1, 1.5, True, object(), torch.tensor(1.0), [*good, *good, *good], *items)


BOTTLENECK = {
    "x": torch.randn(4, D), "down_weight": torch.randn(R, D), "up_weight": torch.randn(D, R),
    "down_bias": torch.randn(R), "up_bias": torch.randn(D), "norm_weight": torch.ones(D),
    "norm_bias": torch.ones(D), "residual": torch.randn(4, D),
}  # fmt: skip
GROUPED = {
    name: t if name in ("x", "residual") else torch.stack([t, t]) for name, t in BOTTLENECK.items()
} | {"index": torch.tensor([1, 0, 1, 1])}
INDEX = (
    None, 1, "x", [0, 1, 1, 0], np.zeros(4), torch.zeros(4), torch.zeros(4).bool(),
    torch.zeros(4).byte(), torch.tensor(0), torch.zeros(3).long(), torch.zeros(4, D).long(),
    torch.tensor([0, 2, 0, 0]), torch.tensor([0, 0, -1, 0]), torch.zeros(4, device="meta").long(),
)  # fmt: skip
ACTIVATIONS = {"activation": word("relu")}
OPTIONS = {**ACTIVATIONS, "norm_eps": EPS, "dropout": PROBABILITY, "training": (None, *FLAG)}
SCALES = tuple(s for s in (*NUMBER, *tensors(D)) if not isinstance(s, Tensor) or s.dim() > 0)
SIDE = functional.BottleneckParameters(torch.randn(R, D), torch.randn(D, R))
X = (*no_tensors(4, D), None, torch.ones(4, 0), torch.tensor(1.0))

QKV = {f"text_{n}": torch.randn(3, 2, 4) for n in "qkv"} | {
    f"image_{n}": torch.randn(5, 1, 2, 4) for n in "qkv"
}
BIAS = (
    None, 1, "masked", [], [1, 2], ((0, 1),), ((0, 1), (1,)), ((0, "1"), (1, 0)), object(),
    ((0, math.nan), (1, 0)), ((0, math.inf), (1, 0)), np.ones((2, 2)), torch.ones(2, 2), {},
)  # fmt: skip

MASKS = tuple(bias for bias in BIAS if not isinstance(bias, str))

E = 6


def layer(n_out: int, n_in: int) -> tuple[Tensor, Tensor]:
    return torch.randn(n_out, n_in), torch.randn(n_out)


HEAD = {
    "text": torch.randn(3, D), "image": torch.randn(5, D),
    "layers": functional.MultiModalLayers(
        [layer(E, D)], layer(3 * E, E), layer(E, E), [layer(2, E), layer(D, 2)]
    ),
    "num_heads": 2,
}  # fmt: skip


def pairs(n_out: int, n_in: int) -> tuple[object, ...]:
    weight, bias = layer(n_out, n_in)
    return (
        None, 1, weight, "xy", (weight,), (None, bias), (weight, None), (weight.T, bias[:1]),
        *((bad, bias) for bad in no_tensors(n_out, n_in)),
        *((weight, bad) for bad in no_tensors(n_out)), (weight.to("meta"), bias),
    )  # fmt: skip


HEAD_BAD = {
    "text": (*tensors(3, D)[:-5], None, torch.ones(3, D + 1), torch.ones(0, D)),
    "image": (*no_tensors(5, D), None, torch.ones(5), torch.ones(5, 0)),
    "layers": (
        None,
        1,
        "x",
        [],
        tuple(HEAD["layers"]),
        *(
            HEAD["layers"]._replace(**{name: value})
            for name, values in {
                "down": (None, 1, "x", [], [HEAD["layers"].up] * 3, *([p] for p in pairs(E, D))),
                "in_proj": pairs(3 * E, E),
                "out_proj": pairs(E, E)[:4],
                "up": (None, [], *([layer(2, E), p] for p in pairs(D, 2))),
            }.items()
            for value in values
        ),
    ),
    "num_heads": (*SIZE, 4),
    "bias": BIAS,
    "down_activation": word("relu"),
}
ELEMENT = (*(v for v in NUMBER if not isinstance(v, Tensor)), torch.ones(2), torch.ones(1).bool(),
           torch.ones(1, device="meta"), torch.ones(1, dtype=torch.complex64))  # fmt: skip

FUSION = {
    "inputs": [torch.randn(2, 4, D), torch.randn(2, 5, D)],
    "down_weights": [torch.randn(R, D)] * 2, "down_biases": [torch.randn(R), None],
    "time_factors": [torch.randn(2, t, 3) for t in (4, 5)],
    "feature_factors": [torch.randn(2, R, D)] * 2,
}  # fmt: skip
LENGTHS = (
    1, "x", object(), torch.ones(2, 2), torch.ones(3, 2).long(), torch.tensor(1), [None],
    [None, torch.ones(2)], [None, [1, 2]], [None, torch.ones(3).long()], [None, "x"],
    torch.ones(2, 2).bool(), torch.ones(2, 2, dtype=torch.int64, device="meta"), np.ones((2, 2)),
)  # fmt: skip
INPUTS = tuple(  # how many there are nobody knows but the module
    value
    for value in lists(
        *FUSION["inputs"], at=(*no_tensors(2, 5, D), torch.ones(3, 5, D), torch.ones(2, 5))
    )
    if not isinstance(value, list) or len(value) == 2
)

CREATE = {"device": DEVICE, "dtype": DTYPE}
FLAGS = (None, *FLAG)
ADAPTER_BAD = {
    "dim": SIZE, "bottleneck": SIZE, **ACTIVATIONS, "scale": (*NUMBER[1:], "each", b"learnable"),
    "dropout": PROBABILITY, "layernorm": word(None), "residual": FLAGS, "bias": FLAGS,
    "init": word("lora"), **CREATE,
}  # fmt: skip
WIDTHS = {"dim": D, "bottleneck": R}
WANDER = {"dim": D, "seq_lens": (4, 5), "bottleneck": R, "feature_rank": 2, "time_rank": 2}


def hooked(module: nn.Module) -> nn.Module:
    """A module that calls its layers."""
    for m in list(module.modules())[1:]:
        m.register_forward_hook(lambda *args: None)
    return module


X_CALL = {"x": torch.randn(2, 4, D)}
CALL_BAD = {
    "x": (*no_tensors(2, 4, D), None, torch.tensor(1.0)),
    "residual": tensors(2, 4, D, optional=True), "add_residual": FLAG,
}  # fmt: skip
SPLIT = (*(v for v in INTEGER if not isinstance(v, list)), -2, 5)
SPLITS = (1, 1.5, object(), [1], [1, 2, 3], [2, 1], [-1, 2], [1, 5], *([1, v] for v in INTEGER))
PAIR = {"text": torch.randn(3, D), "image": torch.randn(5, D)}
HEAD_CALL = {name: HEAD_BAD[name] for name in PAIR}
ADAPTER = partial(fastadapters.BottleneckAdapter, D, R)
MULTIWAY = partial(fastadapters.MultiwayAdapter, D, R)
ENHANCER = partial(fastadapters.AlignmentEnhancer, D, R)
MULTIMODAL = partial(fastadapters.MultiModalAdapter, D, E, 2)
FUSER = partial(fastadapters.WanderAdapter, **WANDER)
TOKENS = (*no_tensors(4, 5, D), None, torch.ones(4, D), torch.ones(1, 5, D))

# Name, function, good arguments, {argument: bad values}.
TABLE: list[tuple[str, Callable[..., Any], dict[str, Any], dict[str, Iterable[object]]]] = [
    ("bottleneck", functional.bottleneck, BOTTLENECK, {
        "x": X, "down_weight": (*no_tensors(R, D), None, torch.ones(R), torch.ones(0, D),
                                torch.ones(R, D + 1), torch.ones(R, D, device="meta")),
        "up_weight": tensors(D, R, free=0), "input_dropout": PROBABILITY,
        "down_bias": tensors(R, optional=True),
        "up_bias": tensors(D, optional=True), "norm_weight": tensors(D, optional=True),
        "norm_bias": tensors(D, optional=True), "residual": tensors(4, D, optional=True),
        "scale": SCALES, **OPTIONS}),
    ("multiway_bottleneck", functional.multiway_bottleneck,
     {**X_CALL, "split": 2, "first": SIDE, "second": SIDE}, {
        "x": (*CALL_BAD["x"], torch.ones(D)), "split": SPLIT, "first": lists(*SIDE),
        "second": lists(*SIDE), "residual": CALL_BAD["residual"], **OPTIONS}),
    ("multiway_bottleneck of three", functional.multiway_bottleneck,
     {**X_CALL, "split": [1, 3], "first": SIDE, "second": SIDE, "others": [SIDE]},
     {"split": SPLITS, "others": (None, 1, [SIDE, SIDE.down_weight], [None])}),
    ("grouped_bottleneck", functional.grouped_bottleneck, GROUPED, {
        "x": (*X, torch.ones(D)), "index": INDEX,
        "down_weight": (*no_tensors(2, R, D), None, torch.ones(R, D), torch.ones(0, R, D),
                        torch.ones(2, R, D + 1), torch.ones(2, R, D, device="meta")),
        "up_weight": tensors(2, D, R, free=1), "input_dropout": PROBABILITY,
        "down_bias": tensors(2, R, optional=True),
        "up_bias": tensors(2, D, optional=True), "norm_weight": tensors(2, D, optional=True),
        "norm_bias": tensors(2, D, optional=True), "residual": tensors(4, D, optional=True),
        "scale": (*(v for v in NUMBER if not isinstance(v, Tensor)), *tensors(2, D)[:-1]),
        **OPTIONS}),
    ("cross_modal_attention", functional.cross_modal_attention, QKV, {
        "text_q": (*no_tensors(3, 2, 4), None, torch.ones(3, 2), torch.ones(0, 2, 4)),
        "text_k": tensors(3, 2, 4), "text_v": tensors(3, 2, 4),
        "image_q": (*no_tensors(5, 1, 2, 4), None, torch.ones(5, 2, 4), torch.ones(5, 0, 2, 4)),
        "image_k": tensors(5, 1, 2, 4), "image_v": tensors(5, 1, 2, 4), "bias": BIAS,
        "scale": NUMBER[1:], "outputs": word("both")}),
    ("multimodal_features", functional.multimodal_features, HEAD, HEAD_BAD),
    ("multimodal_logits", functional.multimodal_logits, {**HEAD, "logit_scale": 2.0}, {
        **HEAD_BAD, "text": (*HEAD_BAD["text"], torch.ones(5, 3, D)), "logit_scale": ELEMENT,
        "blend": ELEMENT, "adapt": word("both")}),
    ("sequence_fusion", functional.sequence_fusion, FUSION, {
        "inputs": (*INPUTS, []),
        "down_weights": lists(*FUSION["down_weights"],
                              at=(*no_tensors(R, D), None, torch.ones(R, D + 1), torch.ones(D))),
        "down_biases": lists(torch.ones(R), None, at=tensors(R, optional=True)),
        "time_factors": lists(*FUSION["time_factors"],
                              at=(*no_tensors(2, 5, 3), None, torch.ones(2, 5, 4), torch.ones(3))),
        "feature_factors": lists(*FUSION["feature_factors"],
                                 at=(*no_tensors(2, R, D), None, torch.ones(2, R, D + 1))),
        "lengths": LENGTHS, "residual": (*tensors(2, 3, D, optional=True), "first"),
        "fusion": word("cp"), **ACTIVATIONS}),
    ("BottleneckAdapter()", fastadapters.BottleneckAdapter, WIDTHS, ADAPTER_BAD),
    ("MultiwayAdapter()", fastadapters.MultiwayAdapter, WIDTHS, {**ADAPTER_BAD, "modalities": (
        None, 1, "ab", ["a"], ["a", "a"], ["a", 1], ["a", "b.c"], [["a"], ["b"]], object())}),
    ("GroupedAdapter()", fastadapters.GroupedAdapter, WIDTHS, {
        **ADAPTER_BAD, "layernorm": (*word(None), "out"), "names": (None, 1, "ab", object())}),
    ("AlignmentEnhancer()", fastadapters.AlignmentEnhancer, {"dim": D, "hidden_dim": R}, {
        "dim": SIZE, "hidden_dim": SIZE, **ACTIVATIONS, "dropout": PROBABILITY,
        "drop_path": PROBABILITY, "subln": FLAGS, "residual": FLAGS, **CREATE}),
    ("MultiModalAdapter()", fastadapters.MultiModalAdapter, {}, {
        "dim": SIZE, "attn_dim": SIZE, "num_heads": (*SIZE, 3), "hidden_dim": SIZE,
        "downsample": word("mlp"), "upsample": word("mlp"), "mask": (*MASKS, *word("masked")),
        "blend": NUMBER, **CREATE}),
    ("WanderAdapter()", fastadapters.WanderAdapter, WANDER, {
        "dim": (*SIZE, [D], (D, 0), (D, "x")),
        "seq_lens": (None, 3, "ab", [], (4, 0), (4, None), (4, 2.5), object()),
        "bottleneck": SIZE, "feature_rank": SIZE, "time_rank": SIZE, "out_len": (*SIZE[1:], 10),
        "fusion": word("cp"), "init": word("trainable"), **CREATE}),
    ("from_module", fastadapters.BottleneckAdapter.from_module, {},
     {"module": (None, 1, nn.Linear(2, 2), "x")}),
    ("from_modules", fastadapters.MultiwayAdapter.from_modules, {"modules": {
        "a": ADAPTER(), "b": ADAPTER()}}, {"modules": (
            None, 1, "ab", ["a", "b"], {}, {"a": ADAPTER()}, {"a": ADAPTER(), 1: ADAPTER()},
            {"a": ADAPTER(), "b": None}, {"a": ADAPTER(), "b": nn.Linear(2, 2)})}),
    ("patch", fastadapters.patch, {"model": nn.Sequential(hooked(nn.Linear(1, 1)))},
     {"model": (None, 1, "x", [], torch.ones(1), nn.Linear)}),
    ("explain", fastadapters.explain, {"fn": dict}, {"fn": (None, 1, "x", [], torch.ones(1))}),
    ("backend", lambda name: fastadapters.backend(name).__enter__(), {"name": "auto"},
     {"name": (*word("auto"), "gpu", "CPU")}),
]  # fmt: skip

for _kind, _change in (("", lambda module: module), (" with hooks", hooked)):
    TABLE += [
        (f"BottleneckAdapter{_kind}", _change(ADAPTER(layernorm="in")), X_CALL, CALL_BAD),
        (f"BottleneckAdapter, norm last{_kind}", _change(ADAPTER(layernorm="out")), X_CALL,
         CALL_BAD),
        (f"MultiwayAdapter{_kind}", _change(MULTIWAY()), {**X_CALL, "split": 2},
         {**CALL_BAD, "split": SPLIT, "x": (*CALL_BAD["x"], torch.ones(D))}),
        (f"AlignmentEnhancer{_kind}", _change(ENHANCER()), X_CALL, {"x": CALL_BAD["x"]}),
        (f"MultiModalAdapter{_kind}", _change(MULTIMODAL()), PAIR,
         {**HEAD_CALL, "image": [image for image in HEAD_CALL["image"] if image is not None]}),
        (f"MultiModalAdapter.logits{_kind}", _change(MULTIMODAL()).logits,
         {**PAIR, "logit_scale": 1.0}, {**HEAD_CALL, "logit_scale": ELEMENT,
                                        "adapt": word("both")}),
        (f"MultiModalAdapter on tokens{_kind}", _change(MULTIMODAL()),
         {"text": torch.randn(4, 5, D)}, {"text": TOKENS}),
        (f"WanderAdapter{_kind}", _change(FUSER()), {"inputs": FUSION["inputs"]},
         {"inputs": (*INPUTS, [None, None], [None] * 3), "lengths": LENGTHS}),
    ]  # fmt: skip
TABLE.append(("MultiwayAdapter of three", MULTIWAY(modalities=("a", "b", "c")),
              {**X_CALL, "splits": (1, 3)}, {"splits": SPLITS, "x": CALL_BAD["x"]}))  # fmt: skip
TABLE.append(("GroupedAdapter", fastadapters.GroupedAdapter(D, R, ["a", "b"]),
              {**X_CALL, "index": torch.tensor([1, 0])}, {
                  "x": CALL_BAD["x"], "index": INDEX, "residual": CALL_BAD["residual"],
                  "add_residual": FLAG}))  # fmt: skip
TABLE.append(("subln", ENHANCER(subln=True), X_CALL, {"x": (*CALL_BAD["x"], torch.ones(2, 9))}))


def test_good_arguments() -> None:
    """What the sweep changes is right before."""
    for name, fn, good, _ in TABLE:
        if name == "from_module":
            continue
        with pytest.warns(UserWarning) if name == "patch" else torch.no_grad():
            fn(**good)


@pytest.mark.parametrize(
    ("fn", "good", "argument", "values"),
    [
        pytest.param(fn, good, argument, values, id=f"{name}-{argument}")
        for name, fn, good, bad in TABLE
        for argument, values in bad.items()
    ],
)
def test_bad_arguments(
    fn: Callable[..., Any], good: dict[str, Any], argument: str, values: Iterable[object]
) -> None:
    obscure = []
    for value in values:
        with pytest.raises(Exception) as caught:
            fn(**{**good, argument: value})
        error = caught.value
        where = traceback.extract_tb(error.__traceback__)[-1].filename
        named = re.match(rf"{argument}\b", str(error)) and where.startswith(PACKAGE)
        if not (isinstance(error, (TypeError, ValueError)) and named):
            obscure.append((value, error))
    assert not obscure


def test_there_are_many() -> None:
    assert sum(len(tuple(values)) for *_, bad in TABLE for values in bad.values()) >= 300
