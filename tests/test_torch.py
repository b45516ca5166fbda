"""The ops inside PyTorch: opcheck, compile, export, autocast, checkpoint, double backward."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import bottleneck_cases
import pytest
import torch
from bottleneck_cases import Case, inputs, option_cases, rectangular_cases
from compare import check_all, last_bit, named
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import fastadapters
from fastadapters import backends, functional
from fastadapters.ops.bottleneck import PARAMETERS

BACKENDS = ["eager"] + [name for name in ("cpu",) if backends.unavailable(name) is None]
needs_library = pytest.mark.skipif("cpu" not in BACKENDS, reason="needs the compiled library")
ops = torch.ops.fastadapters


def op_arguments(case: Case, requires_grad: bool) -> tuple[Any, ...]:
    return bottleneck_cases.op_arguments(case, inputs(case), requires_grad)


SIZES = {"rows": (2, 9), "d": 20, "r": 6}
SAMPLES = [*option_cases(**SIZES), *rectangular_cases(**SIZES)]


@needs_library
@pytest.mark.parametrize("case", SAMPLES, ids=str)
def test_opcheck_forward(case: Case) -> None:
    torch.library.opcheck(ops.bottleneck_forward.default, (*op_arguments(case, True), True))
    torch.library.opcheck(ops.bottleneck_forward.default, (*op_arguments(case, False), False))


@needs_library
@pytest.mark.parametrize("needs", [0b11111111, 0b1, 0b1010])
@pytest.mark.parametrize("case", SAMPLES, ids=str)
def test_opcheck_backward(case: Case, needs: int) -> None:
    x, residual, *rest = op_arguments(case, False)
    y, z, stats = ops.bottleneck_forward(x, residual, *rest, True)
    torch.library.opcheck(
        ops.bottleneck_backward.default, (torch.randn_like(y), x, z, stats, *rest, needs)
    )


@needs_library
@pytest.mark.parametrize("case", SAMPLES[:3], ids=str)
def test_opcheck_out(case: Case) -> None:
    x, residual, *rest = op_arguments(case, False)
    y, z, stats = ops.bottleneck_forward(x, residual, *rest, True)
    saved = (z, stats if stats.numel() else None)
    torch.library.opcheck(ops.bottleneck_forward_out.default, (y, *saved, x, residual, *rest))
    gradients = [torch.empty_like(x)] + [
        t if t is None else torch.empty_like(t) for t in rest[: len(PARAMETERS)]
    ]
    torch.library.opcheck(
        ops.bottleneck_backward_out.default, (*gradients, torch.randn_like(y), x, *saved, *rest)
    )


@needs_library
def test_opcheck_multiway() -> None:
    x, _, *first = op_arguments(Case(rows=(2, 9), d=20, r=6, norm="both", scale="channel"), True)
    _, _, *second = op_arguments(Case(rows=(2, 9), d=20, r=10, up_bias=False), True)
    n = len(PARAMETERS) + 1
    eps, dropout, _, *codes = first[n + 1 :]
    rest = (*first[:n], *second[:n], 4, first[n], second[n], eps, dropout, *codes)
    torch.library.opcheck(ops.multiway_forward.default, (x, None, *rest, True))
    with torch.no_grad():
        y, *saved = ops.multiway_forward(x, None, *rest, True)
    rest = tuple(t.detach() if isinstance(t, Tensor) else t for t in rest)
    torch.library.opcheck(
        ops.multiway_backward.default,
        (torch.randn_like(y), x.detach(), *saved, *rest, (1 << 15) - 1),
    )


@needs_library
def test_a_forward_that_saved_nothing_cannot_train() -> None:
    with pytest.raises(RuntimeError, match="save=True is needed for gradients"):
        ops.bottleneck_forward(*op_arguments(SAMPLES[0], True), False)


class Adapter(nn.Module):
    """A bottleneck with every parameter, called through the functional interface."""

    def __init__(self, d: int = 32, r: int = 8, **options: Any) -> None:
        super().__init__()
        gen = torch.Generator().manual_seed(0)
        shapes = {
            "down_weight": (r, d), "up_weight": (d, r), "down_bias": (r,), "up_bias": (d,),
            "norm_weight": (d,), "norm_bias": (d,), "scale": (1,),
        }  # fmt: skip
        for name, shape in shapes.items():
            t = torch.randn(*shape, generator=gen) * (0.3 if len(shape) == 2 else 1.0)
            self.register_parameter(name, nn.Parameter(t))
        self.options = options

    def forward(self, x: Tensor) -> Tensor:
        return functional.bottleneck(
            x, **dict(self.named_parameters()), residual=x, training=True, **self.options
        )


def gradients(module: nn.Module, x: Tensor, call: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """y, dx and every parameter's gradient for a fixed cotangent."""
    x = x.detach().requires_grad_()
    y = call(x)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, [x, *module.parameters()], dy)]


