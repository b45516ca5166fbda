"""The head's CPU kernels of every instruction set, and what PyTorch makes of the op."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from against_reference import Tensors, check_compiled, run
from compare import check_all, last_bit
from cpu_kernels import choose
from multimodal_cases import (
    ADAPT,
    ADDITIVE,
    BIASES,
    INF,
    MASKED,
    arguments,
    head_tensors,
    logits,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import fastadapters
from fastadapters import backends, functional
from fastadapters.crossover import Limit
from fastadapters.ops.codes import ACTIVATION_CODES, DTYPE_CODES
from fastadapters.ops.multimodal import ADAPT_CODES, PARAMETERS

ISAS = ("avx512", "avx2", "portable")
KEYS = ("down0", "down1", "in0", "out0", "up0", "up1")

pytestmark = pytest.mark.skipif(
    backends.unavailable("cpu") is not None, reason="the library is not built"
)


def op_inputs(
    tensors: Tensors, bias: Any = ADDITIVE, adapt: str = "both", num_heads: int = 4
) -> tuple[list[Tensor | None], tuple[Any, ...]]:
    """The tensors and the options of the op, but for its last one."""
    named = [tensors.get(f"{key}.{kind}") for key in KEYS for kind in ("weight", "bias")]
    given = [tensors["text"], tensors["image"], *named, tensors.get("blend"), tensors.get("scale")]
    dtype = DTYPE_CODES[tensors["image"].dtype]
    options = (0.3, 50.0, num_heads, *bias[0], *bias[1], ADAPT_CODES[adapt])
    return given, (*options, ACTIVATION_CODES["gelu"], dtype)


def call(kernels: Any, tensors: Tensors, **options: Any) -> Tensors:
    """Logits and the gradient of every tensor, as `against_reference.run` gives them."""
    given, values = op_inputs(tensors, **options)
    out, state = kernels.multimodal_logits_forward(*given, *values, True)
    unsaved, _ = kernels.multimodal_logits_forward(*given, *values, False)
    torch.testing.assert_close(out, unsaved, rtol=0, atol=0, equal_nan=True)
    gen = torch.Generator().manual_seed(1)
    cotangent = torch.randn(out.shape, generator=gen).to(out.dtype)
    text, *others = given
    gradients = kernels.multimodal_logits_backward(
        cotangent, text, state, *others, *values, 2**16 - 1
    )
    names = ["text", "image", *(f"{key}.{kind}" for key in KEYS for kind in ("weight", "bias"))]
    found = dict(zip([*names, "blend", "scale"], gradients, strict=True))
    return {"out 0": out, **{f"d_{name}": found[name] for name in tensors}}


def check_kernels(
    kernels: Any, tensors: Tensors, name: str, base: str = "reference", **options: Any
) -> None:
    dtype = tensors["image"].dtype

    def head(t: Tensors) -> Tensor:
        chosen = {"num_heads": 4, "logit_scale": t["scale"], "blend": t["blend"], **options}
        return logits(t, down_activation="gelu", **chosen)

    def pair(draw: int) -> tuple[Tensors, Tensors]:
        moved = {key: last_bit(t, draw, dtype) for key, t in tensors.items()}
        gold = run(head, {key: t.double() for key, t in moved.items()}, "reference")
        return gold, run(head, moved, base)

    check_all(call(kernels, tensors, **options), pair, name)


def with_scalars(tensors: Tensors) -> Tensors:
    like = tensors["image"].new_tensor
    return tensors | {"scale": like([50.0]), "blend": like([0.3])}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_options(isa: str, dtype: torch.dtype, kernels: Any) -> None:
    choose(isa)
    for layers in ((1, 1), (2, 2)):
        tensors = with_scalars(head_tensors(37, 11, 40, 20, 9, dtype, *layers))
        for bias in BIASES:
            for adapt in ADAPT:
                check_kernels(kernels, tensors, f"{bias} {adapt}", bias=bias, adapt=adapt)


@pytest.mark.parametrize("isa", ISAS)
def test_blocks_and_tiles(isa: str, kernels: Any) -> None:
    """Numbers of texts and images around those of the lanes, tiles, strips and blocks."""
    choose(isa)
    for c, b in ((2, 17), (16, 8), (49, 9), (97, 33), (200, 2)):
        for bias in (ADDITIVE, MASKED):
            tensors = with_scalars(head_tensors(c, b, 64, 12, 7, torch.float32))
            # Over two texts half of what a text sees is the image: its activations are far from
            # those of the texts' mean, and the terms of d_up1 cancel threefold, eagerly, too.
            base = "eager" if c == 2 and bias is ADDITIVE else "reference"
            check_kernels(kernels, tensors, f"C {c}, B {b}", base, bias=bias)
    tensors = with_scalars(head_tensors(30, 20, 300, 72, 40, torch.float32))
    check_kernels(kernels, tensors, "wide", bias=((0.3, -1.0), (0.5, 2.0)))
    tensors = with_scalars(head_tensors(100, 32, 512, 128, 32, torch.float32))
    check_kernels(kernels, tensors, "Caltech101", bias=ADDITIVE)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bias", [ADDITIVE, MASKED, ((0.0, -INF), (0.0, 0.0))], ids=str)
def test_sums_over_many_items_and_texts(bias: Any, isa: str, kernels: Any) -> None:
    """Where their length grew with the number of items, the errors of the texts' gradient were
    twice those of the definition.
    """
    choose(isa)
    for c, b in ((4, 2**14), (2100, 3)):
        tensors = with_scalars(head_tensors(c, b, 32, 16, 8, torch.float32))

        def head(t: Tensors) -> Tensor:
            return logits(t, num_heads=1, bias=bias, logit_scale=t["scale"], blend=t["blend"])

        gold = run(head, {name: t.double() for name, t in tensors.items()}, "reference")
        base, out = run(head, tensors, "reference"), call(kernels, tensors, bias=bias, num_heads=1)
        for name, t in out.items():
            ours, theirs = ((x - gold[name]).square().mean().sqrt() for x in (t, base[name]))
            # A few numbers say little.
            assert t.numel() < 64 or ours <= 1.5 * theirs, f"C {c}, B {b}, {name}: {ours / theirs}"


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bias", [ADDITIVE, MASKED, ((0.0, -INF), (0.0, 0.0))], ids=str)
def test_gradients_are_as_exact_as_eagerly(bias: Any, isa: str, kernels: Any) -> None:
    """Sums over many pairs and rows are no long chains of additions: over a few roundings of the
    same inputs, the errors are about those of `eager`.
    """
    choose(isa)
    exact = with_scalars(head_tensors(150, 32, 96, 48, 32, torch.float32))

    def head(t: Tensors) -> Tensor:
        return logits(t, bias=bias, logit_scale=t["scale"], blend=t["blend"])

    squares: dict[str, list[float]] = {name: [0.0, 0.0] for name in exact}
    for draw in range(3):
        tensors = {name: last_bit(t, draw, torch.float32) for name, t in exact.items()}
        gold = run(head, {name: t.double() for name, t in tensors.items()}, "reference")
        for i, out in enumerate((call(kernels, tensors, bias=bias), run(head, tensors, "eager"))):
            for name, sums in squares.items():
                error = out[f"d_{name}"].double() - gold[f"d_{name}"]
                sums[i] += float(error.square().mean())
    for name, (ours, eager) in squares.items():
        # A few numbers say little: these are under the rule alone.
        assert exact[name].numel() < 512 or ours <= 1.3**2 * eager, (
            f"{name}: {(ours / eager) ** 0.5}"
        )


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_is_not_finite_stays_where_it_belongs(value: float, isa: str, kernels: Any) -> None:
    """An item's features reach its own logits alone."""
    choose(isa)
    for bias in (ADDITIVE, MASKED):
        tensors = with_scalars(head_tensors(7, 5, 12, 8, 6, torch.float32))
        clean = call(kernels, tensors, bias=bias)["out 0"]
        image = tensors["image"]
        for item in (0, 3):
            tensors["image"] = image.clone()
            tensors["image"][item, 2] = value
            out = call(kernels, tensors, bias=bias)["out 0"]
            assert out[item].isnan().all()
            others = [i for i in range(5) if i != item]
            assert torch.equal(out[others], clean[others])


