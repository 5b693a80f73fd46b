"""The two-stage protocol around a user's model and loop: fit a teacher, then align the model with it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import fields, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..common.distributed import broadcast
from ..common.dryrun import preserved_modes, preserved_rng
from ..common.inputs import OF_IMAGES, OF_MODEL, readable, refuse_not_finite
from ..common.labels import plain_label
from ..errors import ReSegError
from ..recording.extractor import FeatureExtractor
from ..regularizer import Regularizer, nothing
from . import stage1
from .build import ENTRIES, Origin, Parts, build, restore
from .losses import CrossAlignmentLoss, ReconLoss
from .resume import refuse_another_stage_1
from .settings import AT_RUN_TIME, Settings, settings_of
from .stage1_file import Stage1File
from .teacher import Teacher

OF_TEACHER = (
    "the teacher's features hold NaN or infinite values: either its weights do, or it overflows in low precision. Fit "
    "a new teacher, or run it in another precision (teacher_dtype=)"
)
OF_SIZE = "the alignment loss is NaN or infinite although the features are finite: their squares overflow"


class ReSegWrapper(Regularizer):
    """ReSeg-UNet (Li et al., MICCAI 2025) for a model in your own training loop.

    The model is not edited: its outputs, parameters and state_dict keys stay as they are, and the teacher is not part
    of it. Fit the teacher on the training fold only, because it sees labels.

    The keywords from `weight` on are the fields of `Settings`, which describes them in more detail. None takes the
    preset's value.

    Args:
        model: any U-shaped nn.Module in 2D or 3D, or its DistributedDataParallel or torch.compile wrapper.
        example_input: an image batch as the model takes it, to find the taps and build the teacher now. Without it,
            this happens at the first batch of `fit_recon`, or in `load_state_dict`.
        taps: the taps by kind, or some of them, as a mapping like that of `FeatureExtractor`. None finds them
            automatically.
        preset: "paper" (eqs. 1-8 as published) or "standardized" (the features of both sides are standardized per
            channel before they are compared).
        teacher: a module of your own that maps the encoded label to the image, instead of a copy of the model.
        teacher_taps: taps of that module, like `taps`; None finds them automatically.
        weight: factor of the alignment loss in the total loss (lambda of eq. 8); 0.035 in both presets.
        encoder_to_decoder: weight of teacher encoder against student decoder (eq. 4).
        decoder_to_encoder: weight of teacher decoder against student encoder (eq. 5).
        bottleneck: weight of the bottleneck term (eq. 6).
        divisor: the sum of all terms is divided by this (eq. 7).
        normalize: "batch" standardizes every feature channel over batch and space before the comparison.
        seed: of the fixed maps between features with different numbers of channels.
        alpha: weight of the mean squared error in stage 1 (eq. 3).
        beta: weight of the L1 error in stage 1 (eq. 3).
        label_input: "index" feeds the class index as one channel, "onehot" one channel per class.
        ignore_index: label value that does not count.
        output: path to the segmentation in what the model returns.
        teacher_init: "random" draws new weights for the copy, "copy" keeps the model's.
        levels: strides of the levels to align.
        encoder: "skip" aligns what the skip connections carry, "block" the last block of each encoder level.
        every: align only at every k-th call, with k times the weight.
        teacher_dtype: torch.bfloat16 or torch.float16 runs the teacher in autocast to it.
        compile_teacher: run the teacher through torch.compile.
        capture_teacher: on CUDA, replay the teacher's forward as a CUDA graph.

    Raises:
        TapError: the model has no levels that can be paired, or a tap is unknown.
        ReSegError: a setting is invalid, or the model is not supported; the message says what to do.
    """

    ENTRIES: ClassVar[Mapping[str, Any]] = {
        "settings": {
            **{field.name: object for field in fields(Settings) if field.name != "weight"},  # which checks its choices
            **{"divisor": float, "seed": int, "ignore_index": (int, None)},
            **{"output": ([(int, str)], int, str, None), "levels": ([(int, [int])], None)},
        },
        "ready": bool,
        "parts": (ENTRIES, None),
    }

    def __init__(
        self,
        model: nn.Module,
        example_input: Any = None,
        *,
        taps: Mapping[str, Any] | None = None,
        preset: str = "paper",
        teacher: nn.Module | None = None,
        teacher_taps: Mapping[str, Any] | None = None,
        weight: float | None = None,
        encoder_to_decoder: float | None = None,
        decoder_to_encoder: float | None = None,
        bottleneck: float | None = None,
        divisor: float | None = None,
        normalize: Literal["batch"] | None = None,
        seed: int | None = None,
        alpha: float | None = None,
        beta: float | None = None,
        label_input: Literal["index", "onehot"] | None = None,
        ignore_index: int | None = None,
        output: int | str | Sequence[int | str] | None = None,
        teacher_init: Literal["random", "copy"] | None = None,
        levels: Sequence[int | Sequence[int]] | None = None,
        encoder: Literal["skip", "block"] | None = None,
        every: int | None = None,
        teacher_dtype: torch.dtype | str | None = None,
        compile_teacher: bool | None = None,
        capture_teacher: bool | None = None,
    ) -> None:
        given = locals()  # the keywords from `weight` on are the fields of Settings
        self._settings = settings_of(preset, **{field.name: given[field.name] for field in fields(Settings)})
        super().__init__(model, self._settings.weight)
        self._origin = Origin(self._model, taps, teacher, teacher_taps)
        self._parts: Parts | None = None
        self._labels_checked = False
        self.recon_loss = ReconLoss(self._settings.alpha, self._settings.beta)
        if example_input is not None:
            self._use(build(self._origin, example_input, self._settings))

    # --- what the user reads

    @property
    def settings(self) -> Settings:
        """All settings, with the current weight."""
        return replace(self._settings, weight=self._weight)

    @property
    def teacher(self) -> Teacher:
        """The teacher, a plain module that maps a label to an image. Train it with `fit_recon`, or with `ReconLoss`."""
        return self._known().teacher

    @property
    def extractor(self) -> FeatureExtractor:
        """The student's taps; `print` it to see the levels of the U."""
        return self._known().student

    @property
    def criterion(self) -> CrossAlignmentLoss:
        """The alignment loss of features, without the weight (eq. 7)."""
        return self._known().criterion

    @property
    def ready(self) -> bool:
        """Whether stage 1 is over: there is a teacher, and it is frozen."""
        return self._parts is not None and self._parts.teacher.frozen

    # --- stage 1

    def fit_recon(
        self,
        loader: Iterable[Any],
        *,
        epochs: int | None = None,
        steps: int | None = None,
        optimizer: stage1.OptimizerLike | None = None,
        scheduler: Callable[[torch.optim.Optimizer], Any] | None = None,
        amp: torch.dtype | None = None,
        batch: Callable[[Any], Any] | None = None,
        standardize_image: bool = False,
        checkpoint: str | os.PathLike[str] | None = None,
        progress: bool = True,
    ) -> list[float]:
        """Stage 1: train the teacher to reconstruct the image from its label map (eqs. 1-3), then freeze it.

        Afterwards random states, and the model's weights, gradients and modes, are as they were. A loader that has its
        own generator or persistent workers continues where stage 1 left it.

        Args:
            loader: yields (image, label), or dicts with "image" and "label", or what `batch` takes. Images are float
                (B, C, *spatial), ideally of about unit range. If the root mean square of a channel of the first batch
                is above 10, there is a warning and a log line.
            epochs: passes over the loader; pass either this or `steps`.
            steps: optimizer steps.
            optimizer: an optimizer of `teacher.parameters()`, or a function that makes one from parameters. Default:
                Adam with learning rate 1e-3.
            scheduler: a function that makes a schedule from the optimizer. Its `step()` is called after every step,
                without arguments.
            amp: autocast dtype; float16 includes loss scaling.
            batch: a function from what the loader yields to (image, label), for batches of another form.
            standardize_image: learn (image - mean) / std instead of the image, for networks that normalize inside. Mean
                and std are per channel, from the valid pixels of the first batch (rank 0's under torch.distributed).
                `reconstruct` undoes this, and states keep it. The returned losses are then of standardized images.
            checkpoint: a file that is written after every epoch, from which a killed run continues. On CPU it continues
                bit for bit if the loader draws from the global random states when it is iterated (shuffle=True without
                a generator, no persistent workers). Under torch.distributed rank 0's states are used. If
                hyperparameters, schedule or amp differ from the file's, those of this call are used, and a log line
                names both. Writing is tested before the first step. Each write goes to a temporary file in the same
                folder first, named file.PROCESS-RANDOM.partial; those that killed runs left are removed after an hour.
            progress: show a progress bar.

        Returns:
            The mean loss of every epoch.

        Raises:
            ReSegError: the loss or a weight is not finite; a batch has a form or values that do not fit; the teacher is
                frozen; inference mode is on; or the output that the teacher is trained on does not depend on all
                tapped modules. `checkpoint` cannot be written or read, is another kind of file, or is of a stage 1 with
                another class of optimizer or other settings. Optimizer, schedule or model hold something that could
                not be read back from it. With `epochs` under torch.distributed, the ranks have passes of different
                lengths.
            TapError: a tapped module of a copy of the model runs without gradients (reentrant checkpointing).
        """
        given = stage1.Arguments(loader, epochs, steps, optimizer, scheduler, amp, batch, standardize_image, progress)
        if self.ready:
            raise ReSegError("the teacher is frozen already; build a new ReSegWrapper to train another one")
        file = Stage1File(checkpoint) if checkpoint is not None else None
        resumed = file.read() if file is not None else None
        if resumed is not None:
            self._go_on(resumed, str(checkpoint), standardize_image)

        def prepare(image: Tensor) -> tuple[Teacher, FeatureExtractor]:
            like = next((p for p in self._model.parameters() if p.is_floating_point()), image)
            if self._parts is None:
                self._use(build(self._origin, image.to(like.device, like.dtype), self._settings))
            self.teacher.to(like.device)  # the model may have moved since
            return self.teacher.train(), self._known().targets.extractor

        def state() -> dict[str, Any]:
            return {"wrapper": self.state_dict(), "taps": self._origin.named}

        with preserved_rng():
            copied = self._origin.teacher is None
            history = stage1.fit(given, prepare, self.recon_loss, copied, file, resumed, state)
        self.freeze_teacher()
        return history

    def freeze_teacher(self) -> None:
        """End stage 1 after your own training loop, or keep an untrained teacher as a control.

        Under torch.distributed every rank gets rank 0's teacher.

        Raises:
            ReSegError: a weight or a buffer of the teacher is not finite.
        """
        broadcast(self.teacher)
        self.teacher.check_finite("at the end of stage 1")
        self.teacher.freeze()

    def reconstruct(self, label: Any) -> Tensor:
        """The image that the teacher makes from a label map, (B, image channels, *spatial), in evaluation mode.

        It is in the images' own units, even if stage 1 standardized them.

        Raises:
            ReSegError: the label does not fit, or the teacher ends in a sigmoid or softmax in evaluation mode alone, so
                stage 1 did not train it to make images there. The alignment does not use its output.
        """
        teacher = self.teacher
        teacher.refuse_activation_in_evaluation(label)
        with preserved_modes(teacher), torch.no_grad(), teacher.unmoved():
            image = teacher.eval()(label)
            return image if teacher.image_map is None else teacher.image_map.undo(image)

    # --- stage 2

    def alignment_loss(self, label: Any) -> Tensor:
        """Stage 2: weight times L_align (eqs. 4-8) of the one training forward since the last call.

        Args:
            label: the label of that forward's images: (B, *spatial) or (B, 1, *spatial) with class indices (integers
                or whole floats), or (B, classes, *spatial) one-hot or multi-label. If it is a list, element 0 is used.

        Returns:
            A scalar to add to the task loss, in at least fp32. At weight 0, and at calls that `every` skips, a zero
            that supports backward.

        Raises:
            ReSegError: no training forward or several since the last call, the model is in evaluation, gradients are
                off, the teacher is not frozen yet, or the label does not fit.
            TapError: a tap did not fire.
        """
        _, total = self._step(label)
        return nothing(plain_label(label).device) if total is None else self._weight * self._settings.every * total

    def alignment_terms(self, label: Any) -> dict[str, Tensor]:
        """Like `alignment_loss`, but returns the unweighted terms of eqs. 4-6 by name; `criterion.combine` sums them.

        For a loss that you combine yourself, and for logs (`functional.gradient_norms`). The dict is empty at weight 0
        and at calls that `every` skips; at the other calls multiply by `every` yourself.
        """
        return self._step(label)[0]

    def record(self) -> AbstractContextManager[None]:
        """Mark the forward that the next `alignment_loss` is for, in loops with several forwards a step."""
        if self._weight != 0:
            self._known()  # raises, and says what to do
        return super().record()

    def stats(self) -> dict[str, float]:
        """The last call's values, for a log: terms, "alignment" (their sum by eq. 7, unweighted), and "weight".

        A call that `every` skips keeps the values of the call before it. A call at weight 0 leaves only "weight".
        Reading the values waits for the device.
        """
        return super().stats()

    def remove(self) -> None:
        """Remove all hooks. The model is as it was; the wrapper cannot align any more."""
        super().remove()
        if self._parts is not None:
            self._parts.remove()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned, settings included.

        It needs neither an example nor `fit_recon`. A teacher that was saved before the end of stage 1 is not frozen.

        Raises:
            ReSegError: the state is of another kind, format or model, or incomplete, or was made with a `teacher=` that
                this wrapper was not given. Nothing has changed then.
            TapError: the model does not have the taps of the state. Nothing has changed then, either.
        """
        super().load_state_dict(state)
        if state["ready"]:
            self.teacher.freeze()

    # --- inside

    def _step(self, label: Any) -> tuple[dict[str, Tensor], Tensor | None]:
        """The terms and their sum by eq. 7; neither at weight 0 and at calls that `every` skips."""
        try:
            label = plain_label(label)
            self._refuse_misuse()
            if self._weight == 0:
                self._last = {}
                return {}, None
            parts = self._known()
            if not parts.teacher.frozen:
                raise ReSegError(
                    "the teacher is not ready: call fit_recon(loader, ...), or load_state_dict(state) with the state "
                    "of an earlier run, or freeze_teacher() after training reseg.teacher yourself"
                )
            found = self._compared(parts, label) if self._aligns else ({}, None)
        except BaseException:
            if self._parts is not None:
                self._parts.student.forget()
            raise
        self._calls += 1
        self._arm()
        return found

    def _compared(self, parts: Parts, label: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """The terms of the recorded forward, and their sum."""
        recorded = parts.student.take()
        device, encoding = recorded.features.bottleneck.device, parts.teacher.encoding
        label = label.to(device, non_blocking=True)
        encoding.check_shape(label, recorded.image.shape)
        first = not self._labels_checked
        if readable(device, first):
            encoding.check_values(label)
        targets, valid = parts.targets(label, recorded.autocast, self._settings)
        terms = parts.criterion.terms(recorded.features, targets, valid)
        total = parts.criterion.combine(terms)
        made_of = {OF_IMAGES: [recorded.image], OF_MODEL: recorded.features.all(), OF_TEACHER: targets.all()}
        refuse_not_finite(total, made_of, OF_SIZE, first=first)
        self._last = {name: term.detach() for name, term in {**terms, "alignment": total}.items()}
        self._labels_checked = True
        return terms, total

    @property
    def _aligns(self) -> bool:
        """Whether the next call aligns, so that the forward before it must be recorded."""
        return self._weight != 0 and self._calls % self._settings.every == 0

    def _arm(self) -> None:
        if self._parts is not None:
            self._parts.student.enabled = self._aligns

    def _extractor_if_any(self) -> FeatureExtractor | None:
        return None if self._parts is None else self._parts.student

    def _beside(self) -> list[nn.Module]:
        return [self.teacher]

    def _use(self, parts: Parts) -> None:
        """Replace the old parts by new ones; the hooks come last, when nothing can fail any more."""
        if self._parts is not parts:
            if self._parts is not None:
                self._parts.remove()
            self._parts = parts
            if not self._removed:
                parts.student.attach()
        self._arm()

    def _go_on(self, resumed: Mapping[str, Any], file: str, standardize_image: bool) -> None:
        """Take the teacher of an unfinished stage 1, under the settings of this wrapper."""
        state = resumed["wrapper"]
        self._check_state(state)
        plan = None if self._parts is None else self._parts.student.plan
        refuse_another_stage_1(resumed, file, self._settings, standardize_image, self._origin.named, plan)
        self._use(restore(self._origin, state["parts"], self._settings, self._parts, keep=True))

    def _state(self) -> dict[str, Any]:
        parts = None if self._parts is None else self._parts.state(own_teacher=self._origin.teacher is not None)
        settings = {name: value for name, value in self._settings.to_dict().items() if name != "weight"}
        return {"settings": settings, "ready": self.ready, "parts": parts}

    def _load(self, state: Mapping[str, Any]) -> None:
        settings, parts = Settings(weight=state["weight"], **state["settings"]), state["parts"]
        if state["ready"] and parts is None:
            raise ReSegError("this state is inconsistent: it says that stage 1 is over, but has no teacher")
        if self.ready and parts is not None and not state["ready"]:
            raise ReSegError(
                "this state was saved before the end of stage 1, but stage 1 is over here; build a new ReSegWrapper"
            )
        # as dicts: a checkpoint has lists where the user may have written tuples
        saved, mine = settings.to_dict(), self.settings.to_dict()
        same = all(saved[name] == mine[name] for name in saved if name not in AT_RUN_TIME)
        restored = None if parts is None else restore(self._origin, parts, settings, self._parts, keep=same)
        self._settings, self.recon_loss = settings, ReconLoss(settings.alpha, settings.beta)
        self._labels_checked = False  # its settings may say otherwise what a label is
        if restored is not None:
            self._use(restored)
        elif not same and self._parts is not None:
            self._parts.remove()
            self._parts = None

    def _told(self) -> dict[str, Any]:
        return {"ready": self.ready, "normalize": self._settings.normalize, "every": self._settings.every}

    def _known(self) -> Parts:
        if self._parts is None:
            raise ReSegError(
                "taps and teacher are not known yet: pass example_input= (an image batch) to ReSegWrapper, or call "
                "fit_recon(loader, ...) or load_state_dict(state) before the first training forward"
            )
        return self._parts
