"""The PTX machine as a whole: a zoo of Triton's kernels on it."""

from __future__ import annotations

import device
import pytest
import torch

from fastadapters.reference import philox

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

ARCHS = [80, 90]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def close(out: torch.Tensor, gold: torch.Tensor, dtype: torch.dtype, tf32: bool = False) -> None:
    """Within a few roundings of the largest element."""
    eps = 2.0**-10 if tf32 else torch.finfo(dtype).eps
    assert (out.double() - gold).abs().max() <= 4 * eps * gold.abs().max()


@triton.jit
def adapter(
    x,
    down,
    up,
    y,
    seed,
    M,
    D,
    scale,
    R: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
    MASKED: tl.constexpr,
):
    """y = x + scale * gelu(x down^T) up^T."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    middle = tl.arange(0, R)
    z = tl.zeros((BM, R), tl.float32)
    for start in range(0, D, BD):
        cols = start + tl.arange(0, BD)
        inside = (rows[:, None] < M) & (cols[None, :] < D)
        if not MASKED:
            inside = cols[None, :] < D
        tile = tl.load(x + rows[:, None] * D + cols[None, :], mask=inside, other=0.0)
        weight = tl.load(
            down + middle[:, None] * D + cols[None, :], mask=cols[None, :] < D, other=0.0
        )
        z = tl.dot(tile, tl.trans(weight), z, input_precision="ieee")
    h = (0.5 * z * (1 + tl.erf(z * 0.7071067811865476))).to(x.dtype.element_ty)
    for start in range(0, D, BD):
        cols = start + tl.arange(0, BD)
        inside = (rows[:, None] < M) & (cols[None, :] < D)
        weight = tl.load(
            up + cols[:, None] * R + middle[None, :], mask=cols[:, None] < D, other=0.0
        )
        out = tl.dot(h, tl.trans(weight), input_precision="ieee") * scale
        out += tl.load(x + rows[:, None] * D + cols[None, :], mask=inside, other=0.0).to(tl.float32)
        tl.store(y + rows[:, None] * D + cols[None, :], out.to(x.dtype.element_ty), mask=inside)


def adapter_case(
    dtype: torch.dtype, m: int = 100, d: int = 192, r: int = 64
) -> tuple[list[torch.Tensor], torch.Tensor]:
    torch.manual_seed(0)
    x, down, up = (
        torch.randn(*s).mul(f).to(dtype)
        for s, f in (((m, d), 1), ((r, d), d**-0.5), ((d, r), r**-0.5))
    )
    h = torch.nn.functional.gelu(x.double() @ down.double().T).to(dtype).double()
    return [x, down, up], x.double() + 0.5 * h @ up.double().T


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arch", ARCHS)
def test_adapter(arch: int, dtype: torch.dtype) -> None:
    (x, down, up), gold = adapter_case(dtype)
    tile = 32 if dtype == torch.float32 else 64
    for seed in range(3):
        y = torch.empty_like(x)
        grid = (triton.cdiv(len(x), tile),)
        meta = {"R": 64, "BM": tile, "BD": tile, "MASKED": True, "num_warps": 4, "num_stages": 3}
        report = device.triton(
            adapter, grid, x, down, up, y, None, len(x), 192, 0.5, arch=arch, seed=seed, **meta
        )
        close(y, gold, dtype)
    if dtype != torch.float32:
        assert report.count("wgmma.mma_async" if arch == 90 else "mma.sync")
    assert report.traffic(x).read == 2 * x.nbytes and report.traffic(y).written == y.nbytes
    assert report.traffic(x).read_unique == x.nbytes and report.traffic(x).partial_read_lines == 0


def test_missing_mask_is_found() -> None:
    (x, down, up), _ = adapter_case(torch.bfloat16)
    with pytest.raises(device.Fault) as caught:
        device.triton(
            adapter,
            (2,),
            x,
            down,
            up,
            torch.empty_like(x),
            None,
            100,
            192,
            0.5,
            R=64,
            BM=64,
            BD=64,
            MASKED=False,
        )
    assert caught.value.kind == "bounds" and "test_machine.py" in str(caught.value)
    line = int(str(caught.value).split("line ")[1].split()[0])
    with open(__file__) as source:
        assert "tile = tl.load(x" in source.readlines()[line - 1]


@triton.jit
def norm_and_dropout(x, y, seed, D, p, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    cols = tl.arange(0, BLOCK)
    v = tl.load(x + row * D + cols, mask=cols < D, other=0.0).to(tl.float32)
    mean = tl.sum(v) / D
    centred = tl.where(cols < D, v - mean, 0.0)
    out = centred * tl.rsqrt(tl.sum(centred * centred) / D + 1e-5)
    out = tl.where(tl.rand(tl.load(seed), row * D + cols) < p, 0.0, out)
    tl.store(y + row * D + cols, out.to(x.dtype.element_ty), mask=cols < D)


@pytest.mark.parametrize("arch", ARCHS)
def test_norm_and_dropout(arch: int) -> None:
    m, d, p, key = 20, 100, 0.25, 0x1234_5678_9ABC_DEF1
    x, y = torch.randn(m, d), torch.empty(m, d)
    device.triton(
        norm_and_dropout, (m,), x, y, torch.tensor([key]), d, p, arch=arch, BLOCK=128, num_warps=2
    )
    counter = torch.arange(m * d)
    zero = torch.zeros_like(counter)
    words = philox.philox4x32(
        (counter, zero, zero, zero), (torch.tensor(key & 0xFFFFFFFF), torch.tensor(key >> 32))
    )[:, 0]
    signed = torch.where(
        words >= 2**31, 2**32 - 1 - words, words
    )  # tl.rand folds the word before scaling it
    dropped = (signed * 4.6566127342e-10 < p).view(m, d)
    assert torch.equal(y == 0, dropped)
    close(y, torch.nn.functional.layer_norm(x.double(), (d,)) * ~dropped, torch.float32)


@triton.jit
def philox_words(seed, out, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    words = tl.philox(
        tl.load(seed),
        i.to(tl.uint32),
        (i * 0).to(tl.uint32),
        (i * 0 + 7).to(tl.uint32),
        (i * 0).to(tl.uint32),
    )
    for k in tl.static_range(4):
        tl.store(out + i * 4 + k, words[k].to(tl.int32, bitcast=True))


@pytest.mark.parametrize("arch", ARCHS)
def test_philox_is_bit_exact(arch: int) -> None:
    key = torch.tensor([0x0FED_CBA9_8765_4321])
    out = torch.empty(512, 4, dtype=torch.int32)
    device.triton(philox_words, (4,), key, out, arch=arch, BLOCK=128)
    counter = torch.arange(512)
    zero = torch.zeros_like(counter)
    expected = philox.philox4x32((counter, zero, zero + 7, zero), (key & 0xFFFFFFFF, key >> 32))
    assert torch.equal(out.long() & 0xFFFFFFFF, expected)


@triton.jit
def weight_gradient(a, b, out, M, BM: tl.constexpr, N: tl.constexpr):
    """out += a^T b over this program's rows, by atomics."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    cols = tl.arange(0, N)
    left = tl.load(a + rows[:, None] * N + cols[None, :], mask=rows[:, None] < M, other=0.0)
    right = tl.load(b + rows[:, None] * N + cols[None, :], mask=rows[:, None] < M, other=0.0)
    tl.atomic_add(out + cols[:, None] * N + cols[None, :], tl.dot(tl.trans(left), right))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("arch", ARCHS)
