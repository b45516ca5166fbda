"""Draws how data flows through each design: python docs/designs/draw.py writes the pictures.

A box is a tensor in memory (grey), or what is done to it (white); what one call does without a trip
through memory is in the orange frame.
"""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
HEIGHT = 40


class Box(NamedTuple):
    x: int
    y: int
    width: int
    text: str
    tensor: bool = False


class Picture(NamedTuple):
    size: tuple[int, int]
    frame: tuple[int, int, int, int, str]
    """x, y, width, height and what it says"""
    boxes: dict[str, Box]
    arrows: list[tuple[str, str]]


def arrow(a: Box, b: Box) -> str:
    """From the side of a that faces b; with a bend where they lie in different rows."""
    if a.x + a.width <= b.x:
        start, end = (a.x + a.width, a.y + HEIGHT // 2), (b.x - 2, b.y + HEIGHT // 2)
        middle = end[0] - 12
        path = f"M{start[0]},{start[1]} H{middle} V{end[1]} H{end[0]}"
    else:
        down = a.y < b.y
        x = b.x + b.width // 2
        end = (x, b.y - 2 if down else b.y + HEIGHT + 2)
        path = f"M{x},{a.y + HEIGHT if down else a.y} V{end[1]}"
    return f'<path d="{path}" class="arrow" marker-end="url(#head)"/>'


def svg(picture: Picture) -> str:
    width, height = picture.size
    x, y, w, h, label = picture.frame
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}">',
        "<style>text{font:13px sans-serif;fill:#263238}.label{fill:#d9480f;font-size:12px}"
        ".tensor{fill:#eceff1;stroke:#90a4ae}.step{fill:#fff;stroke:#546e7a}"
        ".frame{fill:#fff4e6;stroke:#e8590c;stroke-dasharray:5 4}"
        ".arrow{fill:none;stroke:#546e7a;stroke-width:1.4}</style>",
        '<defs><marker id="head" markerWidth="9" markerHeight="8" refX="7" refY="4" '
        'orient="auto"><path d="M0,0 L8,4 L0,8 z" fill="#546e7a"/></marker></defs>',
        '<rect width="100%" height="100%" fill="#fff"/>',
        f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="8" class="frame"/>',
        f'<text x="{x + 10}" y="{y + h - 9}" class="label">{escape(label)}</text>',
    ]
    lines += [arrow(picture.boxes[a], picture.boxes[b]) for a, b in picture.arrows]
    for box in picture.boxes.values():
        kind = "tensor" if box.tensor else "step"
        lines.append(
            f'<rect x="{box.x}" y="{box.y}" width="{box.width}" height="{HEIGHT}" '
            f'rx="{2 if box.tensor else 6}" class="{kind}"/>'
        )
        rows = box.text.split("\n")
        first = box.y + HEIGHT // 2 + 5 - 8 * (len(rows) - 1)
        lines += [
            f'<text x="{box.x + box.width // 2}" y="{first + 16 * i}" text-anchor="middle">'
            f"{escape(row)}</text>"
            for i, row in enumerate(rows)
        ]
    return "\n".join([*lines, "</svg>", ""])