def test_threads_change_nothing_that_counts(kernels: Any) -> None:
    """Any number of threads gives the same result each time, and all give nearly the same."""
    tensors = with_scalars(head_tensors(100, 40, 64, 32, 32, torch.float32))
    before = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3, 7):
            torch.set_num_threads(n)
            results.append(call(kernels, tensors))
            again = call(kernels, tensors)
            assert all(torch.equal(t, again[name]) for name, t in results[-1].items())
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=2e-4, atol=1e-4)


@pytest.mark.parametrize("layers", [(1, 1), (2, 2)])
@pytest.mark.parametrize("bias", [ADDITIVE, MASKED], ids=str)
def test_opcheck(bias: Any, layers: tuple[int, int]) -> None:
    tensors = head_tensors(5, 3, 12, 8, 4, torch.float32, *layers) | {"scale": torch.tensor([9.0])}
    given, options = op_inputs(tensors, bias)
    leaves = [None if t is None else t.requires_grad_() for t in given]
    op = torch.ops.fastadapters.multimodal_logits_forward.default
    torch.library.opcheck(op, (*leaves, *options, True))


@pytest.mark.parametrize("bias", [ADDITIVE, MASKED], ids=str)
def test_compile(bias: Any) -> None:
    """One graph, and two compilations over five numbers of classes and of images."""

    def step(tensors: Tensors) -> Tensor:
        return logits(tensors, bias=bias).square().mean()

    samples = []
    for c, b in ((9, 2), (12, 5), (7, 8), (30, 3), (5, 16)):
        samples.append(head_tensors(c, b, 32, 16, 8, torch.float32))
    check_compiled(step, samples)


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.adapter = fastadapters.MultiModalAdapter(
            32, 16, 4, upsample="mlp", hidden_dim=8, mask="additive"
        )
        self.log_scale = nn.Parameter(torch.tensor(3.0))

    def forward(self, text: Tensor, image: Tensor) -> Tensor:
        return self.adapter.logits(text, image, self.log_scale.exp())


