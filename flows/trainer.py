"""Training a velocity model: a plain loop that stops cleanly, resumes exactly and runs under ``torchrun``."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path as FilePath
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from flows import checkpoint, sharded
from flows.averaging import Averaged, at_rest, check_decay
from flows.checkpoint import CheckpointError
from flows.folder_lock import FolderLock
from flows.guidance import check_share, drop_conditions
from flows.interrupt import Interrupted, NumberGuard, Signals
from flows.loader import CoupledLoader, WorkerDied
from flows.logs import RunLog, TrainResult
from flows.matching import FlowMatching, LossModule, Objective, TimeWeight, check_objective
from flows.paths import LinearPath, Path
from flows.seeds import derive_seed, generator_at, random_states, restore_random_states
from flows.times import TimeLaw, UniformTimes
from mbot import __version__, checks
from mbot.distributed.ranks import Ranks

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_SIGNAL, _NON_FINITE = 1, 2


class Trainer:
    """Training of a model ``model(t, x, y)`` on the batches of a `CoupledLoader`.

    Under ``torch.distributed`` (started by ``torchrun``) the model is wrapped in DistributedDataParallel, unless
    ``fully_shard`` of FSDP2 has sharded it (then ``ema=None``), and only rank 0 writes. SIGTERM or SIGINT finishes the
    step, saves and raises `flows.Interrupted` (exit code 75). On the CPU a resumed run ends with the same bits as an
    uninterrupted one.

    Args:
        model: velocity model, on its device.
        loader: coupled batches; its ``device`` should be the model's.
        steps: optimiser steps of the whole run.
        path: how pairs are connected; None for straight lines. Where the loader was given no coupling, it takes the
            path's own.
        times: law of the times that the model is trained at; None for uniform ones.
        time_weight: weight of the loss at each time, see `flows.FlowMatching`. A resumed run compares its name.
        objective: what the model is trained for, such as `flows.MeanFlow`; None for `flows.FlowMatching`. It comes with
            its own path, times and time weight; a loader that was given a coupling keeps it.
        optimizer: over the model's parameters; None for Adam at 2e-4.
        scheduler: stepped once an optimiser step; None for a constant rate. See `warmup_schedule`.
        out: folder of the run: ``checkpoints/``, ``metrics.csv``, ``tensorboard/``. None writes nothing.
        seed: of times, path noise, dropped conditions and (at the start) of torch's default generators.
        ema: decay of the averaged weights, or None. Rises as ``(1 + step) / (10 + step)`` at first.
        ema_reference_batch: samples of a step (accumulated, of all processes) that ``ema`` is meant for; κ times as
            many decay by ``ema^κ``, for the same half-life in samples. None: ``ema`` for any batch.
        precision: ``"fp32"``, ``"bf16"`` or ``"fp16"`` autocast (weights stay as they are; fp16 scales gradients).
        clip: largest gradient norm, or None.
        accumulate: training batches an optimiser step.
        compile: run the model through ``torch.compile``.
        condition_dropout: share of conditions dropped, for classifier-free guidance; see `flows.drop_conditions`.
        checkpoint_every: steps between checkpoints (the last step is saved as well); None for the last only.
        keep: checkpoints kept, at least 2 so that one is good while another is damaged.
        log_every: steps between rows of ``metrics.csv``.
        on_log: called with each row as a dict of numbers, on rank 0: ``on_log=wandb.log``, or ``lambda row:
            mlflow.log_metrics(row, row["step"])``. A run without a folder logs too.
        tensorboard: write event files.
        progress: show a bar with loss and the share of time that waits for the coupling.
        preview: called as ``preview(model, step)`` with the averaged model in eval mode, without gradients, on rank 0;
            its random numbers do not disturb training.
        preview_every: steps between previews.
        config: plain values saved in every checkpoint.

    Raises:
        TypeError: wrong kinds of arguments.
        ValueError: settings out of range, an optimiser or scheduler that does not belong to the model, or a coupling of
            the loader that contradicts the path.
    """

    def __init__(
        self,
        model: nn.Module,
        loader: CoupledLoader,
        *,
        steps: int,
        path: Path | None = None,
        times: TimeLaw | None = None,
        time_weight: TimeWeight | None = None,
        objective: Objective | None = None,
        optimizer: Optimizer | None = None,
        scheduler: LRScheduler | None = None,
        out: str | FilePath | None = None,
        seed: int = 0,
        ema: float | None = 0.9999,
        ema_reference_batch: int | None = None,
        precision: str = "fp32",
        clip: float | None = None,
        accumulate: int = 1,
        compile: bool = False,
        condition_dropout: float = 0.0,
        checkpoint_every: int | None = None,
        keep: int = 3,
        log_every: int = 50,
        on_log: Callable[[dict[str, float]], Any] | None = None,
        tensorboard: bool = False,
        progress: bool = True,
        preview: Callable[[nn.Module, int], None] | None = None,
        preview_every: int | None = None,
        config: dict[str, Any] | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module called as model(t, x, y); got {type(model).__name__}")
        if not isinstance(loader, CoupledLoader):
            raise TypeError(f"loader must be a flows.CoupledLoader; got {type(loader).__name__}")
        self.model, self.loader, self.steps = model, loader, checks.count(steps, "steps")
        given: Any = loader.given_coupling  # None: the objective's, which is its path's unless it was given one
        if objective is None:
            objective = FlowMatching(given, path or LinearPath(), times or UniformTimes(), time_weight)
        elif not (path is times is time_weight is None):
            raise ValueError("path, times and time_weight belong to the objective: give them to it")
        self.objective = check_objective(objective).paired_by(given)
        loader.use_coupling(self.objective.coupling)
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self.optimizer = torch.optim.Adam(model.parameters(), lr=2e-4) if optimizer is None else optimizer
        self.scheduler = scheduler
        self._check_optimizer()
        self.out = None if out is None else FilePath(out)
        self.lock = FolderLock(self.out)  # held by fit and save; hold it to write to the folder yourself
        self.seed = checks.count(seed, "seed", at_least=0)
        self.ema_decay = check_decay(ema)
        reference = ema_reference_batch
        if reference is not None and ema is None:
            raise ValueError("ema_reference_batch is the batch that ema is meant for: give ema")
        self.ema_batch = None if reference is None else checks.count(reference, "ema_reference_batch")
        self.precision = checks.choice(precision, "precision", tuple(_DTYPES))
        self.clip = None if clip is None else checks.positive(clip, "clip")
        self.accumulate = checks.count(accumulate, "accumulate")
        self.condition_dropout = check_share(condition_dropout, "condition_dropout")
        self.every = {
            "checkpoint": None if checkpoint_every is None else checks.count(checkpoint_every, "checkpoint_every"),
            "log": checks.count(log_every, "log_every"),
            "preview": None if preview_every is None else checks.count(preview_every, "preview_every"),
        }
        if checkpoint_every is not None and self.out is None:
            raise ValueError("checkpoint_every needs a folder to write to: give out")
        self.keep = checks.count(keep, "keep", at_least=2)
        if on_log is not None and not callable(on_log):
            raise TypeError(f"on_log must be called with a dict of each row; got {type(on_log).__name__}")
        self.tensorboard, self.progress, self.preview, self.on_log = tensorboard, progress, preview, on_log
        self.config = checkpoint.plain_values({} if config is None else config)

        distributed = dist.is_available() and dist.is_initialized()
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
        self.step = 0
        sharded.check_sharded(model, ema, preview)
        decay = self.ema_decay
        scale = loader.batch_size * self.accumulate * self.world / self.ema_batch if self.ema_batch else 1.0
        self.averaged = None if decay is None else Averaged(model, decay, scale)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")
        self.generator = generator_at(self.seed, "train", self.rank, device=self.device)
        called: Any = torch.compile(model) if compile else model
        self._loss: Any = sharded.parallel(LossModule(self.objective, called), self.device, self.world)
        self._guard = NumberGuard(self.device, None if self.out is None else self._folder, model)
        self._started = False

    @property
    def path(self) -> Path:
        """The path that connects pairs."""
        return self.objective.path

    @property
    def sampling_model(self) -> nn.Module:
        """The averaged model where there is one, else the model."""
        return self.model if self.averaged is None else self.averaged.module

    def fit(self, resume: bool | str | FilePath = False) -> TrainResult:
        """Train to ``steps``.

        Args:
            resume: True continues from the newest checkpoint in ``out`` (from the start where there is none); a path
                continues from that one.

        Raises:
            CheckpointError: the checkpoint to resume from is damaged, foreign or of another run; one could not be
                written (the message names the last good one); another trainer writes to the folder, or it holds a run
                that this one does not resume.
            TypeError: model, optimizer, scheduler or loader have states of more than tensors and plain values, which a
                checkpoint does not hold.
            NonFiniteLoss: NaN or infinity in the loss, the gradient, or weights about to be saved; in fp16 a gradient
                that overflows at every loss scale.
            Interrupted: a signal came; the state is saved.
            WorkerDied: a worker process of the loader died; the last checkpoint is good.
        """
        with self.lock:
            return self._fit(resume)

    def _fit(self, resume: bool | str | FilePath) -> TrainResult:
        if resume:
            found = checkpoint.latest(self._folder) if resume is True else FilePath(resume)
            if found is not None:
                self.load(found)
        if self.out is not None and self.world > 1:
            Ranks().from_first(self._check_folder)
        elif self.out is not None:
            self._check_folder()
        if not self._started:
            torch.manual_seed(derive_seed(self.seed, "default", self.rank))
            self._started = True
        began, waited, first = time.perf_counter(), self.loader.wait_seconds, self.step
        log = RunLog(
            self.out if self.rank == 0 else None,
            steps=self.steps,
            first=self.step,
            tensorboard=self.tensorboard and self.rank == 0,
            progress=self.progress and self.rank == 0,
            waited=waited,
            on_row=self.on_log,
        )
        saved: FilePath | None = None
        signals = Signals()
        self.model.train()
        try:
            with signals:
                while self.step < self.steps:
                    stop = self._one_step(signals)
                    log.step()
                    done = self.step == self.steps
                    if done:
                        self._check_weights()
                    if done or self._due("log", self.step):
                        self._report(log)
                    if self.out is not None and (done or stop or self._due("checkpoint", self.step)):
                        saved = self.save()
                    if stop and not done:
                        kept = f"saved as {saved}" if saved else "not saved: the run has no folder"
                        raise Interrupted(f"stopped by a signal after step {self.step}; {kept}", saved)
                    if self.preview is not None and (done or self._due("preview", self.step)):
                        self._show()
        except WorkerDied as error:
            if signals.received is None:
                raise
            last = checkpoint.latest(self._folder) if self.out is not None else None
            said = f"stopped by a signal that stopped the data workers as well; the last checkpoint is {last}"
            raise Interrupted(said, last) from error
        finally:
            log.close()
            self.loader.close()
        return TrainResult(
            self.step,
            float(self._guard.loss),
            time.perf_counter() - began if self.step > first else 0.0,
            self.loader.wait_seconds - waited,
            saved,
        )

    def save(self) -> FilePath | None:
        """Write a checkpoint of this moment; on rank 0, after all ranks have met. Returns its path (None elsewhere)."""
        with self.lock:
            return self._save()

    def _save(self) -> FilePath | None:
        if bool(self._guard.bad):
            self._guard.stop(self.step, self._rate, self.precision)
        self._check_weights()
        generators = random_states(self.generator)
        trained = sharded.states(self.model, self.optimizer)
        states: list[Any] = [generators]
        if self.world > 1:
            states = [None] * self.world
            dist.all_gather_object(states, generators)
        if self.rank != 0:
            return None
        return checkpoint.save(
            {
                "step": self.step,
                **trained,
                "ema": None if self.averaged is None else self.averaged.state_dict(),
                "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
                "scaler": self.scaler.state_dict(),
                "loader": self.loader.state_dict(),
                "generators": states,
                "settings": self._settings(),
                "config": self.config,
                "not_finite": self._guard.meant,
                "library": __version__,
                "torch": str(torch.__version__),
            },
            self._folder,
            self.keep,
        )

    def load(self, path: str | FilePath) -> dict[str, Any]:
        """Take over the state of a checkpoint, from which `fit` then continues; returns the ``config`` saved with it.

        Raises:
            CheckpointError: it cannot be read, or was written by a run with other settings or another model.
        """
        state = checkpoint.load(path)
        differ = checkpoint.differences(FlowMatching().settings() | state["settings"], self._settings())
        if differ:
            raise CheckpointError(f"checkpoint {path} belongs to another run; it differs in {differ}")
        try:
            sharded.load_states(self.model, self.optimizer, state)
            if self.averaged is not None:
                self.averaged.load_state_dict(state["ema"])
            if self.scheduler is not None:
                self.scheduler.load_state_dict(state["scheduler"])
            self.scaler.load_state_dict(state["scaler"])
            self.loader.load_state_dict(state["loader"])
            restore_random_states(state["generators"][self.rank], self.generator)
        except (RuntimeError, ValueError, LookupError, AttributeError, TypeError) as error:
            raise CheckpointError(f"checkpoint {path} belongs to another model or loader: {error}") from error
        self.step, self._started = state["step"], True
        self._guard.bad.zero_()
        return dict(state["config"])

    @property
    def _folder(self) -> FilePath:
        if self.out is None:
            raise ValueError("this trainer has no folder: give out")
        return self.out / "checkpoints"

    def _check_optimizer(self) -> None:
        """Refuse an optimiser that would not train the model, and a scheduler of another one."""
        checks.instance(self.optimizer, "optimizer", Optimizer, "a torch.optim.Optimizer over the model's parameters")
        trained = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        if not any(id(p) in trained for p in self.model.parameters()):
            raise ValueError("the optimizer holds no parameter of the model: build it over model.parameters()")
        if not any(p.requires_grad and id(p) in trained for p in self.model.parameters()):
            raise ValueError(
                "the optimizer holds no parameter of the model that takes gradients: all are frozen "
                "(requires_grad=False)"
            )
        if isinstance(self.scheduler, ReduceLROnPlateau):
            raise TypeError(
                "scheduler must step without a metric, once a training step, such as flows.warmup_schedule(optimizer); "
                "got ReduceLROnPlateau"
            )
        if getattr(self.scheduler, "optimizer", self.optimizer) is not self.optimizer:
            raise ValueError(
                "the scheduler belongs to another optimizer, whose rates would change and not those of the training: "
                "give that one as optimizer, too"
            )

    def _check_folder(self) -> None:
        """Refuse to begin a run that could not be resumed: among the checkpoints of another, or of unreadable parts."""
        newest = None if self._started else checkpoint.last_good(self._folder)
        if newest is not None:
            raise CheckpointError(
                f"{self.out} holds a run already, up to {newest.name}: fit(resume=True) goes on with it, and another "
                "out begins a new one"
            )
        parts: dict[str, Any] = {name: getattr(self, name) for name in ("model", "optimizer", "scheduler", "loader")}
        checkpoint.plain_state({name: part.state_dict() for name, part in parts.items() if part is not None})

    @property
    def _rate(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    def _check_weights(self) -> None:
        self._guard.check_weights(self.step, self._rate, self.model, self.sampling_model)

    def _settings(self) -> dict[str, Any]:
        """Settings that a resumed run must share with the saved one."""
        return {
            **self.objective.settings(),
            "seed": self.seed,
            "ema": self.ema_decay,
            "ema_reference_batch": self.ema_batch,
            "precision": self.precision,
            "clip": self.clip,
            "accumulate": self.accumulate,
            "condition_dropout": self.condition_dropout,
            "optimizer": type(self.optimizer).__name__,
            "scheduler": type(self.scheduler).__name__,
            "processes": self.world,
        }

    def _due(self, what: str, step: int) -> bool:
        every = self.every[what]
        return every is not None and step % every == 0

    def _one_step(self, signals: Signals) -> bool:
        """One optimiser step; returns whether a signal requests a stop after it."""
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        for part in range(self.accumulate):
            batch = self.loader.next_batch().to(self.device)
            flow = self.objective.along(batch, self.generator)
            flow = replace(flow, y=drop_conditions(flow.y, self.condition_dropout, self.generator))
            quiet = part + 1 < self.accumulate and hasattr(self._loss, "no_sync")
            with self._loss.no_sync() if quiet else contextlib.nullcontext():
                with torch.autocast(self.device.type, _DTYPES[self.precision], enabled=self.precision != "fp32"):
                    loss = self._loss(flow) / self.accumulate
                self.scaler.scale(loss).backward()
            total += loss.detach()
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), math.inf if self.clip is None else self.clip)
        self._guard.note(total, sharded.whole(norm), self.scaler)
        stop = self._agree(signals)
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.scheduler is not None and self.scaler.get_scale() >= scale:  # else the step was skipped
            self.scheduler.step()
        if self.averaged is not None:
            self.averaged.update_parameters(self.model)
        self.step += 1
        return stop

    def _agree(self, signals: Signals) -> bool:
        """Whether to stop, the same on every rank; raises where values are not finite, before they reach the weights.

        On a GPU this waits for the device, so it is done every tenth step, and where something follows the step.
        """
        step = self.step + 1
        followed = step == self.steps or self._due("checkpoint", step) or self._due("preview", step)
        if self.device.type != "cpu" and step % 10 and not followed and (self.world > 1 or signals.received is None):
            return False
        code = max(_SIGNAL * (signals.received is not None), _NON_FINITE * int(self._guard.bad))
        if self.world > 1:
            shared = torch.tensor(code, device=self.device)
            dist.all_reduce(shared, dist.ReduceOp.MAX)
            code = int(shared)
        if code == _NON_FINITE:
            self._guard.stop(step, self._rate, self.precision)
        return code == _SIGNAL

    def _report(self, log: RunLog) -> None:
        if self.rank == 0:
            figures = {"loss": float(self._guard.loss), "lr": self._rate, "grad_norm": float(self._guard.norm)}
            log.row(self.step, self.loader.wait_seconds, epoch=self.loader.epoch, **figures)

    def _show(self) -> None:
        if self.rank == 0 and self.preview is not None:
            with at_rest(self.sampling_model, self.device) as model:
                self.preview(model, self.step)
