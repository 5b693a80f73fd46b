"""The two-stage protocol around a user's model and loop: fit a teacher, then align with it."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from . import recon
from .checkpoint import plan_from_dict, plan_to_dict
from .companion import UnmovedWarning, distributed, undistributed
from .errors import ReSegError, TapError
from .features import FeatureExtractor, Features, Recorded, unwrap
from .labels import LabelEncoding, plain_label
from .losses import CrossAlignmentLoss, ReconLoss, term_names
from .settings import Settings, settings_of
from .taps import TapPlan
from .taps.dryrun import call, dry_run, image_of, preserved_rng, tensors
from .teacher import Teacher, copy_for_teacher, evaluating, refuse_sharded, select_output

FORMAT = 1  # of the state_dict


class ReSegWrapper:
    """ReSeg-UNet for a model that is trained by someone else's loop. It is no nn.Module, on purpose.

    The model is not edited: its outputs, parameters and state_dict keys stay as they are, and the teacher is no part
    of it. Fit the teacher on the training fold only: it sees labels.

    Args:
        model: any U-shaped nn.Module in 2D or 3D, or its DistributedDataParallel or torch.compile wrapper.
        taps: the taps, or some of them; see `FeatureExtractor`. None finds them.
        example_input: an image batch as the model takes it, to find taps and build the teacher now. Without it that
            happens at the first batch of `fit_recon`, or in `load_state_dict`.
        preset: "paper" (eqs. 1-8 as published) or "standardized".
        teacher: a module of your own, encoded label in, image out, instead of a copy of the model.
        teacher_taps: taps of that module, as `taps`; None finds them.
        **overrides: any field of `Settings`, over the preset's.

    Raises:
        TapError: the model has no levels that can be paired, or a tap is unknown.
        ReSegError: an unknown setting, or a model that cannot be served; the message says what to do.
    """

    def __init__(
        self,
        model: nn.Module,
        taps: Mapping[str, Any] | None = None,
        example_input: Any = None,
        preset: str = "paper",
        *,
        teacher: nn.Module | None = None,
        teacher_taps: Mapping[str, Any] | None = None,
        **overrides: Any,
    ) -> None:
        self._model = unwrap(model)
        self.settings = settings_of(preset, overrides)
        self._taps, self._own_teacher, self._teacher_taps = taps, teacher, teacher_taps
        self.recon_loss = ReconLoss(self.settings.alpha, self.settings.beta)
        self._weight = _checked_weight(self.settings.weight)
        self._student: FeatureExtractor | None = None
        self._teacher: Teacher | None = None
        self._teacher_features: FeatureExtractor | None = None
        self._loss: CrossAlignmentLoss | None = None
        self._image_channels = 0
        self._removed = False
        self._calls = 0
        self._labels_checked = False
        self._last: dict[str, Tensor] = {}
        self._unmoved = UnmovedWarning(
            "the projection", "add reseg.parameters() to your optimizer, or use projection=None"
        )
        if example_input is not None:
            self._bind(example_input)

    # --- what the user reads

    @property
    def teacher(self) -> Teacher:
        """The teacher, a plain module: label in, image out. Train it with `fit_recon`, or yourself with `ReconLoss`."""
        self._need_bound()
        assert self._teacher is not None
        return self._teacher

    @property
    def extractor(self) -> FeatureExtractor:
        """The student's taps; `print` it to see the U."""
        self._need_bound()
        assert self._student is not None
        return self._student

    @property
    def loss(self) -> CrossAlignmentLoss:
        """The alignment loss, without the weight."""
        self._need_bound()
        assert self._loss is not None
        return self._loss

    @property
    def weight(self) -> float:
        """Factor of the alignment loss; it may change between steps. At 0 nothing is recorded."""
        return self._weight

    @weight.setter
    def weight(self, value: float) -> None:
        self._weight = _checked_weight(value)
        if self._student is not None:
            self._student.enabled = self._weight != 0

    @property
    def calls(self) -> int:
        """How often `alignment_loss` has returned a value at a weight other than 0."""
        return self._calls

    def parameters(self) -> Iterator[nn.Parameter]:
        """What your optimizer must train beside the model: the projection's, none without one.

        Raises:
            ReSegError: there will be a projection, but its channels are not known before an example_input.
        """
        if self.settings.projection is None:
            return iter(())
        if self._loss is None:
            raise ReSegError("the projection's channels are not known yet; pass example_input= to ReSegWrapper")
        return iter(self._projection().parameters())

    def to(self, *args: Any, **kwargs: Any) -> ReSegWrapper:
        """Move the teacher and the projection, as `nn.Module.to`. Returns self."""
        self.teacher.to(*args, **kwargs)
        self.loss.to(*args, **kwargs)
        return self

    # --- stage 1

    def fit_recon(
        self,
        loader: Iterable[Any],
        *,
        epochs: int | None = None,
        steps: int | None = None,
        optimizer: recon.OptimizerLike | None = None,
        scheduler: Callable[[torch.optim.Optimizer], Any] | None = None,
        amp: torch.dtype | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        progress: bool = True,
    ) -> list[float]:
        """Stage 1: train the teacher to reconstruct the image from its label map (eqs. 1-3), then freeze it.

        Random states, and the model's weights, gradients and modes, are afterwards as before; a loader with a
        generator or persistent workers of its own goes on where stage 1 left it.

        Args:
            loader: yields (image, label) or dicts with "image" and "label"; images float (B, C, *spatial).
            epochs: passes over the loader; give these or `steps`.
            steps: optimizer steps.
            optimizer: an optimizer of `teacher.parameters()`, or a function that makes one of parameters. Default
                Adam with learning rate 1e-3.
            scheduler: a function that makes a schedule of the optimizer; it advances every step.
            amp: autocast dtype; float16 comes with loss scaling.
            checkpoint: a file written after every epoch, from which a killed run continues. On CPU it continues to
                the same bits if the loader draws from the global random states when it is iterated: shuffle=True
                without a generator, workers that are not persistent. Under torch.distributed rank 0's states count.
            progress: show a bar.

        Returns:
            The mean loss of every epoch.

        Raises:
            ReSegError: the loss is not finite, a batch has a form or values that do not fit, or the teacher is frozen.
        """
        if (epochs is None) == (steps is None):
            raise ReSegError("say how long to train: epochs= or steps=, one of them")
        if (epochs if epochs is not None else steps or 0) < 1:
            raise ReSegError(f"epochs={epochs}, steps={steps}; it must be at least 1")
        if self._teacher is not None and self._teacher.frozen:
            raise ReSegError("the teacher is frozen already; build a new wrapper to train another")
        resumed = None
        if checkpoint is not None and os.path.exists(checkpoint):
            resumed = torch.load(checkpoint, map_location="cpu", weights_only=True)
            self.load_state_dict(resumed["wrapper"])

        def prepare(image: Tensor, label: Tensor) -> Teacher:
            if self._teacher is None:
                device = next((p.device for p in self._model.parameters()), image.device)
                self._bind(image.to(device))
            self._check_channels(image)
            return self.teacher.train()

        def save(state: dict[str, Any]) -> None:
            if checkpoint is not None and recon.rank() == 0:
                recon.write_atomically({"wrapper": self.state_dict(), **state}, checkpoint)

        with preserved_rng():
            history = recon.fit(
                loader,
                prepare,
                self.recon_loss,
                epochs=epochs,
                steps=steps,
                optimizer=optimizer,
                scheduler=scheduler,
                amp=amp,
                resumed=resumed,
                save=save,
                progress=progress,
            )
        self.freeze_teacher()
        return history

    def freeze_teacher(self) -> None:
        """End stage 1 after a loop of your own, or keep an untrained teacher as a control.

        Under torch.distributed every rank gets rank 0's teacher.
        """
        recon.broadcast(self.teacher)
        self.teacher.freeze()

    def reconstruct(self, label: Any) -> Tensor:
        """The image that the teacher makes of a label map, (B, image channels, *spatial), in evaluation."""
        with evaluating(self.teacher):
            return self.teacher(label)

    # --- stage 2

    @overload
    def alignment_loss(
        self, label: Any, *, components: Literal[False] = False, task_loss: Tensor | None = None
    ) -> Tensor: ...

    @overload
    def alignment_loss(
        self, label: Any, *, components: Literal[True], task_loss: Tensor | None = None
    ) -> dict[str, Tensor]: ...

    def alignment_loss(
        self, label: Any, *, components: bool = False, task_loss: Tensor | None = None
    ) -> Tensor | dict[str, Tensor]:
        """Stage 2: weight times L_align (eqs. 4-8) of the one training forward since the last call.

        Args:
            label: the label of that forward's images: (B, *spatial) or (B, 1, *spatial) with class indices (integers
                or whole floats), or (B, classes, *spatial) one-hot or multi-label. Of a list, element 0.
            components: return {term: scalar}, unweighted, instead; `loss.combine(terms)` sums them.
            task_loss: given, the gradient norms of every term and of this loss at the model's parameters are
                measured for `stats()`: a backward pass each, so not for every step.

        Returns:
            A scalar to add to the task loss, in at least fp32. At weight 0 a zero on which backward works.

        Raises:
            ReSegError: no or several training forwards since the last call, the model is in evaluation, the teacher
                is not frozen yet, or the label does not fit.
            TapError: a tap did not fire.
        """
        try:
            return self._aligned(label, components, task_loss)
        except BaseException:
            if self._student is not None:
                self._student.forget()
            raise

    def record(self) -> AbstractContextManager[None]:
        """Mark the forward that the next `alignment_loss` is for, in loops with several forwards a step."""
        return nullcontext() if self._student is None and self._weight == 0 else self.extractor.record()

    def stats(self) -> dict[str, float]:
        """The last call's values for a log: terms, "alignment" (unweighted), "weight"; with `task_loss` also norms.

        "gradient/task" is the norm of the task loss's gradient at the model's parameters, "gradient/TERM" that of
        weight times the term's share of the loss over it. Reading them waits for the device.
        """
        return {**{name: float(value) for name, value in self._last.items()}, "weight": self._weight}

    def remove(self) -> None:
        """Take all hooks off. The model is as it was; the wrapper cannot align any more."""
        for extractor in (self._student, self._teacher_features):
            if extractor is not None:
                extractor.remove()
        self._removed = True

    # --- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Teacher, projection, counters, settings and taps: tensors and plain Python values only."""
        state: dict[str, Any] = {
            "format": FORMAT,
            "settings": {**self.settings.to_dict(), "weight": self._weight},
            "calls": self._calls,
            "bound": self._teacher is not None,
        }
        if self._teacher is not None and self._student is not None and self._teacher_features is not None:
            projection = self._projection().state_dict() if self.settings.projection else {}
            state |= {
                "taps": plan_to_dict(self._student.plan),
                "teacher_taps": plan_to_dict(self._teacher_features.plan),
                "own_teacher": self._own_teacher is not None,
                "image_channels": self._image_channels,
                "out_channels": self._teacher.out_channels,
                "num_classes": self._teacher.encoding.num_classes,
                "dims": self._teacher.encoding.dims,
                "teacher": dict(self._teacher.state_dict()),
                "frozen": self._teacher.frozen,
                "projection": dict(projection),
            }
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave, settings included; needs neither an example nor `fit_recon`.

        Raises:
            ReSegError: the state is of another format, or of a wrapper with a teacher of its own that is not here.
            TapError: the model has not the taps of the state.
        """
        if state.get("format") != FORMAT:
            raise ReSegError(f"this state has format {state.get('format')!r}, not {FORMAT}; it is of another version")
        settings = Settings(**state["settings"])
        same = {**settings.to_dict(), "weight": 0} == {**self.settings.to_dict(), "weight": 0}
        self.settings = settings
        self.recon_loss = ReconLoss(settings.alpha, settings.beta)
        if state["bound"]:
            if state["own_teacher"] and self._own_teacher is None:
                raise ReSegError("this state is of a wrapper with a teacher of its own; pass the same module, teacher=")
            plan, teacher_plan = plan_from_dict(state["taps"]), plan_from_dict(state["teacher_taps"])
            if not same or self._student is None or plan_to_dict(self._student.plan) != state["taps"]:
                # rebuilt only where it differs: optimizers hold the projection, compiled models their hooks
                if self._student is not None:
                    self._student.remove()
                self._image_channels = state["image_channels"]
                encoding = LabelEncoding(
                    settings.label_input, state["num_classes"], state["dims"], settings.ignore_index
                )
                teacher = self._make_teacher(encoding, state["out_channels"])
                self._assemble(plan, teacher, teacher_plan)
            self.teacher.load_state_dict(state["teacher"])
            self.teacher.freeze() if state["frozen"] else self.teacher.train()
            if settings.projection:
                self._projection().load_state_dict(state["projection"])
        self.weight = settings.weight
        self._calls = state["calls"]

    # --- inside

    def _bind(self, example_input: Any) -> None:
        """Find taps and build the teacher from an example, in dry forwards that leave no trace."""
        if self._own_teacher is None:
            refuse_sharded(self._model)
        image, s = image_of(example_input), self.settings
        shape, spatial = image.shape, tuple(image.shape[2:])
        if self._own_teacher is None and sum(1 for _ in tensors(example_input)) > 1:
            raise ReSegError(
                "the model takes more tensors than the image, which its copy would need beside the label; pass a "
                "teacher= that takes the label alone"
            )
        plan = FeatureExtractor(self._model, self._taps, example_input, levels=s.levels, encoder=s.encoder).plan
        with dry_run(self._model):
            output = call(self._model, example_input)
        classes = select_output(output, shape[0], spatial, s.output_path).shape[1]
        self._image_channels = shape[1]
        encoding = LabelEncoding(s.label_input, classes, len(spatial), s.ignore_index)
        if self._own_teacher is None:
            self._assemble(plan, self._make_teacher(encoding, classes), plan)
            return
        label = torch.zeros(shape[0], encoding.channels, *spatial, device=image.device, dtype=image.dtype)
        with dry_run(self._own_teacher):
            output = self._own_teacher(label)
        out_channels = select_output(output, shape[0], spatial).shape[1]
        theirs = FeatureExtractor(self._own_teacher, self._teacher_taps, label, encoder=s.encoder).plan
        if not self._teacher_taps:
            theirs = theirs.select([level.stride for level in plan.selected])
        self._assemble(plan, self._make_teacher(encoding, out_channels), theirs)

    def _make_teacher(self, encoding: LabelEncoding, out_channels: int) -> Teacher:
        """A teacher around a copy of the model, or around the user's module."""
        own, channels = self._own_teacher, self._image_channels
        with preserved_rng():
            return Teacher(
                copy_for_teacher(self._model, self.settings.teacher_init) if own is None else own,
                encoding,
                in_channels=channels if own is None else encoding.channels,
                out_channels=out_channels,
                image_channels=channels,
                output=self.settings.output_path if own is None else None,
            )

    def _assemble(self, plan: TapPlan, teacher: Teacher, teacher_plan: TapPlan) -> None:
        """Loss and hooks, once taps and teacher are known."""
        s = self.settings
        self._loss = CrossAlignmentLoss(
            s.encoder_to_decoder,
            s.decoder_to_encoder,
            s.bottleneck,
            divisor=s.divisor,
            normalize=s.normalize,
            projection=s.projection,
            channels=_term_channels(plan, teacher_plan),
            seed=s.seed,
        ).to(teacher.reference.device)
        self._teacher = teacher
        self._teacher_features = FeatureExtractor(teacher.body, teacher_plan, when="always").attach()
        self._teacher_features.enabled = False  # on during alignment_loss only
        self._student = FeatureExtractor(self._model, plan).attach()
        self._student.enabled = self._weight != 0

    def _aligned(self, label: Any, components: bool, task_loss: Tensor | None) -> Tensor | dict[str, Tensor]:
        if self._removed:
            raise ReSegError("the hooks were removed; build a new ReSegWrapper to align again")
        if not self._model.training:
            raise ReSegError("the model is in evaluation; alignment_loss is for training steps, call model.train()")
        label = plain_label(label)
        if self._weight == 0:
            return {} if components else torch.zeros((), device=label.device, requires_grad=True)
        teacher, student, loss = self.teacher, self.extractor, self.loss
        if not teacher.frozen:
            raise ReSegError(
                "the teacher is not ready: call fit_recon(loader, ...), or load_state_dict(state) of an earlier run, "
                "or freeze_teacher() after training reseg.teacher yourself"
            )
        recorded = student.take()
        device = recorded.features.bottleneck.device
        label = label.to(device, non_blocking=True)
        teacher.encoding.check_shape(label, recorded.image.shape)
        if not self._labels_checked:
            teacher.encoding.check_values(label)
            self._labels_checked = True
        targets, valid = self._teach(label, recorded, device)
        if loss.projection is not None:
            loss.projection = distributed(loss.projection, device)
            self._unmoved.check(loss.projection.parameters())
        terms = loss(recorded.features, targets, valid, components=True)
        total = loss.combine(terms)
        self._last = {name: term.detach() for name, term in {**terms, "alignment": total}.items()}
        if task_loss is not None:
            self._last |= self._gradient_norms(terms, task_loss)
        self._calls += 1
        return terms if components else self._weight * total

    def _teach(self, label: Tensor, recorded: Recorded, device: torch.device) -> tuple[Features, Tensor | None]:
        """The teacher's features of the label, in the student's autocast dtype, and the valid mask."""
        teacher, features = self.teacher, self._teacher_features
        assert features is not None
        if teacher.reference.device != device:
            teacher.to(device)
        encoded, valid = teacher.encoding.encode(label)
        enabled, dtype = recorded.autocast
        features.enabled = True
        try:
            with torch.no_grad(), torch.autocast(device.type, dtype=dtype, enabled=enabled):
                teacher.decode(encoded)
            return features.pop(), valid
        finally:
            features.enabled = False

    def _gradient_norms(self, terms: Mapping[str, Tensor], task_loss: Tensor) -> dict[str, Tensor]:
        parameters = [p for p in self._model.parameters() if p.requires_grad]

        def norm(value: Tensor) -> Tensor:
            gradients = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
            return torch.stack([g.float().norm() for g in gradients if g is not None]).norm()

        task = norm(task_loss)
        shares = {name: norm(self._weight * self.loss.combine({name: term})) for name, term in terms.items()}
        return {"gradient/task": task, **{f"gradient/{name}": share / task for name, share in shares.items()}}

    def _projection(self) -> nn.Module:
        assert self.loss.projection is not None
        return undistributed(self.loss.projection)

    def _need_bound(self) -> None:
        if self._teacher is None:
            raise ReSegError(
                "taps and teacher are not known yet: pass example_input= (an image batch) to ReSegWrapper, or call "
                "fit_recon(loader, ...) or load_state_dict(state) first, before the first training forward"
            )

    def _check_channels(self, image: Tensor) -> None:
        if image.shape[1] != self._image_channels:
            raise ReSegError(
                f"the image has shape {tuple(image.shape)}; the model was shown {self._image_channels} image channels"
            )


def _term_channels(student: TapPlan, teacher: TapPlan) -> dict[str, tuple[int, int]]:
    """{term: (student's, teacher's)} channels, crossed as the terms are.

    Raises:
        TapError: the two have other levels.
    """
    mine, theirs = student.selected, teacher.selected
    if [level.spatial for level in mine] != [level.spatial for level in theirs] or (
        student.bottleneck.spatial != teacher.bottleneck.spatial
    ):
        raise TapError(
            "student and teacher have taps of different sizes, and features are never resized.\n"
            + student.draw("student")
            + "\n"
            + teacher.draw("teacher")
        )
    pairs = [
        *((a.decoder.channels, b.encoder.channels) for a, b in zip(mine, theirs)),
        *((a.encoder.channels, b.decoder.channels) for a, b in zip(mine, theirs)),
        (student.bottleneck.channels, teacher.bottleneck.channels),
    ]
    return dict(zip(term_names(len(mine)), pairs))


def _checked_weight(value: float) -> float:
    if not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
        raise ReSegError(f"weight={value!r}; it is a finite number >= 0")
    return float(value)
