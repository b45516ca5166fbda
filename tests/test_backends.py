"""Which backend runs: chosen by a context manager, by a variable or by itself, and the reasons."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
import torch
from torch import Tensor

import fastadapters
from fastadapters import (
    BottleneckAdapter,
    MultiModalAdapter,
    MultiwayAdapter,
    WanderAdapter,
    backends,
    functional,
)

needs_library = pytest.mark.skipif(
    backends.unavailable("cpu") is not None, reason="needs the compiled library"
)


def call(dtype: torch.dtype = torch.float32) -> Tensor:
    """A bottleneck of ones."""
    return functional.bottleneck(*(torch.ones(s, dtype=dtype) for s in ((2, 8), (3, 8), (8, 3))))


def decision() -> backends.Decision:
    """What the present choice makes of a bottleneck."""
    (only,) = fastadapters.explain(call)
    return only


def test_context_managers_nest() -> None:
    before = decision()
    with fastadapters.backend("reference"):
        assert decision() == ("bottleneck", "reference", "chosen by name")
        with fastadapters.backend("eager"):
            assert decision() == ("bottleneck", "eager", "chosen by name")
            with fastadapters.backend("reference"):
                assert decision().backend == "reference"
            assert decision().backend == "eager"
        assert decision().backend == "reference"
    assert decision() == before


def test_auto_undoes_an_outer_choice() -> None:
    with fastadapters.backend("auto"):
        automatic = decision()
        with fastadapters.backend("reference"), fastadapters.backend("auto"):
            assert decision() == automatic


def test_an_exception_restores_the_choice() -> None:
    with fastadapters.backend("eager"):
        with pytest.raises(KeyError), fastadapters.backend("reference"):
            raise KeyError
        assert decision().backend == "eager"


def test_an_unknown_name_changes_nothing() -> None:
    message = r"^name: expected one of auto, reference, eager, cpu, triton, cuda, got 'gpu'$"
    with fastadapters.backend("eager"):
        with pytest.raises(ValueError, match=message), fastadapters.backend("gpu"):
            pytest.fail("the block ran")
        assert decision().backend == "eager"


def test_the_choice_is_process_wide() -> None:
    seen = []
    with fastadapters.backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(decision().backend))
        thread.start()
        thread.join()
    assert seen == ["reference"]


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_a_gpu_backend_on_cpu_tensors(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error, not a fallback, in one sentence; an op without a kernel says so first."""
    with fastadapters.backend(name):
        with pytest.raises(RuntimeError) as raised:
            call()
        problem = "cannot run bottleneck: it runs on cuda tensors, not on cpu"
        assert str(raised.value) == f"backend {name!r} {problem}"
        monkeypatch.setitem(backends.KERNELS, "sequence_fusion", ())
        fuse = WanderAdapter(8, (3,), 2, feature_rank=1, time_rank=1)
        with pytest.raises(RuntimeError) as raised:
            fuse([torch.ones(2, 3, 8)])
        problem = "cannot run sequence_fusion: it has no kernel for sequence_fusion"
        assert str(raised.value) == f"backend {name!r} {problem}"


def test_a_named_backend_without_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "library_error", "_C.abi3.so was not built")
    with fastadapters.backend("cpu"), pytest.raises(RuntimeError) as raised:
        call()
    assert str(raised.value) == "backend 'cpu' cannot run bottleneck: _C.abi3.so was not built"


SCRIPT = """
import torch, fastadapters
from fastadapters import functional

def call():
    return functional.bottleneck(torch.ones(2, 8), torch.ones(3, 8), torch.ones(8, 3))

try:
    print(*fastadapters.explain(call)[0], sep=", ")
except ValueError as error:
    print(error)
with fastadapters.backend("auto"):
    print(fastadapters.explain(call)[0].backend)
"""