PICTURES = {
    "bottleneck": Picture(
        (900, 200),
        (108, 20, 680, 165, "one call, one pass: z [M, r] and h [M, r] never leave the tile"),
        {
            "x": Box(10, 50, 80, "x\n[M, D]", True),
            "norm": Box(125, 50, 90, "LayerNorm"),
            "down": Box(240, 50, 80, "down"),
            "act": Box(345, 50, 90, "activation"),
            "drop": Box(460, 50, 80, "dropout"),
            "up": Box(565, 50, 60, "up"),
            "scale": Box(650, 50, 60, "scale"),
            "add": Box(735, 50, 40, "+"),
            "residual": Box(715, 118, 80, "residual", True),
            "y": Box(810, 50, 80, "y\n[M, D]", True),
        },
        [("x", "norm"), ("norm", "down"), ("down", "act"), ("act", "drop"), ("drop", "up"),
         ("up", "scale"), ("scale", "add"), ("residual", "add"), ("add", "y")],
    ),
    "lora": Picture(
        (780, 190),
        (240, 20, 420, 155, "one call: x A^T is never in memory"),
        {
            "x": Box(10, 45, 80, "x\n[M, D]", True),
            "frozen": Box(125, 112, 90, "frozen W"),
            "a": Box(260, 45, 80, "A [r, D]"),
            "b": Box(370, 45, 80, "B [D, r]"),
            "scale": Box(480, 45, 70, "alpha / r"),
            "add": Box(600, 45, 40, "+"),
            "wx": Box(580, 112, 80, "x W^T", True),
            "y": Box(690, 45, 80, "y\n[M, D]", True),
        },
        [("x", "a"), ("x", "frozen"), ("a", "b"), ("b", "scale"), ("scale", "add"),
         ("frozen", "wx"), ("wx", "add"), ("add", "y")],
    ),
    "multiway": Picture(
        (780, 210),
        (190, 15, 400, 185, "one call: each tile takes the parameters of its tokens"),
        {
            "x": Box(10, 75, 90, "x\n[B, T, D]", True),
            "vision": Box(215, 35, 150, "tokens < split"),
            "text": Box(215, 115, 150, "tokens >= split"),
            "first": Box(395, 35, 170, "first bottleneck"),
            "second": Box(395, 115, 170, "second bottleneck"),
            "y": Box(670, 75, 90, "y\n[B, T, D]", True),
        },
        [("x", "vision"), ("x", "text"), ("vision", "first"), ("text", "second"),
         ("first", "y"), ("second", "y")],
    ),
    "grouped": Picture(
        (780, 265),
        (190, 15, 430, 240, "one call: rows are taken adapter by adapter"),
        {
            "x": Box(10, 65, 90, "x\n[B, T, D]", True),
            "index": Box(10, 145, 90, "index [B]", True),
            "sort": Box(215, 105, 110, "items of\neach adapter"),
            "first": Box(380, 35, 210, "bottleneck 1, its items"),
            "second": Box(380, 105, 210, "bottleneck 2, its items"),
            "last": Box(380, 175, 210, "bottleneck N, its items"),
            "y": Box(680, 105, 90, "y\n[B, T, D]", True),
        },
        [("x", "sort"), ("index", "sort"), ("sort", "first"), ("sort", "second"),
         ("sort", "last"), ("first", "y"), ("second", "y"), ("last", "y")],
    ),
    "multimodal": Picture(
        (900, 250),
        (115, 15, 660, 220, "one call: no [B, C, D], no [B, C, R] in memory"),
        {
            "text": Box(10, 45, 90, "text\n[C, D]", True),
            "image": Box(10, 150, 90, "image\n[B, D]", True),
            "once": Box(135, 45, 185, "down, q k v, attention\nover texts: once"),
            "each": Box(135, 150, 185, "down, q k v\nof each image"),
            "merge": Box(355, 97, 170, "merge the image's key\ninto each text's softmax"),
            "up": Box(555, 97, 90, "out, up,\nblend"),
            "dot": Box(675, 97, 85, "unit, dot,\nscale"),
            "y": Box(805, 97, 85, "logits\n[B, C]", True),
        },
        [("text", "once"), ("image", "each"), ("once", "merge"), ("each", "merge"),
         ("merge", "up"), ("up", "dot"), ("dot", "y")],
    ),
    "wander": Picture(
        (900, 270),
        (120, 15, 660, 240, "one call: each x_m is read once, only P_m [T_o, r] is kept"),
        {
            "x1": Box(10, 35, 90, "x_1\n[B, T_1, D]", True),
            "x2": Box(10, 105, 90, "x_2\n[B, T_2, D]", True),
            "x3": Box(10, 175, 90, "x_3\n[B, T_3, D]", True),
            "h1": Box(140, 35, 130, "H = gelu(x W)"),
            "h2": Box(140, 105, 130, "H = gelu(x W)"),
            "h3": Box(140, 175, 130, "H = gelu(x W)"),
            "p1": Box(300, 35, 90, "P = A^T H"),
            "p2": Box(300, 105, 90, "P = A^T H"),
            "p3": Box(300, 175, 90, "P = A^T H"),
            "product": Box(440, 105, 170, "product over m of\nP_m U_m, tile by tile"),
            "add": Box(680, 105, 70, "+ leading\ntokens"),
            "y": Box(805, 105, 85, "y\n[B, T_o, D]", True),
        },
        [("x1", "h1"), ("x2", "h2"), ("x3", "h3"), ("h1", "p1"), ("h2", "p2"), ("h3", "p3"),
         ("p1", "product"), ("p2", "product"), ("p3", "product"), ("product", "add"),
         ("add", "y")],
    ),
}  # fmt: skip


def main() -> None:
    for name, picture in PICTURES.items():
        (HERE / f"{name}.svg").write_text(svg(picture))


if __name__ == "__main__":
    main()
