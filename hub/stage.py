"""Lay out the sources as kernel-builder of Hugging Face's `kernels` takes them.

    python hub/stage.py FOLDER

FOLDER, where none of it may be, gets build.toml, flake.nix, csrc/ and torch-ext/: the package with
its Triton kernels inside, but for `_ops`, which kernel-builder writes. Nothing is edited.
"""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# CPU kernels are in the builds for CUDA, too: the package serves tensors on both.
BACKENDS = ("cpu", "cuda")
# `TORCH_EXTENSION_NAME` is the name that the ops are to have.
FLAGS = ("-O3", "-fvisibility=hidden", "-DFASTADAPTERS_NAMESPACE=TORCH_EXTENSION_NAME")

GENERAL = """\
[general]
name = "fastadapters"
version = 0
edition = 5
license = "Apache-2.0"
backends = ["cpu", "cuda"]
upstream = "https://github.com/fastadapters/fastadapters"

[torch]
src = {sources}

[torch.stable-abi]
cpu = "2.11"
cuda = "2.11"
"""

FLAKE = """\
{
  description = "fastadapters";
  inputs.kernel-builder.url = "github:huggingface/kernels";
  outputs = { self, kernel-builder }:
    kernel-builder.lib.genKernelFlakeOutputs { inherit self; path = ./.; };
}
"""


def sections(sources: Mapping[Path, Sequence[str]], architectures: Sequence[int]) -> Iterator[str]:
    """A section of build.toml for each backend and set of flags."""
    for backend in BACKENDS:
        groups: dict[tuple[str, ...], list[str]] = {}
        for source, own in sources.items():
            if source.suffix == ".cpp" or backend == "cuda":
                path = source.relative_to(ROOT).as_posix()
                groups.setdefault(() if source.suffix == ".cu" else (*FLAGS, *own), []).append(path)
        for number, (flags, files) in enumerate(groups.items()):
            section: dict[str, object] = {"backend": backend, "depends": ["torch"], "src": files}
            if flags:
                cuda = ["-DFASTADAPTERS_CUDA"] if backend == "cuda" else []
                section["cxx-flags"] = [*flags, *cuda]
            if backend == "cuda":
                section["cuda-capabilities"] = [f"{a / 10}" for a in architectures]
            lines = [f"{key} = {json.dumps(value)}" for key, value in section.items()]
            yield "\n".join([f"\n[kernel.{backend}_{number}]", *lines, ""])


def stage(folder: Path) -> None:
    """Write all that kernel-builder takes to ``folder``."""
    package, drop = folder / "torch-ext" / "fastadapters", shutil.ignore_patterns
    python = drop("_ops.py", "_build.json", "*.so", "__pycache__")
    shutil.copytree(ROOT / "fastadapters", package, ignore=python)
    shutil.copytree(ROOT / "kernels", package / "kernels", ignore=python)
    shutil.copytree(ROOT / "csrc", folder / "csrc", ignore=drop("hooks.cpp", "sources.txt"))
    shutil.copy(ROOT / "hub" / "binding.cpp", folder / "torch-ext" / "torch_binding.cpp")
    shutil.copy(ROOT / "LICENSE", folder)
    setup = runpy.run_path(str(ROOT / "setup.py"))
    bound = ["torch-ext/torch_binding.cpp"]
    headers = (p for p in (folder / "csrc").rglob("*") if p.suffix in (".h", ".cuh"))
    bound += sorted(path.relative_to(folder).as_posix() for path in headers)
    parts = sections(setup["read_sources"](), setup["ARCHITECTURES"])
    (folder / "build.toml").write_text(GENERAL.format(sources=json.dumps(bound)) + "".join(parts))
    (folder / "flake.nix").write_text(FLAKE)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    stage(Path(sys.argv[1]))
