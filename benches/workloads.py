"""The one table of shapes: real models and data sets, and a `small()` version of each for tests."""

from __future__ import annotations

from typing import NamedTuple


class Cost(NamedTuple):
    """The least that one phase (forward, backward) has to move and to multiply."""

    elements: int
    """of the compute dtype, read or written once"""
    flops: int
    """of the matrix products"""


class Bottleneck(NamedTuple):
    """An adapter on x [batch, tokens, dim]."""

    name: str
    batch: int
    tokens: int
    dim: int
    bottleneck: int
    cpu_batch: int
    activation: str = "relu"
    scale: float = 1.0
    residual: str = "x"
    """x, or other (the output of the frozen layer beside the adapter)"""
    bias: bool = True
    norm: bool = False
    dropout: float = 0.0
    quick: bool = False
    out_dim: int = 0
    """D_out, where it is not dim"""
    input_dropout: float = 0.0

    def on(self, device: str) -> Bottleneck:
        return self._replace(batch=self.cpu_batch) if device == "cpu" else self

    def small(self) -> Bottleneck:
        """Two items, ragged sizes, the same options."""
        dim, r = self.dim // 16 + 1, self.bottleneck // 8 + 1
        out = self.out_dim and self.out_dim // 16 + 1
        return self._replace(batch=2, cpu_batch=2, tokens=35, dim=dim, bottleneck=r, out_dim=out)

    def costs(self, training: bool) -> list[Cost]:
        """Forward: x (and the residual) in, y out. Backward: x and dy in, dx out.

        Weights are read in each phase and their gradients written in backward. Two products of
        2 M D r FLOPs forward and four backward; what an implementation recomputes is its own loss.
        """
        m, d, r = self.batch * self.tokens, self.dim, self.bottleneck
        out = self.out_dim or d
        weights = (d + out) * r + self.bias * (out + r) + self.norm * 2 * d
        moved = d + out + (self.residual == "other") * out
        forward = Cost(m * moved + weights, 2 * m * (d + out) * r)
        backward = Cost(m * (2 * d + out) + 2 * weights, 4 * m * (d + out) * r)
        return [forward, backward] if training else [forward]


class Grouped(NamedTuple):
    """An adapter of several for each item of x [batch, tokens, dim]."""

    name: str
    batch: int
    tokens: int
    dim: int
    bottleneck: int
    adapters: int
    quick: bool = False

    def on(self, device: str) -> Grouped:
        return self

    def small(self) -> Grouped:
        return self._replace(batch=8, tokens=35, dim=49, bottleneck=9, adapters=4)

    def costs(self, training: bool) -> list[Cost]:
        """As the bottleneck's, with the weights of all adapters."""
        one = Bottleneck("", self.batch, self.tokens, self.dim, self.bottleneck, self.batch)
        costs, others = one.costs(training), one._replace(batch=0).costs(training)
        return [
            cost._replace(elements=cost.elements + (self.adapters - 1) * weights.elements)
            for cost, weights in zip(costs, others, strict=True)
        ]


