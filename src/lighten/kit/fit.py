"""The fit loop: one-cycle, EMA, bf16 where the machine has it, channels-last, resumable, on one device or by torchrun."""

from __future__ import annotations

import copy
import io
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lighten.data.cache import write_whole
from lighten.errors import BadConfig
from lighten.kit.augment import crop_and_flip, cut_out, to_input
from lighten.types import Job, digest, to_json

IN_MEMORY = 3_000_000_000
"""Bytes of decoded training pixels that are kept in memory; larger sets are decoded batch by batch."""

Groups = Callable[[nn.Module], list[dict[str, Any]]]
"""Parameters in groups for the optimizer, each with a learning rate ("lr") of its own."""

Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""(model, inputs, labels) -> scalar; a method puts its teacher in here."""


@dataclass(frozen=True)
class FitSettings:
    """Settings of one training. `shift` and `cutout` are fractions of the image's size."""

    epochs: int = 30
    batch: int = 128
    lr: float = 0.1
    optimizer: str = "sgd"
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup: float = 0.2
    label_smoothing: float = 0.0
    ema: float = 0.999
    shift: float = 0.125
    flip: bool = True
    cutout: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        checks = {
            "epochs must be 1 or more": self.epochs >= 1,
            "batch must be 2 or more": self.batch >= 2,
            "lr must be above 0": self.lr > 0,
            "optimizer must be sgd or adamw": self.optimizer in ("sgd", "adamw"),
            "warmup must be between 0 and 1": 0 < self.warmup < 1,
            "ema must be 0 or more and under 1": 0 <= self.ema < 1,
            "shift and cutout must be 0 to 0.9": 0 <= self.shift <= 0.9 and 0 <= self.cutout <= 0.9,
        }
        for rule, holds in checks.items():
            if not holds:
                raise BadConfig(f"fit: {rule}.")


def best_device() -> torch.device:
    """The GPU of this process (LOCAL_RANK under torchrun) where there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def has_bf16(device: torch.device) -> bool:
    """Whether autocast to bfloat16 is hardware here, not emulation."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    flags = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
    return "avx512_bf16" in flags or "amx_bf16" in flags


def gains_from_bf16(model: nn.Module, device: torch.device) -> bool:
    """Whether bfloat16 trains `model` faster here. A rule, not a timing: a resumed training must decide the same.

    Measured on one core with avx512_bf16 at 64 x 64: ResNet-18 trains 1.9 times as fast in bfloat16, MobileNetV3 2.2
    times as slow: a processor has no good bfloat16 kernels for depthwise convolutions.
    """
    depthwise = any(isinstance(m, nn.Conv2d) and 1 < m.groups == m.in_channels for m in model.modules())
    return has_bf16(device) and (device.type == "cuda" or not depthwise)


def fit(
    model: nn.Module,
    settings: FitSettings,
    loss: Loss,
    job: Job,
    *,
    checkpoint: Path | None = None,
    after_epoch: Callable[[int, nn.Module, float], None] | None = None,
    groups: Groups | None = None,
    autocast: bool = True,
) -> nn.Module:
    """Train on `job.data.train`; returns the averaged (EMA) model on the CPU, in eval mode.

    `groups` replaces the optimizer's own (and `settings.lr`). Without `autocast` everything stays float32, whatever the
    machine is good at: simulated quantization is wrong in bfloat16, whose 8 bits of mantissa cannot tell 256 levels
    apart. With `checkpoint`, state is written whole after each epoch and the same call goes on from there. Under torchrun
    (WORLD_SIZE above 1) each process takes its share of every batch. Raises BadConfig where the loss is not finite.
    """
    run = _Run.start(model, settings, job, checkpoint, groups, autocast)
    for epoch in range(run.epoch, settings.epochs):
        mean_loss = _epoch(run, epoch, loss, job)
        if not math.isfinite(mean_loss):
            raise BadConfig(f"The loss is {mean_loss} in epoch {epoch + 1}.", "Lower the learning rate (fit: lr).")
        run.save(epoch + 1)
        if after_epoch and run.rank == 0:
            after_epoch(epoch + 1, run.average.eval(), mean_loss)
    return run.average.eval().cpu()


@dataclass
class _Run:
    """All that changes while training; what `save` writes and `start` reads back."""

    settings: FitSettings
    device: torch.device
    rank: int
    world: int
    model: nn.Module
    average: nn.Module
    optimizer: Any
    schedule: Any
    pixels: Tensor | None
    labels: Tensor
    epoch: int
    steps: int
    checkpoint: Path | None
    bf16: bool

    @classmethod
    def start(
        cls,
        model: nn.Module,
        settings: FitSettings,
        job: Job,
        checkpoint: Path | None,
        groups: Groups | None,
        autocast: bool,
    ) -> _Run:
        rank, world = _join_workers()
        device = best_device()
        torch.manual_seed(settings.seed)
        if device.type == "cuda":
            torch.backends.cudnn.benchmark = True
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        model = model.to(device, memory_format=torch.channels_last).train()
        split = job.data.train
        steps = max(1, len(split) // settings.batch)
        optimizer = _optimizer(model, settings, groups)
        total = steps * settings.epochs
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer,
            [group["lr"] for group in optimizer.param_groups],
            total_steps=total,
            pct_start=max(settings.warmup, 1.5 / total) if total > 1 else settings.warmup,
            cycle_momentum=False,
            div_factor=10,
            final_div_factor=1e3,
        )
        average = copy.deepcopy(model).requires_grad_(False)
        pixels = _in_memory(job, device)
        labels = torch.from_numpy(split.labels).to(device)
        run = cls(
            settings,
            device,
            rank,
            world,
            model,
            average,
            optimizer,
            schedule,
            pixels,
            labels,
            0,
            steps,
            checkpoint,
            autocast and gains_from_bf16(model, device),
        )
        run._resume()
        return run

    @property
    def mark(self) -> str:
        return digest(to_json(self.settings))

    def save(self, epoch: int) -> None:
        if self.checkpoint is None or self.rank:
            return
        state = {
            "epoch": epoch,
            "mark": self.mark,
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
        }
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_whole(self.checkpoint, buffer.getvalue())

    def _resume(self) -> None:
        if self.checkpoint is None or not self.checkpoint.exists():
            return
        state = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
        if state["mark"] != self.mark:
            raise BadConfig(
                f"{self.checkpoint} belongs to a training with other settings.",
                "Choose another out folder, or remove it.",
            )
        for name in ("model", "average", "optimizer", "schedule"):
            getattr(self, name).load_state_dict(state[name])
        self.epoch = state["epoch"]


