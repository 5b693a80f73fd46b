"""The two-stage protocol around a user's model and loop: fit a teacher, then align with it."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from ..common.distributed import broadcast
from ..common.dryrun import image_of, preserved_rng
from ..common.inputs import OF_IMAGES, OF_MODEL, check_weight, readable, refuse_evaluation, refuse_not_finite
from ..common.labels import LabelEncoding, plain_label
from ..common.outputs import activation_of, dry_output, select_output
from ..common.state import check_state, load_states, plain_state
from ..errors import ReSegError, TapError
from ..recording.copying import unwrap
from ..recording.extractor import FeatureExtractor, Features
from ..taps import TapPlan, find_taps
from ..taps.named import module_of, parse_taps
from ..taps.plain import PLAN, plan_from_dict, plan_to_dict, refuse_other_channels, same_taps
from . import stage1
from .image_range import ImageMap
from .losses import CrossAlignmentLoss, ReconLoss
from .settings import AT_RUN_TIME, STAGE_1, Settings, settings_of
from .stage1_file import Stage1File
from .targets import Targets
from .teacher import Teacher, copy_for_teacher, evaluating, input_channels, refuse_sharded

logger = logging.getLogger("reseg_loss")

FORMAT = 1  # of the state_dict
ENTRIES = {
    "settings": {
        **{field.name: object for field in fields(Settings)},  # which checks its choices itself
        **{"weight": float, "divisor": float, "seed": int, "ignore_index": (int, None)},
        **{"output": ([(int, str)], int, str, None), "levels": ([(int, [int])], None)},
    },
    "calls": int,
    "ready": bool,
    "parts": (
        {
            "taps": PLAN,
            "teacher_taps": PLAN,
            "own_teacher": bool,
            "image_channels": int,
            "in_channels": int,
            "out_channels": int,
            "num_classes": int,
            "dims": int,
            "image_map": ({"mean": [float], "std": [float]}, None),
            "teacher": dict,
        },
        None,
    ),
}


OF_TEACHER = (
    "the teacher's features hold NaN or infinite values: its weights do, or it overflows in low precision. Fit a new "
    "one, or run it in another precision (teacher_dtype=)"
)
OF_SIZE = "the alignment loss is NaN or infinite, and the features are finite: their values are too large to be squared"


@dataclass
class _Parts:
    """What there is once the taps are known."""

    student: FeatureExtractor
    teacher: Teacher
    targets: Targets
    loss: CrossAlignmentLoss

    def remove(self) -> None:
        """Take the hooks off student and teacher."""
        self.student.remove()
        self.targets.remove()


class ReSegWrapper:
    """ReSeg-UNet for a model that is trained by someone else's loop. It is no nn.Module, on purpose.

    The model is not edited: its outputs, parameters and state_dict keys stay as they are, and the teacher is no part
    of it. Fit the teacher on the training fold only: it sees labels.

    Args:
        model: any U-shaped nn.Module in 2D or 3D, or its DistributedDataParallel or torch.compile wrapper.
        taps: the taps by kind, or some of them, as the mapping that `FeatureExtractor` takes. None finds them.
        example_input: an image batch as the model takes it, to find taps and build the teacher now. Without it that
            happens at the first batch of `fit_recon`, or in `load_state_dict`.
        preset: "standardized" (the features of both sides, per channel, before they are compared) or "paper" (eqs. 1-8
            as published).
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
        preset: str = "standardized",
        *,
        teacher: nn.Module | None = None,
        teacher_taps: Mapping[str, Any] | None = None,
        **overrides: Any,
    ) -> None:
        self._model = unwrap(model)
        self.settings = settings_of(preset, overrides)
        for module, named in ((self._model, taps), (teacher or self._model, teacher_taps)):
            for entries in parse_taps(named).values():
                for tap in entries:
                    module_of(module, tap)
        if teacher is not None and (teacher is self._model or _share_parameters(teacher, self._model)):
            raise ReSegError(
                "teacher= is the model or shares parameters with it, which stage 1 would train and then freeze; leave "
                "teacher= out for a copy"
            )
        self._taps, self._own_teacher, self._teacher_taps = taps, teacher, teacher_taps
        self._parts: _Parts | None = None
        self._removed = False
        self._calls = 0
        self._labels_checked = False
        self._last: dict[str, Tensor] = {}
        self.weight = self.settings.weight
        self.recon_loss = ReconLoss(self.settings.alpha, self.settings.beta)
        _alignment(self.settings)  # refuses bad weights now, not later
        if example_input is not None:
            self._parts = self._build(example_input)

    # --- what the user reads

    @property
    def teacher(self) -> Teacher:
        """The teacher, a plain module: label in, image out. Train it with `fit_recon`, or yourself with `ReconLoss`."""
        return self._known().teacher

    @property
    def extractor(self) -> FeatureExtractor:
        """The student's taps; `print` it to see the U."""
        return self._known().student

    @property
    def loss(self) -> CrossAlignmentLoss:
        """The alignment loss, without the weight."""
        return self._known().loss

    @property
    def weight(self) -> float:
        """Factor of the alignment loss; it may change between steps. At 0 nothing is recorded."""
        return self._weight

    @weight.setter
    def weight(self, value: float) -> None:
        self._weight = check_weight("weight", value)
        self._arm()

    @property
    def ready(self) -> bool:
        """Whether stage 1 is over: the teacher is there and frozen."""
        return self._parts is not None and self._parts.teacher.frozen

    @property
    def calls(self) -> int:
        """How often `alignment_loss` has returned at a weight other than 0, calls that `every` skips included."""
        return self._calls

    def parameters(self) -> Iterator[nn.Parameter]:
        """What your optimizer must train beside the model: nothing."""
        return iter(())

    def to(self, *args: Any, **kwargs: Any) -> ReSegWrapper:
        """Move the teacher, as `nn.Module.to`. Returns self."""
        self.teacher.to(*args, **kwargs)
        return self

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

        Random states, and the model's weights, gradients and modes, are afterwards as before; a loader with a
        generator or persistent workers of its own goes on where stage 1 left it.

        Args:
            loader: yields (image, label) or dicts with "image" and "label", or what `batch` takes; images float
                (B, C, *spatial), at best of about unit range: where the root mean square of a channel of the first
                batch is above 10, a warning and a log line say so.
            epochs: passes over the loader; give these or `steps`.
            steps: optimizer steps.
            optimizer: an optimizer of `teacher.parameters()`, or a function that makes one of parameters. Default
                Adam with learning rate 1e-3.
            scheduler: a function that makes a schedule of the optimizer; its `step()` is called after every step,
                without arguments.
            amp: autocast dtype; float16 comes with loss scaling.
            batch: a function from what the loader yields to (image, label), for batches of another form.
            standardize_image: learn (image - mean) / std instead of the image: one map per channel, of the valid pixels
                of the first batch (under torch.distributed rank 0's), which `reconstruct` undoes and states keep. For
                networks that normalize inside. The losses that are returned are of the standardized images then.
            checkpoint: a file written after every epoch, from which a killed run continues. On CPU it continues to
                the same bits if the loader draws from the global random states when it is iterated: shuffle=True
                without a generator, workers that are not persistent. Under torch.distributed rank 0's states count.
                Where hyperparameters, schedule or amp differ from the file's, those of this call win and a log line
                names both. The file is tried before the first step and first written to another one in its folder,
                named file.PROCESS-RANDOM.partial; such leftovers of killed runs are removed after an hour.
            progress: show a bar.

        Returns:
            The mean loss of every epoch.

        Raises:
            ReSegError: the loss or a weight is not finite, a batch has a form or values that do not fit, the teacher is
                frozen, this is inference mode, or the output that the teacher is trained by does not depend on all
                tapped modules. `checkpoint` cannot be written or read, is another file, or is of a stage 1 with
                another class of optimizer or other settings; or optimizer, schedule or model hold what could not be
                read back from it. Passes are of different lengths under torch.distributed, with `epochs`.
            TapError: a tapped module of a copy of the model runs without gradients (reentrant checkpointing).
        """
        if (epochs is None) == (steps is None):
            raise ReSegError("say how long to train: epochs= or steps=, one of them")
        if (epochs if epochs is not None else steps or 0) < 1:
            raise ReSegError(f"epochs={epochs}, steps={steps}; it must be at least 1")
        if not (amp is None or isinstance(amp, torch.dtype)) or not (scheduler is None or callable(scheduler)):
            raise ReSegError("amp is a dtype such as torch.bfloat16, scheduler a function that takes the optimizer")
        if not (batch is None or callable(batch)):
            raise ReSegError(f"batch= is a function from a batch to (image, label), got {type(batch).__name__}")
        if self.ready:
            raise ReSegError("the teacher is frozen already; build a new wrapper to train another")
        if torch.is_inference_mode_enabled():
            raise ReSegError("stage 1 trains, which inference mode forbids: call fit_recon outside it")
        file = Stage1File(checkpoint) if checkpoint is not None else None
        resumed = file.read() if file is not None else None
        done = 0
        if resumed is not None:
            self._continue(resumed["wrapper"], resumed["taps"], str(checkpoint), standardize_image)
            done = len(resumed["history"]) if epochs is not None else resumed["step"]
        if done >= (epochs or steps or 0):
            logger.warning(
                "%s holds a finished stage 1 (%d %s): its teacher is used and this loader is not. If it is of "
                "other patients, name another file",
                checkpoint,
                done,
                "steps" if epochs is None else "epochs",
            )
        elif file is not None:
            file.check()

        def prepare(image: Tensor) -> Teacher:
            like = next((p for p in self._model.parameters() if p.is_floating_point()), image)
            if self._parts is None:
                self._parts = self._build(image.to(like.device, like.dtype))
            self.teacher.to(like.device)  # the model may have moved since
            return self.teacher.train()

        def with_wrapper(use: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, Any]], None]:
            return lambda state: use({"wrapper": self.state_dict(), "taps": self._named, **state})

        with preserved_rng():
            history = stage1.fit(
                loader,
                prepare,
                self._gradients_wanted,
                self._check_reached,
                self.recon_loss,
                epochs=epochs,
                steps=steps,
                optimizer=optimizer,
                scheduler=scheduler,
                amp=amp,
                unpack=batch,
                standardize_image=standardize_image,
                resumed=resumed,
                rehearse=with_wrapper(file.rehearse) if file is not None else None,
                save=with_wrapper(file.write) if file is not None else None,
                progress=progress,
            )
        self.freeze_teacher()
        return history

    @contextmanager
    def _gradients_wanted(self) -> Iterator[None]:
        """Around a forward of a teacher that copies the model: raise a TapError if the copy's taps have no gradients.

        Then the model's would have none in stage 2 either. A teacher of the user's needs none there.
        """
        extractor = self._known().targets.extractor
        if self._own_teacher is not None:
            yield
            return
        extractor.enabled = True
        try:
            yield
            extractor.take()
        finally:
            extractor.enabled = False

    def _check_reached(self) -> None:
        """Raise a ReSegError if the gradients of the reconstruction are None in a whole tapped module.

        Where a model returns several images, the one that is read may not depend on every tap: those would stay random.
        """
        parts = self._known()
        unreached = []
        for tap in parts.targets.extractor.taps:
            trainable = [p for p in module_of(parts.teacher.body, tap).parameters() if p.requires_grad]
            if not tap.is_input and trainable and all(p.grad is None for p in trainable):
                unreached.append(str(tap))
        if unreached:
            raise ReSegError(
                f"stage 1 would leave {', '.join(unreached)} of the teacher as it is: the output that is trained to be "
                "the image does not depend on it. If the model returns several tensors of the image's size, pass "
                "output= the path to the one at the end of its decoder (output=-1, output='main', ...); otherwise name "
                "other taps"
            )

    def freeze_teacher(self) -> None:
        """End stage 1 after a loop of your own, or keep an untrained teacher as a control.

        Under torch.distributed every rank gets rank 0's teacher.

        Raises:
            ReSegError: a weight or a buffer of the teacher is not finite.
        """
        broadcast(self.teacher)
        self.teacher.check_finite("at the end of stage 1")
        self.teacher.freeze()

    def reconstruct(self, label: Any) -> Tensor:
        """The image that the teacher makes of a label map, (B, image channels, *spatial), in evaluation.

        It is in the images' own units, also where stage 1 standardized them.
        """
        with evaluating(self.teacher):
            image = self.teacher(label)
            return image if self.teacher.image_map is None else self.teacher.image_map.undo(image)

    # --- stage 2

    def alignment_loss(self, label: Any, *, components: bool = False, task_loss: Tensor | None = None) -> Any:
        """Stage 2: weight times L_align (eqs. 4-8) of the one training forward since the last call.

        Args:
            label: the label of that forward's images: (B, *spatial) or (B, 1, *spatial) with class indices (integers
                or whole floats), or (B, classes, *spatial) one-hot or multi-label. Of a list, element 0.
            components: return {term: scalar}, unweighted, instead; `loss.combine(terms)` sums them. With `every`, at
                calls between, there are none; at the others multiply the sum by `every` yourself.
            task_loss: given, the gradient norms of every term and of this loss at the model's parameters are
                measured for `stats()`: a backward pass each, so not for every step.

        Returns:
            A scalar to add to the task loss, in at least fp32. At weight 0, and at calls that `every` skips, a zero on
            which backward works.

        Raises:
            ReSegError: no or several training forwards since the last call, the model is in evaluation, the teacher
                is not frozen yet, or the label does not fit.
            TapError: a tap did not fire.
        """
        try:
            return self._aligned(label, components, task_loss)
        except BaseException:
            if self._parts is not None:
                self._parts.student.forget()
            raise

    def record(self) -> AbstractContextManager[None]:
        """Mark the forward that the next `alignment_loss` is for, in loops with several forwards a step."""
        return nullcontext() if self._parts is None and self._weight == 0 else self.extractor.record()

    def stats(self) -> dict[str, float]:
        """The last call's values for a log: terms, "alignment" (unweighted), "weight"; with `task_loss` also norms.

        A call that `every` skips leaves those of the one before it, a call at weight 0 none. "gradient/task" is the
        norm of the task loss's gradient at the model's parameters, "gradient/TERM" that of weight times the term's
        share of the loss (without the factor `every`) over it. Reading them waits for the device.
        """
        return {**{name: float(value) for name, value in self._last.items()}, "weight": self._weight}

    def remove(self) -> None:
        """Take all hooks off. The model is as it was; the wrapper cannot align any more."""
        if self._parts is not None:
            self._parts.remove()
        self._removed = True

    # --- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Teacher, counters, settings and taps: tensors and plain Python values only.

        So are NumPy's numbers and arrays that a model's `get_extra_state` gives; other objects of it stay as they are.
        """
        state: dict[str, Any] = {
            "kind": "ReSegWrapper",
            "format": FORMAT,
            "settings": {**self.settings.to_dict(), "weight": self._weight},
            "calls": self._calls,
            "ready": self.ready,
            "parts": None,
        }
        if self._parts is not None:
            parts, teacher = self._parts, self._parts.teacher
            state["parts"] = {
                "taps": plan_to_dict(parts.student.plan),
                "teacher_taps": plan_to_dict(parts.targets.extractor.plan),
                "own_teacher": self._own_teacher is not None,
                "image_channels": teacher.image_channels,
                "in_channels": teacher.in_channels,
                "out_channels": teacher.out_channels,
                "num_classes": teacher.encoding.num_classes,
                "dims": teacher.encoding.dims,
                "image_map": None if teacher.image_map is None else asdict(teacher.image_map),
                "teacher": plain_state(dict(teacher.state_dict())),
            }
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave, its settings included.

        It needs neither an example nor `fit_recon`. A teacher that was saved before the end of stage 1 is not frozen.

        Raises:
            ReSegError: the state is of another kind, format or model, or not whole, or of a wrapper with a teacher of
                its own that is not here. The wrapper is then as it was.
            TapError: the model has not the taps of the state. The wrapper is then as it was, too.
        """
        check_state(state, "ReSegWrapper", FORMAT, ENTRIES)
        ready, settings = state["ready"], Settings(**state["settings"])
        check_weight("weight", settings.weight)
        if ready and state["parts"] is None:
            raise ReSegError("this state says that stage 1 is over, but has no teacher; it is not whole")
        if self.ready and state["parts"] is not None and not ready:
            raise ReSegError("this state was saved before the end of stage 1, which is over here; build a new wrapper")
        self._restore(state["parts"], settings)
        self._calls = state["calls"]
        self._labels_checked = False  # its settings may say otherwise what a label is
        self.weight = self.settings.weight
        if self._parts is not None and ready:
            self.teacher.freeze()

    # --- inside

    def _continue(self, state: Mapping[str, Any], named: Any, file: str, standardize_image: bool) -> None:
        """The teacher of an unfinished stage 1, whose taps were `named`, under the settings of this wrapper."""
        check_state(state, "ReSegWrapper", FORMAT, ENTRIES)
        saved, mine = state["settings"], self.settings.to_dict()
        other = [f"{name}={saved[name]!r}, here {mine[name]!r}" for name in STAGE_1 if saved[name] != mine[name]]
        standardized = state["parts"]["image_map"] is not None
        if standardized != standardize_image:
            other.append(f"standardize_image={standardized}, here {standardize_image}")
        if self._parts is None:
            other_taps = named != self._named
        else:
            other_taps = not same_taps(self.extractor.plan, plan_from_dict(state["parts"]["taps"]))
        if other_taps:
            other.append("other taps than here (print reseg.extractor to see these)")
        if other:
            raise ReSegError(f"{file} is of a stage 1 with {'; '.join(other)}. Name another file, or remove it")
        self._restore(state["parts"], self.settings)

    @property
    def _named(self) -> dict[str, list[str]]:
        """The taps that were named, as strings; the same in a run that goes on, before the others are found."""
        return {kind: [str(tap) for tap in taps] for kind, taps in parse_taps(self._taps).items()}

    def _restore(self, state: Mapping[str, Any] | None, settings: Settings) -> None:
        # as dicts: a checkpoint has lists where the user may have written tuples
        saved, mine = settings.to_dict(), self.settings.to_dict()
        same = all(saved[name] == mine[name] for name in saved if name not in AT_RUN_TIME)
        parts = self._parts if same else None
        recon_loss = ReconLoss(settings.alpha, settings.beta)
        _alignment(settings)  # as when a wrapper is built
        if state is not None:
            if state["own_teacher"] != (self._own_teacher is not None):
                raise ReSegError(
                    "a state with a teacher of your own needs the same module, teacher=, and no other does"
                )
            plan, teacher_plan = plan_from_dict(state["taps"]), plan_from_dict(state["teacher_taps"])
            if self._parts is not None:
                refuse_other_channels(self._parts.student.plan, plan)
            # rebuilt only where it differs: compiled models hold their hooks
            if parts is None or not (
                same_taps(parts.student.plan, plan) and same_taps(parts.targets.extractor.plan, teacher_plan)
            ):
                encoding = LabelEncoding(
                    settings.label_input, state["num_classes"], state["dims"], settings.ignore_index
                )
                channels = state["in_channels"], state["out_channels"], state["image_channels"]
                bounded = "after.weight" in state["teacher"]  # else its channels alone tell
                teacher = self._make_teacher(encoding, settings, *channels, bounded)
                parts = self._assemble(plan, teacher, teacher_plan, settings)
            try:
                load_states((parts.teacher, state["teacher"]))
            except ReSegError:
                if parts is not self._parts:
                    parts.remove()
                raise
            image_map = state["image_map"]
            parts.teacher.image_map = image_map and ImageMap(tuple(image_map["mean"]), tuple(image_map["std"]))
        if self._parts is not None and self._parts is not parts:
            self._parts.remove()
        self._parts, self.settings, self.recon_loss = parts, settings, recon_loss

    def _build(self, example_input: Any) -> _Parts:
        """Find taps and make the teacher from an example, in dry forwards that leave no trace."""
        image, s, own = image_of(example_input), self.settings, self._own_teacher
        shape, spatial = image.shape, tuple(image.shape[2:])
        if own is None:
            refuse_sharded(self._model)
            arguments: list[Any] = [image]
            if isinstance(example_input, Mapping):
                arguments = [*example_input.values()]
            elif isinstance(example_input, (tuple, list)):
                arguments = [*example_input]
            if len(arguments) > 1 or arguments[0] is not image:
                raise ReSegError(
                    "the example holds more than the image, or the image within something. If it is a loader's (image, "
                    "label), pass the image alone; if the model takes more, its copy would need that beside the label: "
                    "pass a teacher= that takes the label alone"
                )
        try:
            plan = find_taps(self._model, example_input, taps=self._taps, levels=s.levels, encoder=s.encoder)
        except RuntimeError as error:
            weights = {p.dtype for p in self._model.parameters() if p.is_floating_point()}
            if weights and image.dtype not in weights:
                raise ReSegError(
                    f"the model does not run: the image is {image.dtype}, the weights are "
                    f"{', '.join(map(str, weights))} ({str(error).splitlines()[0]}). Convert the images, by "
                    "image.float() for instance, or the model"
                ) from error
            raise
        output = select_output(dry_output(self._model, example_input), shape[0], spatial, s.output_path)
        classes, bounded = output.shape[1], activation_of(output) is not None
        encoding = LabelEncoding(s.label_input, classes, len(spatial), s.ignore_index)
        if own is None:
            return self._assemble(plan, self._make_teacher(encoding, s, shape[1], classes, shape[1], bounded), plan, s)
        channels = input_channels(own, default=encoding.channels)
        label = torch.zeros(shape[0], channels, *spatial, device=image.device, dtype=image.dtype)
        out_channels = select_output(dry_output(own, label), shape[0], spatial).shape[1]
        theirs = find_taps(own, label, taps=self._teacher_taps, encoder=s.encoder)
        if not self._teacher_taps:
            theirs = theirs.select([level.stride for level in plan.selected])
        return self._assemble(plan, self._make_teacher(encoding, s, channels, out_channels, shape[1]), theirs, s)

    def _make_teacher(
        self,
        encoding: LabelEncoding,
        settings: Settings,
        in_channels: int,
        out_channels: int,
        image_channels: int,
        bounded: bool = False,
    ) -> Teacher:
        """A teacher around a copy of the model, or around the user's module."""
        own = self._own_teacher
        with preserved_rng():
            return Teacher(
                copy_for_teacher(self._model, settings.teacher_init) if own is None else own,
                encoding,
                in_channels=in_channels,
                out_channels=out_channels,
                image_channels=image_channels,
                output=settings.output_path if own is None else None,
                bounded=bounded,
            )

    def _assemble(self, plan: TapPlan, teacher: Teacher, teacher_plan: TapPlan, settings: Settings) -> _Parts:
        """Loss and hooks, once taps and teacher are known; the student's hooks last, when nothing can fail."""
        _check_sizes(plan, teacher_plan)
        loss = _alignment(settings)
        targets = Targets(teacher, teacher_plan)
        student = FeatureExtractor(self._model, plan)
        if not self._removed:
            student.attach()
        student.enabled = self._aligns
        return _Parts(student, teacher, targets, loss)

    @property
    def _aligns(self) -> bool:
        """Whether the next call aligns, so that the forward before it must be recorded."""
        return self._weight != 0 and self._calls % self.settings.every == 0

    def _arm(self) -> None:
        if self._parts is not None:
            self._parts.student.enabled = self._aligns

    def _aligned(self, label: Any, components: bool, task_loss: Tensor | None) -> Tensor | dict[str, Tensor]:
        if self._removed:
            raise ReSegError("the hooks were removed; build a new ReSegWrapper to align again")
        refuse_evaluation(self._model)
        if task_loss is not None and not isinstance(task_loss, Tensor):
            raise ReSegError(f"task_loss= is the task loss's value, a tensor, here; got {type(task_loss).__name__}")
        label = plain_label(label)
        if self._weight == 0:
            self._last = {}
            return {} if components else torch.zeros((), device=label.device, requires_grad=True)
        parts, settings = self._known(), self.settings
        teacher, loss = parts.teacher, parts.loss
        if not teacher.frozen:
            raise ReSegError(
                "the teacher is not ready: call fit_recon(loader, ...), or load_state_dict(state) of an earlier run, "
                "or freeze_teacher() after training reseg.teacher yourself"
            )
        if not self._aligns:
            self._calls += 1
            self._arm()
            return {} if components else torch.zeros((), device=label.device, requires_grad=True)
        recorded = parts.student.take()
        device = recorded.features.bottleneck.device
        label = label.to(device, non_blocking=True)
        teacher.encoding.check_shape(label, recorded.image.shape)
        first = not self._labels_checked
        if readable(device, first):
            teacher.encoding.check_values(label)
        targets, valid = parts.targets(label, recorded.autocast, settings)
        terms = loss(recorded.features, targets, valid, components=True)
        total = loss.combine(terms)
        made_of = {OF_IMAGES: [recorded.image], OF_MODEL: _all(recorded.features), OF_TEACHER: _all(targets)}
        refuse_not_finite(total, made_of, OF_SIZE, first=first)
        self._last = {name: term.detach() for name, term in {**terms, "alignment": total}.items()}
        if task_loss is not None:
            self._last |= self._gradient_norms(terms, task_loss)
        self._calls, self._labels_checked = self._calls + 1, True
        self._arm()
        return terms if components else self._weight * settings.every * total

    def _gradient_norms(self, terms: Mapping[str, Tensor], task_loss: Tensor) -> dict[str, Tensor]:
        parameters = [p for p in self._model.parameters() if p.requires_grad]

        def norm(value: Tensor) -> Tensor:
            if not value.requires_grad:  # everything that it depends on is frozen
                return torch.zeros((), device=value.device)
            gradients = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
            norms = [g.float().norm() for g in gradients if g is not None]
            return torch.stack(norms).norm() if norms else torch.zeros((), device=value.device)

        task = norm(task_loss)
        shares = {name: norm(self._weight * self.loss.combine({name: term})) for name, term in terms.items()}
        return {"gradient/task": task, **{f"gradient/{name}": share / task for name, share in shares.items()}}

    def _known(self) -> _Parts:
        if self._parts is None:
            raise ReSegError(
                "taps and teacher are not known yet: pass example_input= (an image batch) to ReSegWrapper, or call "
                "fit_recon(loader, ...) or load_state_dict(state) first, before the first training forward"
            )
        return self._parts


def _alignment(settings: Settings) -> CrossAlignmentLoss:
    return CrossAlignmentLoss(
        settings.encoder_to_decoder,
        settings.decoder_to_encoder,
        settings.bottleneck,
        divisor=settings.divisor,
        normalize=settings.normalize,
        seed=settings.seed,
    )


def _all(features: Features) -> list[Tensor]:
    return [*features.encoder, *features.decoder, features.bottleneck]


def _share_parameters(a: nn.Module, b: nn.Module) -> bool:
    of_a = {id(parameter) for parameter in a.parameters()}
    return any(id(parameter) in of_a for parameter in b.parameters())


def _check_sizes(student: TapPlan, teacher: TapPlan) -> None:
    """Raise a TapError if the two have taps of different sizes."""
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