def check_like_reference(module: nn.Module, x: Tensor, got: list[Tensor]) -> None:
    """``got`` = [y, dx, parameter gradients ...] of a float32 module, under the tolerance rule."""

    def pair(draw: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        base = copy.deepcopy(module)
        for p in base.parameters():
            p.data = last_bit(p.data, draw, torch.float32)
        gold = copy.deepcopy(base).double()
        with fastadapters.backend("reference"):
            return named(gradients(gold, x.double(), gold)), named(gradients(base, x, base))

    check_all(named(got), pair)


@pytest.mark.parametrize("name", BACKENDS)
def test_compile_fullgraph_over_batch_sizes(name: str) -> None:
    torch._dynamo.reset()
    module = Adapter(activation="gelu")
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(module, backend=counter, fullgraph=True)
    gen = torch.Generator().manual_seed(0)
    for batch in (5, 8, 3, 16, 2):
        x = torch.randn(batch, 7, 32, generator=gen)
        with fastadapters.backend(name):
            got = gradients(module, x, compiled)
        check_like_reference(module, x, got)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("name", BACKENDS)
def test_compile_with_dropout_and_autocast(name: str) -> None:
    torch._dynamo.reset()
    module = Adapter(dropout=0.5)
    compiled = torch.compile(module, fullgraph=True)
    x = torch.randn(6, 32)
    with fastadapters.backend(name), torch.autocast("cpu", torch.bfloat16):
        y, *grads = gradients(module, x, compiled)
    assert {t.dtype for t in (y, *grads)} == {torch.float32}  # of the residual
    torch._dynamo.reset()


@pytest.mark.parametrize("name", BACKENDS)
def test_export(name: str) -> None:
    module = Adapter(activation="silu")
    batch = torch.export.Dim("batch", min=1, max=64)
    with fastadapters.backend(name), torch.no_grad():
        program = torch.export.export(
            module, (torch.randn(4, 7, 32),), dynamic_shapes={"x": {0: batch}}
        )
        x = torch.randn(11, 7, 32)
        assert torch.equal(program.module()(x), module(x))
    targets = {str(node.target) for node in program.graph.nodes}
    assert ("fastadapters.bottleneck_forward.default" in targets) == (name == "cpu")


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_autocast(name: str, autocast: torch.dtype, dtype: torch.dtype) -> None:
    module = Adapter()
    x = torch.randn(50, 32, dtype=dtype)
    if dtype == torch.float64:
        with torch.autocast("cpu", autocast):
            assert module(x).dtype == torch.float64
        return

    def rounded(draw: int) -> nn.Module:
        for p in (module := Adapter()).parameters():
            p.data = last_bit(p.data.to(autocast), draw, autocast).float()
        return module

    def under(backend: str, module: nn.Module) -> dict[str, Tensor]:
        with fastadapters.backend(backend), torch.autocast("cpu", autocast):
            return named(gradients(module, x, module))

    def pair(draw: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        gold = rounded(draw).double()
        with fastadapters.backend("reference"):
            exact = named(gradients(gold, x.double(), gold))
        return exact, under("reference", rounded(draw))

    out = under(name, rounded(0))
    y, dx, *parameters = out.values()
    assert (y.dtype, dx.dtype) == (torch.float32, dtype)  # y: of the learnable scale
    assert {t.dtype for t in parameters} == {torch.float32}
    check_all(out, pair)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint_regenerates_dropout(name: str, use_reentrant: bool) -> None:
    module = Adapter(dropout=0.5)
    x = torch.randn(40, 32)
    with fastadapters.backend(name):

        def plain(x: Tensor) -> Tensor:
            return module(x)

        def again(x: Tensor) -> Tensor:
            return checkpoint(module, x, use_reentrant=use_reentrant)

        results = []
        for call in (plain, again):
            torch.manual_seed(4)
            leaf = x.detach().requires_grad_()
            call(leaf).square().sum().backward()
            results.append([leaf.grad, *(p.grad for p in module.parameters())])
            module.zero_grad()
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)


@needs_library
def test_double_backward_raises_when_fused() -> None:
    module, x = Adapter(), torch.randn(5, 32, requires_grad=True)
    with fastadapters.backend("cpu"):
        (dx,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        dx.sum().backward()
    with fastadapters.backend("reference"):
        (dx,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
    dx.sum().backward()


def test_func_transforms_and_forward_mode() -> None:
    """They get what the eager backend computes; a fused one asked for by name refuses."""
    module, x = Adapter(), torch.randn(6, 5, 32)
    parameters = {name: p.detach() for name, p in module.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(module, parameters, (x,)).square().sum()

    per_sample = torch.vmap(torch.func.grad(loss), (None, 0))
    tangents = {name: torch.randn_like(p) for name, p in parameters.items()}

    def along_tangents() -> Tensor:
        with forward_ad.dual_level():
            duals = {n: forward_ad.make_dual(p, tangents[n]) for n, p in parameters.items()}
            return forward_ad.unpack_dual(loss(duals, x)).tangent

    expected: list[dict[str, Tensor]] = []
    for item in x:
        leaves = {name: p.clone().requires_grad_() for name, p in parameters.items()}
        with fastadapters.backend("eager"):
            grads = torch.autograd.grad(loss(leaves, item), list(leaves.values()))
        expected.append(dict(zip(leaves, grads, strict=True)))

    computed = per_sample(parameters, x)
    tangent = along_tangents()
    for name in parameters:
        rows = torch.stack([e[name] for e in expected])
        assert torch.allclose(computed[name], rows, rtol=1e-4, atol=1e-4), name
    products = [(e[name] * tangents[name]).sum() for e in expected for name in parameters]
    assert torch.allclose(tangent, torch.stack(products).sum(), rtol=1e-4)
    jvp = torch.func.jvp(lambda p: loss(p, x), (parameters,), (tangents,))[1]
    assert torch.allclose(jvp, tangent, rtol=1e-6)
    if "cpu" in BACKENDS:
        with fastadapters.backend("cpu"):
            for transformed in (lambda: per_sample(parameters, x), along_tangents):
                with pytest.raises(RuntimeError, match="need plain PyTorch"):
                    transformed()


@pytest.mark.parametrize("name", ["auto", "eager"])
def test_vmap_over_the_residual_alone(name: str) -> None:
    """What does not depend on it is no batch: nothing of it may be written to."""
    gen = torch.Generator().manual_seed(0)
    shapes = (3, 32), (8, 32), (32, 8), (32,), (5, 3, 32)
    x, down, up, bias, residuals = (torch.randn(*shape, generator=gen) for shape in shapes)

    def op(residual: Tensor) -> Tensor:
        return functional.bottleneck(x, down, up, up_bias=bias, residual=residual)

    with fastadapters.backend(name):
        torch.testing.assert_close(torch.vmap(op)(residuals), torch.stack([*map(op, residuals)]))


@pytest.mark.parametrize("name", BACKENDS)
def test_inference_mode(name: str) -> None:
    module, x = Adapter(), torch.randn(5, 32)
    with fastadapters.backend(name):
        with torch.inference_mode():
            y = module(x)
        assert torch.equal(y, module(x))


def peak_allocation(fn: Callable[[], Any]) -> int:
    """The most bytes that ``fn`` held at once through PyTorch's CPU allocator."""
    with torch.profiler.profile(profile_memory=True) as profile:
        fn()
    held = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_peak_memory(dtype: torch.dtype) -> None:
    """One [M, D] tensor forward (y), two in a training step (y and dx), and what [M, r] takes."""
    m, d, r = 8192, 256, 8
    x = torch.randn(m, d, dtype=dtype, requires_grad=True)
    wd = torch.randn(r, d, requires_grad=True)
    wu = torch.randn(d, r, requires_grad=True)
    tensor = x.numel() * x.element_size()
    small = 2 * m * r * x.element_size() + 16 * d * r * 4 * torch.get_num_threads()

    def forward() -> Tensor:
        return functional.bottleneck(x, wd, wu, residual=x)

    dy = torch.randn_like(x)
    torch.use_deterministic_algorithms(False)
    with fastadapters.backend("cpu"):
        with torch.no_grad():
            forward()
            assert tensor <= peak_allocation(forward) <= tensor + small
        step = peak_allocation(lambda: torch.autograd.grad(forward(), (x, wd, wu), dy))
    assert 2 * tensor <= step <= 2 * tensor + small


def test_import_touches_neither_triton_nor_cuda() -> None:
    code = (
        "import sys, torch, fastadapters; "
        "assert not any(m.split('.')[0] == 'triton' for m in sys.modules), 'triton'; "
        "assert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