def _epoch(run: _Run, epoch: int, loss: Loss, job: Job) -> float:
    s = run.settings
    model = run.model.train()
    torch.manual_seed(s.seed * 100_003 + epoch * 61 + run.rank)  # dropout: a resumed epoch draws what it would have
    stepping = nn.parallel.DistributedDataParallel(model) if run.world > 1 else model
    total, seen = torch.zeros((), device=run.device), 0
    began = time.monotonic()
    for x, y in _batches(run, epoch, job):
        with torch.autocast(run.device.type, torch.bfloat16, enabled=run.bf16):
            value = loss(stepping, x, y)
        run.optimizer.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        run.optimizer.step()
        run.schedule.step()
        seen += 1
        _blend(run.average, model, s.ema, epoch * run.steps + seen)
        total += value.detach()
        if run.rank == 0 and (seen % 10 == 0 or seen == run.steps):
            pace = (time.monotonic() - began) / seen
            job.progress(
                f"epoch {epoch + 1}/{s.epochs} ({pace * 1e3:.0f} ms a step)",
                epoch * run.steps + seen,
                s.epochs * run.steps,
            )
    return float(total) / max(1, seen)


def _batches(run: _Run, epoch: int, job: Job) -> Iterator[tuple[Tensor, Tensor]]:
    s, share = run.settings, run.settings.batch // run.world
    generator = torch.Generator().manual_seed(s.seed * 100_003 + epoch)
    order = torch.randperm(len(run.labels), generator=generator)
    local = torch.Generator().manual_seed(s.seed * 100_003 + epoch * 61 + run.rank + 1)
    for k in range(run.steps):
        rows = order[k * s.batch : (k + 1) * s.batch][run.rank * share : (run.rank + 1) * share or None]
        if run.pixels is not None:
            pixels = run.pixels[rows.to(run.device)]
        else:
            pixels = torch.from_numpy(job.data.train.pixels(job.preprocess, rows.numpy())).to(run.device)
        x = to_input(crop_and_flip(pixels, s.shift, s.flip, local), job.preprocess)
        x = cut_out(x, s.cutout, local) if s.cutout else x
        yield x.contiguous(memory_format=torch.channels_last), run.labels[rows.to(run.device)]


def _optimizer(model: nn.Module, s: FitSettings, groups: Groups | None = None) -> Any:
    """No weight decay on biases and norms (He et al., 2019, "Bag of Tricks", section 3.1)."""
    decayed = [p for p in model.parameters() if p.ndim > 1 and p.requires_grad]
    plain = [p for p in model.parameters() if p.ndim <= 1 and p.requires_grad]
    own = [{"params": decayed, "weight_decay": s.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    chosen = own if groups is None else groups(model)
    if s.optimizer == "adamw":
        return torch.optim.AdamW(chosen, lr=s.lr, weight_decay=s.weight_decay)
    return torch.optim.SGD(chosen, weight_decay=s.weight_decay, lr=s.lr, momentum=s.momentum, nesterov=s.momentum > 0)


@torch.no_grad()
def _blend(average: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """Exponential moving average of parameters and buffers; young averages forget faster.

    By name: a copied graph module lists its parts in another order. What is shared is averaged once.
    """
    decay = min(decay, (1 + step) / (10 + step))
    ours = dict([*average.named_parameters(), *average.named_buffers()])
    theirs = dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])
    floats = [name for name, a in ours.items() if a.dtype.is_floating_point]
    torch._foreach_lerp_([ours[n] for n in floats], [theirs[n] for n in floats], 1 - decay)
    for name in ours.keys() - set(floats):
        ours[name].copy_(theirs[name])


def _in_memory(job: Job, device: torch.device) -> Tensor | None:
    split, how = job.data.train, job.preprocess
    if split.ready is None:
        one = split.pixels(how, slice(0, 1))
        if one.nbytes * len(split) > IN_MEMORY:
            return None
        split = split.prepare(how, job.progress, "training")
        if len(split) != len(job.data.train):
            raise BadConfig(
                f"{len(job.data.train) - len(split)} training images cannot be read: {split.unreadable[0]}",
                "Remove them.",
            )
    return torch.from_numpy(split.ready).to(device)


def _join_workers() -> tuple[int, int]:
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return int(os.environ.get("RANK", "0")), world