def test_transposed_product_with_atomics(arch: int, dtype: torch.dtype) -> None:
    a, b = torch.randn(150, 64).to(dtype), torch.randn(150, 64).to(dtype)
    out = torch.zeros(64, 64)
    device.triton(weight_gradient, (3,), a, b, out, 150, arch=arch, BM=64, N=64, num_warps=4)
    close(out, a.double().T @ b.double(), torch.float32)


@triton.jit
def gated_product(
    a, b, out, M, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr
):
    """out = softmax(a b): a row is in one tile."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    cols = tl.arange(0, BN)
    score = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        left = tl.load(
            a + rows[:, None] * K + k[None, :],
            mask=(rows[:, None] < M) & (k[None, :] < K),
            other=0.0,
        )
        right = tl.load(b + k[:, None] * BN + cols[None, :], mask=k[:, None] < K, other=0.0)
        score = tl.dot(left, right, score, input_precision=PRECISION)
    score = tl.exp(score - tl.max(score, 1)[:, None])
    tl.store(
        out + rows[:, None] * BN + cols[None, :],
        score / tl.sum(score, 1)[:, None],
        mask=rows[:, None] < M,
    )


@pytest.mark.parametrize(
    ("dtype", "precision"),
    [
        (torch.float16, "ieee"),
        (torch.bfloat16, "ieee"),
        (torch.float32, "tf32"),
        (torch.float32, "tf32x3"),
    ],
)
@pytest.mark.parametrize("arch", ARCHS)
def test_softmax_of_product_in_four_stages(arch: int, dtype: torch.dtype, precision: str) -> None:
    a, b = torch.randn(70, 256).to(dtype), (torch.randn(256, 64) / 16).to(dtype)
    out = torch.empty(70, 64)
    meta = {"BM": 64, "BN": 64, "BK": 32, "PRECISION": precision, "num_warps": 4, "num_stages": 4}
    report = device.triton(gated_product, (2,), a, b, out, 70, 256, arch=arch, seed=4, **meta)
    close(out, (a.double() @ b.double()).softmax(1), torch.float32, tf32=True)
    assert report.count("cp.async")
    if arch == 90 and precision != "tf32x3":
        assert report.count("wgmma.mma_async")


@pytest.mark.parametrize(
    ("arch", "needed"),
    [
        (80, {"bar.sync", "cp.async.commit_group", "cp.async.wait_group"}),
        (90, {"bar.sync", "cp.async.wait_group", "wgmma.commit_group", "wgmma.wait_group"}),
    ],
)
def test_synchronisation_of_triton_kernel_is_needed(arch: int, needed: set[str]) -> None:
    """Triton is generous with barriers: not each of them is missed, but some of every kind."""
    (x, down, up), gold = adapter_case(torch.bfloat16)
    meta = {"R": 64, "BM": 64, "BD": 64, "MASKED": True, "num_warps": 4, "num_stages": 3}
    with device.simulate(arch):
        compiled = adapter[(2,)](x, down, up, torch.empty_like(x), None, 100, 192, 0.5, **meta)
    missed = set()
    for change, text in device.mutants(compiled.asm["ptx"], "adapter"):
        y = torch.empty_like(x)
        try:
            with device.simulate(arch, 1, replace={"adapter": text}):
                adapter[(2,)](x, down, up, y, None, 100, 192, 0.5, **meta)
            close(y, gold, torch.bfloat16)
        except (device.Fault, AssertionError):
            missed |= {kind for kind in needed if kind in change}
    assert missed == needed