def test_export() -> None:
    head, text = Head(), torch.randn(9, 32)
    batch = torch.export.Dim("batch", min=1, max=64)
    shapes = {"text": None, "image": {0: batch}}
    with fastadapters.backend("cpu"), torch.no_grad():
        program = torch.export.export(head, (text, torch.randn(4, 32)), dynamic_shapes=shapes)
        image = torch.randn(11, 32)
        assert torch.equal(program.module()(text, image), head(text, image))
    assert "fastadapters.multimodal_logits_forward.default" in {
        str(node.target) for node in program.graph.nodes
    }


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint(use_reentrant: bool) -> None:
    head, text = Head(), torch.randn(9, 32)
    results = []
    for again in (False, True):
        image = torch.randn(4, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
        with fastadapters.backend("cpu"):
            if again:
                out = checkpoint(head, text, image, use_reentrant=use_reentrant)
            else:
                out = head(text, image)
            out.square().sum().backward()
        results.append([image.grad, *(p.grad for p in head.parameters())])
        head.zero_grad()
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)


def test_double_backward_raises() -> None:
    tensors = head_tensors(5, 3, 12, 8, 4, torch.float32)
    image = tensors["image"].requires_grad_()
    with fastadapters.backend("cpu"):
        out = logits(tensors)
        (gradient,) = torch.autograd.grad(out.square().sum(), image, create_graph=True)
        with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
            gradient.sum().backward()


def test_auto_takes_the_kernels_and_says_so() -> None:
    tensors = head_tensors(5, 3, 12, 8, 4, torch.float32)
    (decision,) = fastadapters.explain(logits, tensors)
    assert decision[:2] == ("multimodal", "cpu")
    double = {name: t.double() for name, t in tensors.items()}
    assert fastadapters.explain(logits, double)[0].backend == "eager"


@pytest.mark.parametrize(("up", "rank"), [(1, 16), (2, 8)])
def test_auto_goes_by_the_rank(up: int, rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The width before the last layer: R, or E where there is but one, never D."""
    dtype = torch.float32
    tensors = head_tensors(5, 3, 24, 16, 8, dtype, up=up)
    key = ("multimodal", "cpu", backends.architecture(torch.device("cpu"), dtype), dtype)
    for width, backend in ((rank, "cpu"), (rank - 1, "eager")):
        monkeypatch.setitem(backends.LIMITS, key, Limit(width, 24 * rank, "here"))
        assert fastadapters.explain(logits, tensors)[0].backend == backend


def test_flops_of_both_directions() -> None:
    tensors = {
        n: t.requires_grad_() for n, t in head_tensors(20, 8, 32, 16, 8, torch.float32).items()
    }
    with FlopCounterMode(display=False) as counter, fastadapters.backend("cpu"):
        logits(tensors, bias=ADDITIVE).sum().backward()
    counted = counter.get_flop_counts()["Global"]
    names = {str(op): flops for op, flops in counted.items()}
    forward = names["fastadapters.multimodal_logits_forward"]
    backward = names["fastadapters.multimodal_logits_backward"]
    assert 0 < forward < backward < 6 * forward


def test_memory_of_a_training_step() -> None:
    """C 1000, B 64, D 512: what is saved is a few rows for each text and image."""
    tensors = head_tensors(1000, 64, 512, 128, 32, torch.float32)
    given, options = op_inputs(tensors)
    _, state = torch.ops.fastadapters.multimodal_logits_forward(*given, *options, True)
    assert state.numel() * 4 < 4.5 * 2**20
    assert functional.multimodal_logits(
        *arguments(tensors), num_heads=4, logit_scale=1.0
    ).shape == (64, 1000)
    assert len(PARAMETERS) + 2 == len(given)