@pytest.mark.parametrize(
    ("value", "first_call"),
    [
        ("reference", "bottleneck, reference, chosen by name"),
        ("eager", "bottleneck, eager, chosen by name"),
        ("", None),
        (
            "gpu",
            "FASTADAPTERS_BACKEND: expected one of auto, reference, eager, cpu, triton, cuda, "
            "got 'gpu'",
        ),
    ],
)
def test_environment_variable(value: str, first_call: str | None) -> None:
    """It is obeyed, an unknown value fails at the first call, and a context manager overrides."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**os.environ, "FASTADAPTERS_BACKEND": value},
        capture_output=True,
        text=True,
        check=True,
    )
    with fastadapters.backend("auto"):
        automatic = decision()
    assert done.stdout.splitlines() == [first_call or ", ".join(automatic), automatic.backend]


def sized(d: int, r: int, dtype: torch.dtype = torch.float32, **more: Tensor) -> Tensor:
    """A bottleneck of these sizes on two rows."""
    x, down, up = (torch.ones(s, dtype=dtype) for s in ((2, d), (r, d), (d, r)))
    return functional.bottleneck(x, down, up, **more)


@needs_library
@pytest.mark.parametrize("dtype", backends.FUSED_DTYPES, ids=str)
def test_auto_knows_from_which_sizes_eager_is_faster(dtype: torch.dtype) -> None:
    width, weight, _ = backends.limit("bottleneck", torch.device("cpu"), dtype)
    with fastadapters.backend("auto"):
        assert fastadapters.explain(sized, 8, min(width, weight // 8), dtype)[0].backend == "cpu"
        (wide,) = fastadapters.explain(sized, 1, width + 1, dtype)
        (large,) = fastadapters.explain(sized, weight + 1, 1, dtype)
    assert wide.backend == large.backend == "eager"
    assert f"not cpu: r = {width + 1}: products of this width are compute-bound; eager is " in (
        wide.reason
    )
    assert f"eager is faster beyond D * r = {weight}" in large.reason
    with fastadapters.backend("cpu"):
        assert fastadapters.explain(sized, 1, width + 1, dtype)[0].backend == "cpu"


@needs_library
def test_auto_looks_at_the_wider_adapter_of_two() -> None:
    width = backends.limit("bottleneck", torch.device("cpu"), torch.float32).width
    module = MultiwayAdapter(8, 3)
    module.adaptmlp_text.down_proj = torch.nn.Linear(8, width + 1)
    module.adaptmlp_text.up_proj = torch.nn.Linear(width + 1, 8)
    with fastadapters.backend("auto"):
        (chosen,) = fastadapters.explain(module, torch.ones(2, 5, 8), split=2)
    assert chosen.backend == "eager" and f"r = {width + 1}" in chosen.reason


@pytest.mark.parametrize("arch", ["avx2", "an instruction set to come"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_architecture_has_limits(device: str, arch: str, monkeypatch) -> None:
    monkeypatch.setattr(backends, "architecture", lambda *args: arch)
    for dtype in backends.FUSED_DTYPES:
        assert backends.limit("bottleneck", torch.device(device), dtype).width > 0


def test_the_gpu_limits_are_those_of_its_architecture(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert backends.architecture(torch.device("cuda"), torch.float32) == "sm_90"


class Foreign(Tensor):
    """A tensor of which only its author knows what it is."""


def test_an_r_too_large_for_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CUDA kernels say so by name, before they are called; never in `auto`."""
    monkeypatch.setitem(backends._DEVICE, "cuda", "cpu")
    monkeypatch.setitem(backends.KERNELS, "bottleneck", ("cuda",))
    monkeypatch.setattr(backends, "unavailable", lambda name: None)
    monkeypatch.setattr(backends, "_why_slower", lambda *args: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *args: (8, 0))
    x, down, up = torch.ones(2, 8).bfloat16(), torch.ones(1537, 8), torch.ones(8, 1537)
    reason = "r = 1537 is too large for the shared memory of this GPU"
    with fastadapters.backend("cuda"), pytest.raises(RuntimeError, match=reason):
        functional.bottleneck(x, down, up)
    (only,) = fastadapters.explain(functional.bottleneck, x, down, up)
    assert only.backend == "eager" and reason in only.reason