class CrossModalAttention(NamedTuple):
    """Attention of shared texts [classes, heads, width] and one image an item, all outputs."""

    name: str
    classes: int
    batch: int
    heads: int = 4
    width: int = 32
    quick: bool = False

    def on(self, device: str) -> CrossModalAttention:
        return self

    def small(self) -> CrossModalAttention:
        return self._replace(classes=self.classes // 100 + 5, batch=3, heads=2, width=8)

    def costs(self, training: bool) -> list[Cost]:
        """Texts over texts once; over one key attention is its value, whatever the score."""
        c, b, a = self.classes, self.batch, self.heads * self.width
        flops = 4 * b * c * a + 4 * c * c * a + 2 * b * (c + 1) * a
        inputs, outputs = 3 * (c + b) * a, b * (c + 1) * a
        forward = Cost(inputs + outputs, flops)
        backward = Cost(2 * inputs + outputs, 2 * flops)
        return [forward, backward] if training else [forward]


class Multimodal(NamedTuple):
    """The adapter head of CLIP: text features [classes, dim] and image features [batch, dim]."""

    name: str
    classes: int
    batch: int
    dim: int = 512
    attn_dim: int = 128
    heads: int = 4
    hidden: int = 32
    adapt: str = "both"
    """or image: only the image features are adapted"""
    masked: bool = False
    quick: bool = False

    def on(self, device: str) -> Multimodal:
        return self

    def small(self) -> Multimodal:
        return self._replace(
            classes=self.classes // 100 + 5, batch=3, dim=48, attn_dim=16, heads=2, hidden=8
        )

    def costs(self, training: bool) -> list[Cost]:
        """The factored head: no [batch, classes, dim] tensor is needed (see docs/performance.md).

        Each product has two gradient products of its size in backward.
        """
        c, b, d, a, r = self.classes, self.batch, self.dim, self.attn_dim, self.hidden
        text_queries = self.adapt == "both" and not self.masked
        flops = (c + b) * 2 * d * a + (c * (2 + text_queries) + 3 * b) * 2 * a * a  # projections
        flops += 4 * b * c * a + 2 * a * a * r + b * 2 * r * (a + d) + 2 * b * c * d  # images
        if self.adapt == "both":
            flops += 2 * b * a * r + 2 * (c + b) * d * r + 2 * d * r * r
            if self.masked:  # the texts of an item all get its image's value
                flops += b * (2 * r * r + 2 * r) + b * c * 2 * r
            else:
                flops += 4 * c * c * a + 2 * c * a * r
                flops += b * c * (2 * a + 2 * self.heads * r + 2 * r * r + 4 * r)
        weights = d * a + a + 4 * (a * a + a) + r * (a + 1) + d * (r + 1)
        features = (c + b) * d
        forward = Cost(features + weights + b * c, flops)
        backward = Cost(2 * (features + weights) + b * c, 2 * flops)
        return [forward, backward] if training else [forward]


class SequenceFusion(NamedTuple):
    """Modalities x_m [batch, lengths[m], dims[m]], fused into [batch, out_len, dim]."""

    name: str
    batch: int
    lengths: tuple[int, ...]
    dim: int
    bottleneck: int
    cpu_batch: int
    rank: int = 1
    widths: tuple[int, ...] = ()
    quick: bool = False

    @property
    def out_len(self) -> int:
        """That of the published module."""
        return self.bottleneck

    @property
    def dims(self) -> tuple[int, ...]:
        """The modalities' own widths, or ``dim`` for each."""
        return self.widths or (self.dim,) * len(self.lengths)

    def on(self, device: str) -> SequenceFusion:
        return self._replace(batch=self.cpu_batch) if device == "cpu" else self

    def small(self) -> SequenceFusion:
        lengths = tuple(5 + 2 * i for i in range(len(self.lengths)))
        dim = self.dim // 16 + 9
        widths = (dim, *(3 + 2 * i for i in range(1, len(self.widths))))
        return self._replace(
            batch=3, cpu_batch=3, lengths=lengths, dim=dim, bottleneck=4,
            widths=widths if self.widths else (),
        )  # fmt: skip

    def costs(self, training: bool) -> list[Cost]:
        """Each x_m once, the output once; products H = x W, P = A^T H, F = P U in that order."""
        b, d, r, t = self.batch, self.dim, self.bottleneck, self.out_len
        tokens = sum(self.lengths)
        per_item = sum(n * width for n, width in zip(self.lengths, self.dims, strict=True))
        x, y = b * per_item, b * t * d
        m = len(self.lengths)
        weights = r * sum(self.dims) + m * (r + self.rank * r * d) + self.rank * tokens * t
        flops = 2 * b * (per_item * r + self.rank * (tokens * t * r + m * t * r * d))
        forward = Cost(x + y + weights, flops)
        backward = Cost(2 * x + y + 2 * weights, 2 * flops)
        return [forward, backward] if training else [forward]


_VIT = {"batch": 128, "tokens": 197, "cpu_batch": 8, "dim": 768, "scale": 0.1}
_MWA = {"batch": 128, "bottleneck": 64, "scale": 0.6, "residual": "other", "dropout": 0.1}
_LLM = {"batch": 8, "tokens": 4096, "dim": 4096, "cpu_batch": 1}

BOTTLENECK = [
    Bottleneck("ViT-B/16 AdaptFormer", bottleneck=64, quick=True, **_VIT),
    Bottleneck("ViT-B/16 AdaptFormer", bottleneck=16, **_VIT),
    Bottleneck("ViT-B/16 AdaptFormer", bottleneck=8, **_VIT),
    Bottleneck("ViT-B/16 AdaptFormer, LayerNorm in", bottleneck=64, norm=True, **_VIT),
    *(
        Bottleneck("32768 tokens", 64, 512, 768, r, cpu_batch=64, scale=0.1, quick=r == 64)
        for r in (64, 16, 8)
    ),
    Bottleneck("BEiT-3 base 224", tokens=197, dim=768, cpu_batch=8, **_MWA),
    Bottleneck("BEiT-3 base 384", tokens=577, dim=768, cpu_batch=8, **_MWA),
    Bottleneck("BEiT-3 large 224", tokens=197, dim=1024, cpu_batch=8, **_MWA),
    Bottleneck("BEiT-3 large 384", tokens=577, dim=1024, cpu_batch=8, **_MWA),
    Bottleneck("BERT-base Pfeiffer", 32, 512, 768, 48, cpu_batch=4),
    *(
        Bottleneck("BERT-base Houlsby", 32, 512, 768, r, cpu_batch=4, activation="gelu")
        for r in (256, 384, 512)
    ),
    *(
        Bottleneck("BERT-base MAM", 32, 512, 768, r, cpu_batch=4, scale=4.0, residual="other")
        for r in (256, 384, 512)
    ),
    *(
        Bottleneck("Alignment Enhancer", 128, 197, d, 4 * d, cpu_batch=2, activation="gelu")
        for d in (768, 1024)
    ),
    Bottleneck("LLM, D 4096", bottleneck=64, activation="silu", **_LLM),
    *(
        Bottleneck(
            f"LoRA{what}, D {d} to {out}",
            bottleneck=16,
            activation="identity",
            scale=2.0,
            bias=False,
            residual="other",
            out_dim=out,
            input_dropout=p,
            **{**_LLM, "dim": d},
        )
        for what, p in (("", 0.0), (", dropout in front", 0.05))
        for d, out in ((4096, 4096), (4096, 11008), (4096, 1024))
    ),
]

OVERHEAD = [
    Bottleneck("tiny", 1, 4, 16, 4, cpu_batch=1, quick=True),
    Bottleneck("one token", 1, 1, 768, 64, cpu_batch=1, quick=True),
    Bottleneck("one token, LLM", 1, 1, 4096, 16, cpu_batch=1),
]

GROUPED = [Grouped("ViT-B/16", 64, 197, 768, 64, 16, quick=True)]

# Classes of the eleven data sets of the few-shot CLIP literature.
CLASSES = {
    "ImageNet": 1000,
    "Caltech101": 100,
    "OxfordPets": 37,
    "StanfordCars": 196,
    "Flowers102": 102,
    "Food101": 101,
    "FGVCAircraft": 100,
    "SUN397": 397,
    "DTD": 47,
    "EuroSAT": 10,
    "UCF101": 101,
}

CROSS_MODAL_ATTENTION = [
    CrossModalAttention(name, CLASSES[name], batch, quick=name == "Caltech101")
    for name, batch in (("EuroSAT", 32), ("Caltech101", 32), ("SUN397", 64), ("ImageNet", 64))
]

MULTIMODAL = [
    *(
        Multimodal(name, classes, batch, quick=(name, batch) == ("Caltech101", 32))
        for name, classes in CLASSES.items()
        for batch in (32, 64, 256)
    ),
    Multimodal("SUN397, image only", 397, 64, adapt="image"),
    Multimodal("SUN397, masked", 397, 64, masked=True),
]

SEQUENCE_FUSION = [
    SequenceFusion("CMU-MOSI", 64, (50, 50, 50), 40, 8, cpu_batch=64),
    SequenceFusion(
        "CMU-MOSI, raw widths", 64, (50, 50, 50), 300, 8, cpu_batch=64, widths=(300, 5, 20)
    ),
    SequenceFusion("IEMOCAP", 64, (20, 20, 20), 40, 8, cpu_batch=64),
    SequenceFusion("UPMC-Food101", 64, (197, 512), 768, 16, cpu_batch=8, quick=True),
    SequenceFusion("UPMC-Food101, rank 4", 64, (197, 512), 768, 16, cpu_batch=8, rank=4),
    SequenceFusion("MSR-VTT", 32, (32, 32, 30, 64, 32, 16, 77), 512, 16, cpu_batch=16),
]
