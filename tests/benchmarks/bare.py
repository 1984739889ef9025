"""A plain PyTorch loop that imports nothing of Esper: ``python -P bare.py FOLDER``, the control of ``dormant``.

FOLDER holds ``settings.json`` and ``inputs.safetensors`` (images, labels, mean, deviation, validation images and
labels, first weights as ``model/<name>``, the order of each epoch as ``order/<epoch>``, used again from the start when
there are more epochs). It writes ``weights.safetensors`` at the end of its epochs and, as it goes, one line per step to
``steps.jsonl``: ``began``, by the wall clock, and ``cpu_seconds`` of the thread.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F


class Stem(nn.Module):
    """A fixed convolution, given with the first weights."""

    filters: torch.Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("filters", torch.zeros(8 * channels, channels, 2, 2))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return F.gelu(F.conv2d(images, self.filters, stride=2))


class Group(nn.Module):
    """conv, max pooling, normalization, GELU, conv, normalization, GELU."""

    def __init__(self, inputs: int, width: int, pool: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, padding=1, bias=False)
        self.pool = nn.MaxPool2d(2) if pool else nn.Identity()
        self.norm1 = nn.BatchNorm2d(width)
        self.act1 = nn.GELU()
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.act2 = nn.GELU()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        images = self.act1(self.norm1(self.pool(self.conv1(images))))
        return torch.as_tensor(self.act2(self.norm2(self.conv2(images))))


class Network(nn.Module):
    """Groups, global max pooling, a linear head times 0.5; images of 16 pixels or more enter through a stem."""

    def __init__(self, shape: tuple[int, ...], classes: int, widths: list[int]) -> None:
        super().__init__()
        channels, size = shape[0], shape[1]
        self.stem: nn.Module = nn.Identity()
        if size >= 16:
            self.stem, channels, size = Stem(channels), 8 * channels, size // 2
        inputs = [channels, *widths]
        last = len(widths) - 1
        self.groups = nn.Sequential(*(Group(inputs[i], width, i < last) for i, width in enumerate(widths)))
        self.pool = nn.MaxPool2d(size >> last)
        self.flatten = nn.Flatten()
        self.head = nn.Linear(widths[-1], classes, bias=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits = self.head(self.flatten(self.pool(self.groups(self.stem(images)))))
        return torch.as_tensor(logits * 0.5)


def main(folder: Path) -> None:
    """Train."""
    torch.set_num_threads(1)
    settings = json.loads((folder / "settings.json").read_text())
    inputs = load_file(folder / "inputs.safetensors")
    images, labels, mean, deviation = (inputs[name] for name in ("images", "labels", "mean", "deviation"))
    orders = [inputs[f"order/{epoch}"] for epoch in range(settings["orders"])]
    model = Network(tuple(images.shape[1:]), settings["classes"], settings["widths"])
    model.load_state_dict({k.removeprefix("model/"): v for k, v in inputs.items() if k.startswith("model/")})
    batch, per_epoch = settings["batch_size"], len(images) // settings["batch_size"]
    total = settings["epochs"] * per_epoch
    warmup = round(settings["warmup_ratio"] * total)
    rate, momentum, decay = settings["learning_rate"], settings["momentum"], settings["weight_decay"]
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=momentum, nesterov=True, weight_decay=decay)
    steps: list[dict[str, float]] = []
    for step in range(total):
        began, cpu = time.time(), time.thread_time()
        epoch, index = divmod(step, per_epoch)
        chosen = orders[epoch % len(orders)][index * batch : (index + 1) * batch]
        logits = model((images[chosen].float() - mean) / deviation)
        loss = F.cross_entropy(logits, labels[chosen], label_smoothing=settings["label_smoothing"])
        float(loss.detach())
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        share = (step + 1) / warmup if step < warmup else (total - step) / max(1, total - warmup)
        optimizer.param_groups[0]["lr"] = rate * share
        optimizer.step()
        steps.append({"began": began, "cpu_seconds": time.thread_time() - cpu})
        if index == per_epoch - 1:
            model.eval()
            with torch.no_grad():
                held = inputs["validation_images"]
                size = settings["evaluation_batch_size"]
                for first in range(0, len(held), size):
                    logits = model((held[first : first + size].float() - mean) / deviation)
                    float((logits.argmax(1) == inputs["validation_labels"][first : first + size]).sum())
            model.train()
            with (folder / "steps.jsonl").open("a") as file:
                file.writelines(json.dumps(line) + "\n" for line in steps)
            steps = []
    save_file(
        {name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "weights.safetensors"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