@needs_library
@pytest.mark.parametrize("which", ["x", "down_weight", "scale"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_subclass_runs_as_published(which: str, dropout: float) -> None:
    tensors = {
        "x": torch.ones(2, 8),
        "down_weight": torch.ones(3, 8),
        "up_weight": torch.ones(8, 3),
    }
    tensors["scale"] = torch.ones(1)
    tensors[which] = tensors[which].as_subclass(Foreign)
    options = {"dropout": dropout, "training": True}
    with fastadapters.backend("auto"):
        assert type(functional.bottleneck(**tensors, **options)) is Foreign
        (chosen,) = fastadapters.explain(functional.bottleneck, **tensors, **options)
    assert chosen.backend == "reference"
    assert "not cpu: it reads plain tensors, not a subclass" in chosen.reason
    with fastadapters.backend("cpu"), pytest.raises(RuntimeError, match="reads plain tensors"):
        functional.bottleneck(**tensors, **options)


def test_jagged_tensors_run_in_auto() -> None:
    parts = [torch.randn(n, 8) for n in (3, 5)]
    down, up = torch.randn(4, 8), torch.randn(8, 4)
    x = torch.nested.nested_tensor(parts, layout=torch.jagged)
    with fastadapters.backend("auto"):
        y = functional.bottleneck(x, down, up, residual=x)
        for one, part in zip(y.unbind(), parts, strict=True):
            torch.testing.assert_close(one, functional.bottleneck(part, down, up, residual=part))


@needs_library
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiled_program_knows_the_sizes(dynamic: bool) -> None:
    width = backends.limit("bottleneck", torch.device("cpu"), torch.float32).width
    compiled = torch.compile(sized, fullgraph=True, dynamic=dynamic, backend="eager")
    with fastadapters.backend("auto"):
        for r in (3, width + 1):
            torch.testing.assert_close(compiled(8, r), sized(8, r))


def test_masks_of_the_fallback_are_those_of_the_generator(monkeypatch) -> None:
    """The share that is dropped, the same from the same seed, none in evaluation."""
    monkeypatch.setattr(backends, "library_error", "not built")
    x, eye = torch.ones(64, 32), torch.eye(32)

    def drop(training: bool = True) -> Tensor:
        torch.manual_seed(0)
        return functional.bottleneck(
            x, eye, eye, activation="identity", dropout=0.25, training=training
        )

    with fastadapters.backend("auto"):
        y = drop()
        assert torch.equal(y, drop()) and torch.equal(drop(training=False), x)
    torch.testing.assert_close(y.unique(), torch.tensor([0.0, 1 / 0.75]))
    assert 0.2 < (y == 0).float().mean() < 0.3


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_auto_takes_the_library(dtype: torch.dtype) -> None:
    with fastadapters.backend("auto"):
        decisions = fastadapters.explain(call, dtype)
    assert decisions == [("bottleneck", "cpu", "fastest available")]


def test_auto_says_why_not_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "library_error", "_C.abi3.so did not load: undefined symbol: f")
    with fastadapters.backend("auto"):
        chosen = decision()
    assert chosen.backend == "eager"
    assert chosen.reason.split("; ") == [
        "fastest available",
        "not cpu: _C.abi3.so did not load: undefined symbol: f",
        "not cuda: it runs on cuda tensors, not on cpu",
        "not triton: it runs on cuda tensors, not on cpu",
    ]


def test_auto_runs_float64_eagerly() -> None:
    with fastadapters.backend("auto"):
        (chosen,) = fastadapters.explain(call, torch.float64)
        y = call(torch.float64)
    assert chosen.backend == "eager"
    assert "not cpu: it takes float32, bfloat16 and float16, not torch.float64" in chosen.reason
    assert torch.equal(y, torch.full((2, 8), 24.0, dtype=torch.float64))


def test_status_names_every_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "library_error", "_C.abi3.so was not built")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert backends.status() == {
        "reference": None,
        "eager": None,
        "cpu": "_C.abi3.so was not built",
        "triton": "Triton is not installed",
        "cuda": "_C.abi3.so was not built",
    }


def test_explain_lists_the_calls_in_order() -> None:
    adapter = BottleneckAdapter(8, 3)
    head = MultiModalAdapter(8, 4, 2)
    fuse = WanderAdapter(8, (3, 5), 2, feature_rank=1, time_rank=1)

    def model(x: Tensor, other: Tensor, *, scale: float) -> Tensor:
        fused = fuse([adapter(x), other])
        with fastadapters.backend("reference"):
            logits = head.logits(fused[0], fused[:, 0], scale)
        return adapter(logits.new_ones(2, 8))

    with fastadapters.backend("eager"):
        decisions = fastadapters.explain(model, torch.ones(2, 3, 8), torch.ones(2, 5, 8), scale=2.0)
    assert decisions == [
        ("bottleneck", "eager", "chosen by name"),
        ("sequence_fusion", "eager", "chosen by name"),
        ("multimodal", "reference", "chosen by name"),
        ("bottleneck", "eager", "chosen by name"),
    ]


@pytest.mark.parametrize("name", ["eager", pytest.param("cpu", marks=needs_library)])
def test_multiway_is_one_decision(name: str) -> None:
    module = MultiwayAdapter(8, 3)
    with fastadapters.backend(name):
        decisions = fastadapters.explain(module, torch.ones(2, 5, 8), split=2)
    assert decisions == [("bottleneck", name, "chosen by name")]


def test_nested_explain_tells_both() -> None:
    inner: list[object] = []
    outer = fastadapters.explain(lambda: inner.extend(fastadapters.explain(call)))
    assert outer == inner and len(inner) == 1


def test_ops_without_kernels_run_eagerly_without_excuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backends.KERNELS, "sequence_fusion", ())
    fuse = WanderAdapter(8, (3,), 2, feature_rank=1, time_rank=1)
    with fastadapters.backend("auto"):
        decisions = fastadapters.explain(fuse, [torch.ones(2, 3, 8)])
    assert decisions == [("sequence_fusion", "eager", "fastest available")]


def test_explain_passes_errors_on_and_stops_recording() -> None:
    """A list of decisions that an error cut short must not swallow those of the caller."""

    def fail() -> None:
        call()
        raise KeyError

    def outer() -> None:
        with pytest.raises(KeyError):
            fastadapters.explain(fail)
        with fastadapters.backend("reference"):
            call()

    assert fastadapters.explain(outer)[-1] == ("bottleneck", "reference", "chosen by name")
