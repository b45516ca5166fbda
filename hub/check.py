"""Build the staged package for this CPU as kernel-builder does, and try it with `kernels`.

    python hub/check.py FOLDER

FOLDER is what hub/stage.py wrote; `kernels` and `kernel-abi-check` are on the path. What needs
kernel-builder itself (nix, each version of PyTorch, CUDA) is not tried.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import kernel_abi_check
import tomlkit
import torch
from torch import Tensor, nn

import fastadapters
import kernels

# What kernel-builder writes beside the sources.
REGISTRATION = """\
#include <Python.h>
#define JOIN(a, b) a##b
#define INIT(name) JOIN(PyInit_, name)
#define QUOTE(x) #x
#define QUOTED(x) QUOTE(x)
#define REGISTER_EXTENSION(name)                                             \\
  PyMODINIT_FUNC INIT(name)() {                                              \\
    static PyModuleDef module = {PyModuleDef_HEAD_INIT, QUOTED(name), nullptr, 0, nullptr}; \\
    return PyModule_Create(&module);                                         \\
  }
"""
OPS = """\
import torch
from . import {name}
ops = torch.ops.{name}

def add_op_namespace_prefix(op_name: str):
    return f"{name}::{{op_name}}"
"""
VARIANT = f"torch-stable-abi211-cpu-{platform.machine()}-linux"


def compile_all(folder: Path, name: str) -> list[str]:
    """The objects of the CPU build whose ops are in ``torch.ops.<name>``."""
    settings = tomlkit.parse((folder / "build.toml").read_text()).unwrap()
    parts = [settings["torch"]]
    parts += [part for part in settings["kernel"].values() if part["backend"] == "cpu"]
    (folder / "registration.h").write_text(REGISTRATION)
    include = Path(torch.__file__).parent / "include"
    common = [
        "g++", "-std=c++20", "-fPIC", "-fno-gnu-unique", f"-DTORCH_EXTENSION_NAME={name}",
        "-DPy_LIMITED_API=0x03090000", "-DTORCH_TARGET_VERSION=0x020b000000000000",
        f"-I{folder}", f"-I{sysconfig.get_path('include')}", "-isystem", str(include),
    ]  # fmt: skip

    def compile_one(job: tuple[str, list[str]]) -> str:
        source, flags = job
        text = (folder / source).read_bytes() + " ".join([*common, *flags]).encode()
        target = folder / "objects" / f"{Path(source).stem}-{hashlib.sha256(text).hexdigest()}.o"
        if not target.exists():
            target.parent.mkdir(exist_ok=True)
            made = target.with_suffix(".new")
            subprocess.run([*common, *flags, "-c", folder / source, "-o", made], check=True)
            made.rename(target)
        return str(target)

    jobs = [(s, p.get("cxx-flags", [])) for p in parts for s in p["src"] if s.endswith(".cpp")]
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
        return list(pool.map(compile_one, jobs))


def build(folder: Path, name: str) -> Path:
    """The folder of the build that `kernels` loads."""
    variant = folder / name / VARIANT
    shutil.rmtree(variant, ignore_errors=True)
    shutil.copytree(folder / "torch-ext" / "fastadapters", variant)
    libraries = [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    library = variant / f"{name}.abi3.so"
    link = ["g++", "-shared", "-s", "-o", library, *compile_all(folder, name), *libraries]
    subprocess.run(link, check=True)
    (variant / "_ops.py").write_text(OPS.format(name=name))
    about = {
        "id": name, "name": "fastadapters", "version": 0, "license": "Apache-2.0",
        "python-depends": [], "backend": {"type": "cpu"},
    }  # fmt: skip
    (variant / "metadata.json").write_text(json.dumps(about))
    return variant


def check_abi(library: Path) -> None:
    found = kernel_abi_check.ObjectFile(library)
    problems = [*found.check_manylinux("manylinux_2_28"), *found.check_python_abi("3.9")]
    if problems:
        sys.exit(f"{library.name}: {problems}")


class Adapter(nn.Module):
    """As AdaptFormer's, to be replaced."""

    def __init__(self) -> None:
        super().__init__()
        self.down_proj, self.up_proj = nn.Linear(64, 8), nn.Linear(8, 64)
        self.non_linear_func, self.scale, self.dropout = nn.ReLU(), 0.5, 0.0
        self.adapter_layernorm_option, self.adapter_layer_norm_before = "none", None

    def forward(
        self, x: Tensor, add_residual: bool = True, residual: Tensor | None = None
    ) -> Tensor:
        y: Tensor = self.up_proj(self.non_linear_func(self.down_proj(x))) * self.scale
        return y + (x if residual is None else residual) if add_residual else y


def gradients(f: object, x: Tensor, *parameters: Tensor) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in (x, *parameters)]
    y = f(*leaves)  # type: ignore[operator]
    return [y, *torch.autograd.grad(y.square().sum(), leaves)]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(s, t) for s, t in zip(a, b, strict=True))


def main() -> None:
    folder = Path(sys.argv[1]).resolve()
    names = ["_fastadapters_cpu_a1b2c3d", "_fastadapters_cpu_0f1e2d3"]
    loaded = []
    for name in names:
        variant = build(folder, name)
        check_abi(variant / f"{name}.abi3.so")
        loaded.append(kernels.get_local_kernel(variant.parent))
        print(f"{name}: built, on the ABI of manylinux_2_28 and Python 3.9, loaded by kernels")

    x, down, up = torch.randn(197, 64), torch.randn(8, 64), torch.randn(64, 8)
    expected = gradients(fastadapters.functional.bottleneck, x, down, up)
    for name, kernel in zip(names, loaded, strict=True):
        (decision,) = kernel.explain(kernel.functional.bottleneck, x, down, up)
        if decision.backend != "cpu" or kernel.functional is fastadapters.functional:
            sys.exit(f"{name}: {decision}")
        if not same(gradients(kernel.functional.bottleneck, x, down, up), expected):
            sys.exit(f"{name}: differs from the package")
        if not hasattr(getattr(torch.ops, name), "bottleneck_forward"):
            sys.exit(f"{name}: its ops are elsewhere")
    print("both beside the package, on their own kernels: equal bits, forward and backward")

    adapter = Adapter()
    plain = [p.detach() for p in gradients(adapter, x)]
    kernels.replace_kernel_forward_from_hub(Adapter, "Adapter")
    repository = kernels.LocalLayerRepository(folder / names[0], layer_name="AdaptFormerAdapter")
    mode = kernels.Mode.TRAINING | kernels.Mode.TORCH_COMPILE
    with kernels.use_kernel_mapping({"Adapter": {"cpu": {mode: repository}}}):
        kernels.kernelize(adapter, mode=mode, device="cpu")
    (decision,) = loaded[0].explain(adapter, x)
    if decision.backend != "cpu":
        sys.exit(f"the layer did not replace the forward: {decision}")
    torch.testing.assert_close(gradients(adapter, x), plain)
    torch.testing.assert_close(
        torch.compile(adapter, fullgraph=True, backend="aot_eager")(x), plain[0]
    )
    print("its layer replaces AdaptFormer's Adapter through kernels.kernelize, compiled, too")


if __name__ == "__main__":
    main()
