"""docs/interop.md: what `fastadapters.patch` replaces in each client, and what it is worth.

    make interop       # writes the tables between the marks, in 2 minutes

Each client's model is built twice, small in depth but with the widths that people train; losses and
times are of a training step of one and of its patched copy, taking turns in one process.
"""

from __future__ import annotations

import copy
import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastadapters

sys.path.append(str(Path(__file__).parent.parent / "tests"))
import published

PAGE = Path(__file__).parent.parent / "docs" / "interop.md"
BEGIN, END = "<!-- measured:begin -->", "<!-- measured:end -->"
STEPS, ROUNDS, D = 5, 15, 768
Loss = Callable[[nn.Module], Tensor]


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sequence_loss(model: nn.Module) -> Tensor:
    """Of what a stack of layers makes of eight images of ViT-B/16."""
    loss: Tensor = (model(seeded(8, 197, D)) - seeded(8, 197, D, seed=1)).square().mean()
    return loss


def stack(*layers: nn.Module) -> tuple[nn.Module, Loss]:
    """Layers of which the adapters and enhancers are trained."""
    model = nn.Sequential(*layers)
    for name, p in model.named_parameters():
        p.requires_grad_("adaptmlp" in name or "enhancemlp" in name)
    return model, sequence_loss


def adaptformer() -> tuple[nn.Module, Loss]:
    return stack(*(published.Layer(D, 64) for _ in range(2)))


def multiway() -> tuple[nn.Module, Loss]:
    return stack(*(published.MultiWayLayer(D, 64, scale=0.6) for _ in range(2)))


def clip_mma() -> tuple[nn.Module, Loss]:
    head = published.Head(published.MaskedAttentionDownsampled(512, 128), seeded(100, 512))
    labels = torch.arange(32)

    def loss(model: nn.Module) -> Tensor:
        return nn.functional.cross_entropy(model(seeded(32, 512, seed=1)), labels)

    return head, loss


def bert_inputs() -> dict[str, Tensor]:
    tokens = torch.randint(1000, (4, 128), generator=torch.Generator().manual_seed(0))
    return {"input_ids": tokens}


def hidden_loss(inputs: Callable[[], dict[str, Tensor]]) -> Loss:
    def loss(model: nn.Module) -> Tensor:
        hidden: Tensor = model(**inputs()).last_hidden_state
        return (hidden - seeded(*hidden.shape, seed=1)).square().mean()

    return loss


def bert_config() -> Any:
    import transformers

    return transformers.BertConfig(
        vocab_size=1000, num_hidden_layers=2, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip


def peft_bert() -> tuple[nn.Module, Loss]:
    import peft
    import transformers

    targets = ["query", "key", "value", "dense"]
    config = peft.LoraConfig(r=16, target_modules=targets, init_lora_weights=False)
    model = transformers.BertModel(bert_config(), add_pooling_layer=False)
    return peft.get_peft_model(model, config), hidden_loss(bert_inputs)


def with_seq_bn(model: Any) -> Any:
    import adapters

    adapters.init(model)
    model.add_adapter("seq_bn", config="seq_bn")
    model.train_adapter("seq_bn")
    return model


def adapters_bert() -> tuple[nn.Module, Loss]:
    import transformers

    model = transformers.BertModel(bert_config(), add_pooling_layer=False)
    return with_seq_bn(model), hidden_loss(bert_inputs)


def adapters_vit() -> tuple[nn.Module, Loss]:
    import transformers

    config = transformers.ViTConfig(num_hidden_layers=2)
    model = with_seq_bn(transformers.ViTModel(config, add_pooling_layer=False))
    return model, hidden_loss(lambda: {"pixel_values": seeded(4, 3, 224, 224)})


CLIENTS = {
    "AdaptFormer, 2 layers, r 64": adaptformer,
    "MultiWay-Adapter, 2 layers, r 64": multiway,
    "clip-mma, 100 classes, batch 32": clip_mma,
    "`peft` LoRA r 16 on BERT, 2 layers": peft_bert,
    "`adapters` SeqBn on BERT, 2 layers": adapters_bert,
    "`adapters` SeqBn on ViT-B/16, 2 layers": adapters_vit,
}


def stepper(model: nn.Module, loss: Loss, losses: list[float]) -> Callable[[], None]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        value = loss(model)
        value.backward()
        optimizer.step()
        losses.append(value.item())

    return step


def names(modules: dict[str, str]) -> str:
    """How many of each last name."""
    last = [name.rpartition(".")[2] or "the model" for name in modules]
    return ", ".join(f"{last.count(n)} x `{n}`" for n in sorted({*last})) or "none"


def measured(build: Callable[[], tuple[nn.Module, Loss]]) -> list[str]:
    torch.manual_seed(0)
    own, loss = build()
    patched = copy.deepcopy(own)
    report = fastadapters.patch(patched)
    losses: tuple[list[float], list[float]] = ([], [])
    steps = [stepper(m, loss, seen) for m, seen in zip((own, patched), losses, strict=True)]
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(ROUNDS):
        for i in random.sample((0, 1), 2):
            start = time.thread_time()
            steps[i]()
            seconds[i].append(time.thread_time() - start)
    apart = max(abs(a - b) for a, b in zip(*(seen[:STEPS] for seen in losses), strict=True))
    times = [1e3 * statistics.median(s) for s in seconds]
    ratio = statistics.median(a / b for a, b in zip(*seconds, strict=True))
    curves = [f"{seen[0]:.6f} to {seen[STEPS - 1]:.6f}" for seen in losses]
    reasons = "; ".join(sorted({*report.skipped.values()}))
    skipped = f"{names(report.skipped)}: {reasons}" if report.skipped else "none"
    return [
        names(report.replaced), skipped, *curves, f"{apart:.1e}", f"{times[0]:.1f}",
        f"{times[1]:.1f}", f"{ratio:.2f}",
    ]  # fmt: skip


def main() -> None:
    """Write the row of each client."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    before, _, rest = PAGE.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    rows = [
        "| client | replaced | skipped | losses of 5 steps | patched | at most apart | ms a step "
        "| patched | x |",
        "|---" * 9 + "|",
    ]
    for name, build in CLIENTS.items():
        rows.append("| " + " | ".join([name, *measured(build)]) + " |")
        print(rows[-1], flush=True)
    PAGE.write_text(before + BEGIN + "\n" + "\n".join(rows) + "\n" + END + after)


if __name__ == "__main__":
    main()
