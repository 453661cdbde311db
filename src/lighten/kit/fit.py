"""The fit loop: one-cycle by steps or by the clock, EMA, bf16 where it pays, resumable, on one device or by torchrun."""

from __future__ import annotations

import copy
import dataclasses
import io
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lighten.data.cache import write_whole
from lighten.errors import BadConfig
from lighten.kit.augment import cut_out, to_input, views
from lighten.types import Job, digest, to_json

IN_MEMORY = 3_000_000_000
"""Bytes of decoded training pixels that are kept in memory; larger sets are decoded batch by batch."""

Groups = Callable[[nn.Module], list[dict[str, Any]]]
"""Parameters in groups for the optimizer, each with a learning rate ("lr") of its own."""

Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""(model, inputs, labels) -> scalar; a method puts its teacher in here."""

Hook = Callable[[nn.Module], None]
"""Called with the model that trains, in every step."""

KEEP_EVERY = 25
"""Steps between two good states kept in memory: what a loss that is not finite can cost."""

SAVE_EVERY_S = 60.0
"""Inside an epoch, the checkpoint is written this often at most."""

FAILURES = 3
"""The loss that is not finite for the third time ends the training."""


@dataclass(frozen=True)
class FitSettings:
    """Settings of one training. `shift` and `cutout` are fractions of the image's size.

    `epochs` may be a fraction: 0.5 sees half of the images once. `seconds` is a limit of wall-clock time; training ends
    at whichever comes first, with its learning rate annealed either way.
    """

    epochs: float = 30
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
    seconds: float | None = None

    def __post_init__(self) -> None:
        checks = {
            "epochs must be above 0": 0 < self.epochs < math.inf,
            "seconds must be above 0": self.seconds is None or 0 < self.seconds < math.inf,
            "batch must be 2 or more": self.batch >= 2,
            "lr must be above 0": 0 < self.lr < math.inf,
            "optimizer must be sgd or adamw": self.optimizer in ("sgd", "adamw"),
            "warmup must be between 0 and 1": 0 < self.warmup < 1,
            "weight_decay must be 0 or more": 0 <= self.weight_decay < math.inf,
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


def one_cycle(progress: float, warmup: float) -> float:
    """Share of the peak learning rate at `progress` (0 to 1): by cosines from 1/10 to 1 at `warmup`, then to 1/10,000.

    Smith & Topin, 2018, "Super-Convergence"; the numbers are those of torch's OneCycleLR with div_factor 10 and
    final_div_factor 1e3.
    """
    rising = progress < warmup
    start, end = (0.1, 1.0) if rising else (1.0, 1e-4)
    at = progress / warmup if rising else (progress - warmup) / (1 - warmup)
    return end + (start - end) * (1 + math.cos(math.pi * at)) / 2


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
    before_step: Hook | None = None,
    after_step: Hook | None = None,
    targets: Tensor | None = None,
    spent_s: float = 0.0,
    clock: Callable[[], float] = time.monotonic,
) -> nn.Module:
    """Train on `job.data.train`; returns the averaged (EMA) model on the CPU, in eval mode.

    `groups` replaces the optimizer's own (and `settings.lr`). Without `autocast` everything stays float32, whatever the
    machine is good at: simulated quantization is wrong in bfloat16, whose 8 bits of mantissa cannot tell 256 levels
    apart. `before_step(model)` is called when gradients are there, before they are clipped; `after_step(model)` when
    the weights have moved, before they are averaged.

    With `checkpoint`, state is written whole after each epoch (and each minute of a long one), and the same call goes
    on from there; of `settings.seconds` it has what is left, and `spent_s` were spent before this call. `targets`
    (images, ...) are handed to the loss instead of the labels. Under torchrun (WORLD_SIZE above 1) each process takes its
    share of every batch.

    Where the loss is not finite, model, average and optimizer go back to the last good state, the learning rate is
    halved from there on, and `job.say` tells. Raises BadConfig at the third time.
    """
    watch = _Watch(clock, settings.seconds, spent_s)
    run = _Run.start(model, settings, job, checkpoint, groups, autocast, watch)
    if targets is not None:
        run.labels = targets.to(run.device)
    hooks = (before_step, after_step)
    while run.step < run.total:
        first = run.step
        mean_loss = _epoch(run, loss, job, hooks)
        run.save()
        if after_epoch and run.rank == 0 and run.step > first:
            after_epoch(math.ceil(run.step / run.steps), run.average.eval(), mean_loss)
    if run.rank == 0:
        job.say(f"trained {run.step / run.steps:.1f} epochs in {watch.spent:.0f} s")
    return run.average.eval().cpu()


@dataclass
class _Watch:
    """How much of the time is spent. `before`: seconds of the runs that this one goes on from."""

    clock: Callable[[], float]
    seconds: float | None
    before: float = 0.0
    taken: int = 0

    def __post_init__(self) -> None:
        self.began = self.stepping = self.saved = self.clock()

    @property
    def spent(self) -> float:
        return self.before + self.clock() - self.began

    @property
    def pace(self) -> float:
        """Seconds of a step, so far."""
        return (self.clock() - self.stepping) / self.taken if self.taken else 0.0

    def share(self, world: int) -> float:
        """Share of the time that is spent when the next step is done; infinite where most of that step would be late.

        The slowest process decides for all of them.
        """
        if self.seconds is None:
            return 0.0
        spent, pace = self.spent, self.pace
        if world > 1:
            both = torch.tensor([spent, pace], dtype=torch.float64, device=best_device())
            torch.distributed.all_reduce(both, torch.distributed.ReduceOp.MAX)
            spent, pace = both.tolist()
        if spent + pace / 2 > self.seconds:
            return math.inf
        last = spent + 1.5 * pace > self.seconds
        return 1.0 if last else (spent + pace) / self.seconds


@dataclass
class _Run:
    """All that changes while training; what `save` writes and `start` reads back. `step` of `total` are done,
    `steps` make an epoch; `peaks` are the groups' highest learning rates, `scale` what rollbacks left of them."""

    settings: FitSettings
    device: torch.device
    rank: int
    world: int
    model: nn.Module
    average: nn.Module
    optimizer: Any
    peaks: list[float]
    pixels: Tensor | None
    labels: Tensor
    steps: int
    total: int
    checkpoint: Path | None
    bf16: bool
    watch: _Watch
    step: int = 0
    scale: float = 1.0
    failures: int = 0

    def __post_init__(self) -> None:
        self.all_steps = self.total
        self.kept: dict[str, Any] = {}
        self.order: tuple[int, Tensor] = (-1, torch.empty(0))

    @classmethod
    def start(
        cls,
        model: nn.Module,
        settings: FitSettings,
        job: Job,
        checkpoint: Path | None,
        groups: Groups | None,
        autocast: bool,
        watch: _Watch,
    ) -> _Run:
        rank, world = _join_workers()
        device = best_device()
        if device.type == "cuda":
            torch.backends.cudnn.benchmark = True
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        model = model.to(device, memory_format=torch.channels_last).train()
        split = job.data.train
        steps = max(1, len(split) // settings.batch)
        optimizer = _optimizer(model, settings, groups)
        run = cls(
            settings,
            device,
            rank,
            world,
            model,
            copy.deepcopy(model).requires_grad_(False),
            optimizer,
            [group["lr"] for group in optimizer.param_groups],
            _in_memory(job, device),
            torch.from_numpy(split.labels).to(device),
            steps,
            max(1, round(steps * settings.epochs)),
            checkpoint,
            autocast and gains_from_bf16(model, device),
            watch,
        )
        run._resume()
        watch.stepping = watch.saved = watch.clock()
        return run

    @property
    def mark(self) -> str:
        return digest(to_json(self.settings))

    def state(self) -> dict[str, Any]:
        parts = {name: getattr(self, name).state_dict() for name in ("model", "average", "optimizer")}
        return {"step": self.step, "scale": self.scale, "failures": self.failures, **parts}

    def save(self) -> None:
        self.watch.saved = self.watch.clock()
        if self.checkpoint is None or self.rank:
            return
        own = {"mark": self.mark, "finished": self.step >= self.total, "spent": self.watch.spent}
        buffer = io.BytesIO()
        torch.save({**self.state(), **own}, buffer)
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
        self._load(state)
        self.scale, self.failures = state["scale"], state["failures"]
        self.watch.before += state["spent"]
        if state["finished"]:
            self.total = self.step

    def _load(self, state: dict[str, Any]) -> None:
        for name in ("model", "average", "optimizer"):
            getattr(self, name).load_state_dict(state[name])
        self.step = state["step"]

    def keep(self) -> bool:
        """Remember this state as a good one; False where its weights are not finite."""
        if self.kept and self.kept["step"] == self.step:
            return True
        if not all(bool(torch.isfinite(p).all()) for p in self.model.parameters()):
            return False
        self.kept = copy.deepcopy(self.state())
        return True

    def roll_back(self, value: float, job: Job) -> None:
        """To the last good state, at half the learning rate. Raises BadConfig when that has not helped before."""
        epoch = self.step // self.steps + 1
        what = "infinite" if math.isinf(value) else "NaN"
        self.failures += 1
        if self.failures >= FAILURES:
            raise BadConfig(
                f"The loss was {what} in epoch {epoch}, the {FAILURES}rd time in this training.",
                "Lower the learning rate (lr), and look for inputs or labels that are not finite.",
            )
        self._load(copy.deepcopy(self.kept))  # an optimizer goes on in the very tensors that it is given
        self.scale /= 2
        if self.rank == 0:
            job.say(
                f"The loss was {what} in epoch {epoch}; rolled back to step {self.step} of {self.all_steps} "
                f"and halved the learning rate."
            )

    def set_rate(self, share: float) -> None:
        """One-cycle at whichever is further on, the steps or the clock (`share` of the time)."""
        total = self.all_steps
        peak, progress = self.settings.warmup, 1.0
        if total > 1:
            peak = (max(peak, 1.5 / total) * total - 1) / (total - 1)
            progress = max(self.step / (total - 1), share)
        for group, rate in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = rate * self.scale * one_cycle(progress, peak)


def _epoch(run: _Run, loss: Loss, job: Job, hooks: tuple[Hook | None, Hook | None]) -> float:
    """To the end of the epoch, of the training or of the time; the mean loss of the steps since the last rollback."""
    model = run.model.train()
    stepping = nn.parallel.DistributedDataParallel(model) if run.world > 1 else model
    epoch = run.step // run.steps
    last = min((epoch + 1) * run.steps, run.total)
    total, seen = torch.zeros((), device=run.device), 0
    if not run.keep():
        raise BadConfig("The network's weights are not finite.", "Use an earlier checkpoint.")
    while run.step < last:
        share = run.watch.share(run.world)
        if run.step and share == math.inf:
            run.total = run.step
            break
        run.set_rate(min(share, 1.0))
        total, seen = total + _step(run, stepping, loss, job, hooks), seen + 1
        run.step, run.watch.taken = run.step + 1, run.watch.taken + 1
        if not _healthy(run, total, run.step == last):
            run.roll_back(float(total), job)
            total, seen = torch.zeros((), device=run.device), 0
        elif run.step % KEEP_EVERY == 0 and run.step < last and run.watch.clock() - run.watch.saved > SAVE_EVERY_S:
            run.save()
        if run.rank == 0 and (run.step % 10 == 0 or run.step == last):
            what = f"epoch {epoch + 1}/{run.settings.epochs:g} ({run.watch.pace * 1e3:.0f} ms a step)"
            job.progress(what, run.step, run.all_steps)
    return float(total) / max(1, seen)


def _step(run: _Run, stepping: nn.Module, loss: Loss, job: Job, hooks: tuple[Hook | None, Hook | None]) -> Tensor:
    """One step. The loss, not finite where the gradients are not: then, on the CPU, no weight has moved."""
    before, after = hooks
    x, y = _batch(run, job)
    with torch.autocast(run.device.type, torch.bfloat16, enabled=run.bf16):
        value = loss(stepping, x, y)
    run.optimizer.zero_grad(set_to_none=True)
    value.backward()
    if before:
        before(run.model)
    norm = nn.utils.clip_grad_norm_(run.model.parameters(), 5.0)
    value = value.detach()
    value = torch.where(norm.isfinite() | ~value.isfinite(), value, math.nan)
    if run.world > 1:
        torch.distributed.all_reduce(value)
        value = value / run.world
    if run.device.type == "cpu" and not math.isfinite(float(value)):
        return value
    run.optimizer.step()
    if after:
        after(run.model)
    _blend(run.average, run.model, run.settings.ema, run.step + 1)
    return value


def _healthy(run: _Run, total: Tensor, last: bool) -> bool:
    """Whether all is finite still; a good state is kept. A GPU is not made to wait in every step for the answer."""
    due = run.step % KEEP_EVERY == 0 or last
    if run.device.type == "cpu" or due:
        return math.isfinite(float(total)) and (not due or run.keep())
    return True


def _batch(run: _Run, job: Job) -> tuple[Tensor, Tensor]:
    """Inputs and labels of the next step. All its dice follow from the seed and the step, so that a training which is
    resumed, or rolled back, sees what it would have seen."""
    s, share = run.settings, run.settings.batch // run.world
    epoch, k = divmod(run.step, run.steps)
    if run.order[0] != epoch:
        dice = torch.Generator().manual_seed(s.seed * 100_003 + epoch)
        run.order = (epoch, torch.randperm(len(run.labels), generator=dice))
    seed = (s.seed * 100_003 + run.step) * 64 + run.rank
    torch.manual_seed(seed)  # dropout
    local = torch.Generator().manual_seed(seed + 2**40)
    rows = run.order[1][k * s.batch : (k + 1) * s.batch][run.rank * share : (run.rank + 1) * share or None]
    if run.pixels is not None:
        pixels = run.pixels[rows.to(run.device)]
    else:
        pixels = torch.from_numpy(job.data.train.pixels(job.preprocess, rows.numpy())).to(run.device)
    pixels, labels = views(pixels, run.labels[rows.to(run.device)], s.shift, s.flip, local)
    x = to_input(pixels, job.preprocess)
    x = cut_out(x, s.cutout, local) if s.cutout else x
    return x.contiguous(memory_format=torch.channels_last), labels


def _optimizer(model: nn.Module, s: FitSettings, groups: Groups | None = None) -> Any:
    """No weight decay on biases and norms (He et al., 2019, "Bag of Tricks", section 3.1)."""
    decayed = [p for p in model.parameters() if p.ndim > 1 and p.requires_grad]
    plain = [p for p in model.parameters() if p.ndim <= 1 and p.requires_grad]
    own = [{"params": decayed, "weight_decay": s.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    chosen = own if groups is None else groups(model)
    if s.optimizer == "adamw":
        return torch.optim.AdamW(chosen, lr=s.lr, weight_decay=s.weight_decay, fused=True)
    sgd = torch.optim.SGD(
        chosen, weight_decay=s.weight_decay, lr=s.lr, momentum=s.momentum, nesterov=s.momentum > 0, fused=True
    )
    if s.momentum:  # the fused kernel cannot start one buffer later than the others; from 0 is what the first step does
        for p in (p for group in sgd.param_groups for p in group["params"]):
            sgd.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return sgd


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
    split = decoded(job).data.train
    return None if split.ready is None else torch.from_numpy(split.ready).to(device)


def decoded(job: Job) -> Job:
    """`job` with its training images decoded, where they fit into memory. Raises BadConfig on unreadable ones."""
    split, how = job.data.train, job.preprocess
    if _last and _last[0] is split and _last[1] == how:
        return dataclasses.replace(job, data=dataclasses.replace(job.data, train=_last[2]))
    if split.ready is not None or split.pixels(how, slice(0, 1)).nbytes * len(split) > IN_MEMORY:
        return job
    ready = split.prepare(how, job.progress, "training")
    if len(ready) != len(split):
        raise BadConfig(
            f"{len(split) - len(ready)} training images cannot be read: {ready.unreadable[0]}", "Remove them."
        )
    _last[:] = [split, how, ready]
    return dataclasses.replace(job, data=dataclasses.replace(job.data, train=ready))


_last: list[Any] = []
"""Training images that were decoded last, as [split, preprocessing, decoded split]: trials of one run share them."""


def _join_workers() -> tuple[int, int]:
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return int(os.environ.get("RANK", "0")), world
