"""The published modules' outputs and gradients, reproduced through ours by parameter name."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compare import check_all
from torch import Tensor, nn

import fastadapters
from fastadapters import (
    AlignmentEnhancer,
    BottleneckAdapter,
    MultiModalAdapter,
    WanderAdapter,
    backends,
)

FILES = sorted(Path(__file__).parent.joinpath("golden").glob("*.npz"))
Outputs = list[Tensor]


def bottleneck(meta: dict[str, Any], params: dict[str, Tensor]) -> nn.Module:
    learnable = meta["scale"] == "learnable_scalar"
    r, d = params["down_proj.weight"].shape
    return BottleneckAdapter(
        d,
        r,
        scale="learnable" if learnable else float(meta["scale"]),
        layernorm=None if meta["layernorm"] == "none" else meta["layernorm"],
        residual=meta["residual"] == "self",
        dtype=torch.float64,
    )


def enhancer(meta: dict[str, Any], params: dict[str, Tensor]) -> nn.Module:
    hidden, d = params["fc1.weight"].shape
    return AlignmentEnhancer(
        d, hidden, activation=meta["activation"], subln=meta["subln"], dtype=torch.float64
    )


def multimodal(meta: dict[str, Any], params: dict[str, Tensor]) -> nn.Module:
    downsample, hidden = "linear", 1
    for index, kind in ((1, "factored"), (2, "mlp")):
        if f"downsampler.{index}.weight" in params:
            downsample, hidden = kind, params["downsampler.0.weight"].shape[0]
    return MultiModalAdapter(
        meta["embed_dim"],
        meta["downsamling_dim"],
        meta["num_heads"],
        downsample=downsample,
        upsample="mlp" if "upsampler.2.weight" in params else "linear",
        hidden_dim=hidden,
        mask=meta["mask"].split()[0],
        dtype=torch.float64,
    )


def wander(meta: dict[str, Any], params: dict[str, Tensor]) -> nn.Module:
    return WanderAdapter(
        meta["dim"],
        meta["seq_lens"],
        meta["rank"],
        feature_rank=meta["drank"],
        time_rank=meta["trank"],
        dtype=torch.float64,
    )


def run_bottleneck(module: nn.Module, inputs: dict[str, Tensor]) -> Outputs:
    return [module(**inputs)]


def run_multimodal(module: nn.Module, inputs: dict[str, Tensor]) -> Outputs:
    assert isinstance(module, MultiModalAdapter)
    text, image = inputs["text"], inputs["image"]
    tokens = torch.cat([text[:, None].expand(-1, image.shape[0], -1), image[None]])
    logits = [module.logits(text, image, 100.0, adapt=adapt) for adapt in ("both", "image")]
    return [module(tokens), *logits]


def run_multimodal_shared(module: nn.Module, inputs: dict[str, Tensor]) -> Outputs:
    """The same through `forward`, which knows that the texts are shared."""
    text, image = module(inputs["text"], inputs["image"])
    return [torch.cat([text.transpose(0, 1), image[None]]), *run_multimodal(module, inputs)[1:]]


def run_wander(module: nn.Module, inputs: dict[str, Tensor]) -> Outputs:
    return [module(list(inputs.values()))]


CASES = [
    (path, build, run)
    for path in FILES
    for prefix, build, runs in (
        ("mwa_enhancer", enhancer, [run_bottleneck]),
        ("mwa_[ino]", bottleneck, [run_bottleneck]),
        ("mma", multimodal, [run_multimodal, run_multimodal_shared]),
        ("wander", wander, [run_wander]),
    )
    for run in runs
    if re.match(prefix, path.name)
]


def test_every_file_is_used() -> None:
    assert len(FILES) == 10
    assert {path for path, _, _ in CASES} == set(FILES)


@pytest.mark.parametrize("backend", ["reference", "eager"])
@pytest.mark.parametrize(
    ("path", "build", "run"), CASES, ids=lambda v: getattr(v, "stem", getattr(v, "__name__", v))
)
def test_golden(path: Path, build: Any, run: Any, backend: str) -> None:
    arrays = np.load(path)
    meta = json.loads(str(arrays["meta"]))

    def group(prefix: str) -> dict[str, Tensor]:
        names = [name for name in arrays.files if name.startswith(prefix)]
        return {name.removeprefix(prefix): torch.from_numpy(arrays[name]) for name in names}

    module = build(meta, group("param."))
    module.load_state_dict(group("param."))
    inputs = {name: t.requires_grad_() for name, t in group("in.").items()}
    with fastadapters.backend(backend):
        outs = run(module, inputs)
    expected, cotangents = group("out."), group("cotangent.")
    assert len(outs) == len(expected)
    sum((out * cotangents[str(i)]).sum() for i, out in enumerate(outs)).backward()

    results = {f"out.{i}": out.detach() for i, out in enumerate(outs)}
    results |= {f"grad.in.{name}": t.grad for name, t in inputs.items()}
    results |= {f"grad.param.{name}": p.grad for name, p in module.named_parameters()}
    assert results.keys() == {n for n in arrays.files if n.startswith(("out.", "grad."))}
    for name, value in results.items():
        error = np.abs(value.numpy() - arrays[name]).max()
        assert error <= 1e-10 * np.abs(arrays[name]).max(), f"{name}: {error:.1e}"


def check_on_kernels(path: Path, build: Any, run: Any, backend: str) -> None:
    """In float32, the golden vectors as gold of the tolerance rule."""
    arrays = np.load(path)
    meta = json.loads(str(arrays["meta"]))

    def results(backend: str) -> dict[str, Tensor]:
        def group(prefix: str) -> dict[str, Tensor]:
            names = [name for name in arrays.files if name.startswith(prefix)]
            return {n.removeprefix(prefix): torch.from_numpy(arrays[n]).float() for n in names}

        module = build(meta, group("param.")).float()
        module.load_state_dict(group("param."))
        inputs = {name: t.requires_grad_() for name, t in group("in.").items()}
        with fastadapters.backend(backend):
            outs = run(module, inputs)
        cotangents = group("cotangent.")
        sum((out * cotangents[str(i)]).sum() for i, out in enumerate(outs)).backward()
        found = {f"out.{i}": out.detach() for i, out in enumerate(outs)}
        found |= {f"grad.in.{name}": t.grad for name, t in inputs.items()}
        return found | {f"grad.param.{name}": p.grad for name, p in module.named_parameters()}

    out = results(backend)
    gold = {name: torch.from_numpy(arrays[name]) for name in out}
    check_all(out, lambda draw: (gold, results("reference")), path.stem)


@pytest.mark.skipif(backends.unavailable("cpu") is not None, reason="needs the compiled library")
@pytest.mark.parametrize(
    ("path", "build", "run"),
    [case for case in CASES if not case[0].name.startswith("mwa")],
    ids=lambda v: getattr(v, "stem", getattr(v, "__name__", v)),
)
def test_on_kernels(path: Path, build: Any, run: Any) -> None:
    check_on_kernels(path, build, run, "cpu")
