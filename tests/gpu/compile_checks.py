"""What a compiler made of a kernel: registers, spills, matrix instructions, occupancy.

for r in cubin_resources(path_or_bytes): assert r.spills == 0 and r.matrix["HMMA"]
triton_resources(compiled)                  # of triton.compile(...), for NVIDIA and AMD targets
occupancy(90, registers=128, shared=49152, threads=128).blocks
"""

from __future__ import annotations

import collections
import dataclasses
import pathlib
import re
import subprocess
import tempfile
from typing import Any

from device import cuobjdump

# Tensor cores of sm_80 and later, of sm_90 (wgmma), of sm_100 (tcgen05), and of AMD's matrix cores.
MATRIX = ("HMMA", "HGMMA", "UTCHMMA", "DMMA", "v_mfma")


@dataclasses.dataclass(frozen=True)
class Resources:
    """Of one kernel: registers and stack bytes of a thread, instructions that spill to the stack,
    static shared bytes of a block, instructions in the code, matrix instructions among them."""

    name: str
    arch: str
    registers: int
    stack: int
    spills: int
    shared: int
    instructions: int
    matrix: dict[str, int]


@dataclasses.dataclass(frozen=True)
class Processor:
    """Limits of a multiprocessor, and of the shared memory of one block."""

    threads: int
    blocks: int
    shared: int
    shared_per_block: int
    registers: int = 65_536


_LARGE = Processor(2048, 32, 233_472, 232_448)
PROCESSORS = {
    80: Processor(2048, 32, 167_936, 166_912),
    86: Processor(1536, 16, 102_400, 101_376),
    89: Processor(1536, 24, 102_400, 101_376),
    90: _LARGE,
    100: _LARGE,
    103: _LARGE,
    120: Processor(1536, 24, 102_400, 101_376),
}


@dataclasses.dataclass(frozen=True)
class Occupancy:
    """Blocks resident on a multiprocessor, the share of its warps they fill, what limits them."""

    blocks: int
    share: float
    limit: str


def occupancy(arch: int, *, registers: int, shared: int, threads: int) -> Occupancy:
    """As the CUDA occupancy calculator has it.

    Registers are handed to warps by 256; the system keeps 1 KiB of shared memory of each block.
    """
    p = PROCESSORS[arch]
    warps = -(-threads // 32)
    per_warp = -(-registers * 32 // 256) * 256
    limits = {
        "threads": p.threads // (32 * warps),
        "blocks": p.blocks,
        "registers": p.registers // per_warp // warps,
        "shared memory": p.shared // (-(-shared // 128) * 128 + 1024)
        if shared <= p.shared_per_block
        else 0,
    }
    limit = min(limits, key=lambda k: limits[k])
    return Occupancy(limits[limit], limits[limit] * warps * 32 / p.threads, limit)


def _dump(option: str, path: pathlib.Path) -> str:
    return subprocess.run(
        [str(cuobjdump()), option, str(path)], check=True, capture_output=True, text=True
    ).stdout


def cubin_resources(cubin: bytes | pathlib.Path) -> list[Resources]:
    """Every kernel of a cubin, or of a library or object with cubins inside, by architecture."""
    if isinstance(cubin, bytes):
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "kernel.cubin"
            path.write_bytes(cubin)
            return cubin_resources(path)
    usage: dict[tuple[str, str], dict[str, int]] = {}
    arch = ""
    name = ""
    for line in _dump("--dump-resource-usage", cubin).splitlines():
        if found := re.search(r"^arch = (\w+)", line):
            arch = found.group(1)
        elif found := re.search(r"Function ([\w$]+):", line):
            name = found.group(1)
        elif found := re.findall(r"(REG|STACK|SHARED):(\d+)", line):
            usage[arch, name] = {key: int(value) for key, value in found}
    code: dict[tuple[str, str], collections.Counter[str]] = {}
    for line in _dump("-sass", cubin).splitlines():
        if found := re.search(r"code for (\w+)", line):
            arch = found.group(1)
        elif found := re.search(r"Function : ([\w$]+)", line):
            name = found.group(1)
            code[arch, name] = collections.Counter()
        elif found := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", line):
            code[arch, name][found.group(1).split(".")[0]] += 1
    if {a for a, _ in usage} == {""}:  # a plain cubin: this listing does not name the architecture
        usage = {(arch, n): u for (_, n), u in usage.items()}
    return [
        Resources(
            name=name,
            arch=arch,
            registers=u["REG"],
            stack=u["STACK"],
            spills=code[arch, name]["STL"] + code[arch, name]["LDL"],
            shared=u["SHARED"]
            - (1024 if u["SHARED"] and int(re.sub(r"\D", "", arch)) >= 90 else 0),  # the system's
            instructions=code[arch, name].total(),
            matrix={kind: code[arch, name][kind] for kind in MATRIX if code[arch, name][kind]},
        )
        for (arch, name), u in usage.items()
    ]


def gcn_resources(assembly: str) -> Resources:
    """The kernel of AMD assembly."""

    def number(pattern: str) -> int:
        found = re.search(pattern, assembly)
        if found is None:
            raise ValueError(f"no {pattern} in the assembly")
        return int(found.group(1))

    name = re.search(r"\.amdhsa_kernel (\S+)", assembly)
    arch = re.search(r"amdgcn-amd-amdhsa-+(\w+)", assembly)
    code = re.findall(r"^\s+([a-z][\w.]+)\s", assembly, re.MULTILINE)
    return Resources(
        name=name.group(1) if name else "",
        arch=arch.group(1) if arch else "",
        registers=number(r"\.vgpr_count:\s+(\d+)"),
        stack=number(r"ScratchSize: (\d+)"),
        spills=number(r"\.vgpr_spill_count:\s+(\d+)") + number(r"\.sgpr_spill_count:\s+(\d+)"),
        shared=number(r"LDSByteSize: (\d+)"),
        instructions=sum(not opcode.startswith(".") for opcode in code),
        matrix={"v_mfma": n} if (n := sum(opcode.startswith("v_mfma") for opcode in code)) else {},
    )


def triton_resources(compiled: Any) -> Resources:
    """Of what triton.compile returned; `shared` is all of it, as Triton's is dynamic."""
    if "cubin" in compiled.asm:
        (resources,) = cubin_resources(compiled.asm["cubin"])
    else:
        resources = gcn_resources(compiled.asm["amdgcn"])
    return dataclasses.replace(resources, shared=compiled.metadata.shared)
