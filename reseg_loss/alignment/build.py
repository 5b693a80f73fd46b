"""The parts of the alignment: taps, teacher, criterion and hooks, built from an example or restored from a state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..common.dryrun import image_of, preserved_rng
from ..common.labels import LabelEncoding
from ..common.outputs import select_output
from ..common.state import load_states, plain_state
from ..errors import ReSegError, TapError
from ..recording.extractor import FeatureExtractor
from ..taps import TapPlan, look
from ..taps.named import module_of, parse_taps
from ..taps.plain import PLAN, plan_from_dict, plan_to_dict, refuse_other_channels, same_taps
from .image_range import ImageMap
from .losses import CrossAlignmentLoss
from .settings import Settings, criterion_of
from .targets import Targets
from .teacher import Teacher, copy_for_teacher, input_channels, refuse_sharded

CHANNELS = ("in_channels", "out_channels", "image_channels")  # of `Teacher`
ENTRIES = {  # of the state of `Parts`
    "taps": PLAN,
    "teacher_taps": PLAN,
    "own_teacher": bool,
    **dict.fromkeys((*CHANNELS, "num_classes", "dims"), int),
    "image_map": ({"mean": [float], "std": [float]}, None),
    "teacher": dict,
}


@dataclass(frozen=True)
class Origin:
    """The user's arguments that the parts are built from: see `ReSegWrapper`.

    Raises:
        TapError: a named tap is invalid, or its module does not exist.
        ReSegError: the teacher shares parameters with the model.
    """

    model: nn.Module
    taps: Mapping[str, Any] | None
    teacher: nn.Module | None
    teacher_taps: Mapping[str, Any] | None

    def __post_init__(self) -> None:
        for module, named in ((self.model, self.taps), (self.teacher or self.model, self.teacher_taps)):
            for entries in parse_taps(named).values():
                for tap in entries:
                    module_of(module, tap)
        own, parameters = self.teacher, {*map(id, self.model.parameters())}
        if own is not None and (own is self.model or any(id(p) in parameters for p in own.parameters())):
            raise ReSegError(
                "teacher= is the model itself or shares parameters with it, and stage 1 would train and then freeze "
                "those; leave out teacher= to use a copy"
            )

    @property
    def named(self) -> dict[str, list[str]]:
        """The taps that the user named, as strings. A resumed run can compare them before the others are found."""
        return {kind: [str(tap) for tap in taps] for kind, taps in parse_taps(self.taps).items()}


@dataclass
class Parts:
    """What exists once the taps are known."""

    student: FeatureExtractor
    teacher: Teacher
    targets: Targets
    criterion: CrossAlignmentLoss

    def remove(self) -> None:
        """Remove the hooks from student and teacher."""
        self.student.remove()
        self.targets.remove()

    def state(self, own_teacher: bool) -> dict[str, Any]:
        """Tensors and plain values, as `ENTRIES` says."""
        teacher = self.teacher
        return {
            "taps": plan_to_dict(self.student.plan),
            "teacher_taps": plan_to_dict(self.targets.extractor.plan),
            "own_teacher": own_teacher,
            **{name: getattr(teacher, name) for name in CHANNELS},
            "num_classes": teacher.encoding.num_classes,
            "dims": teacher.encoding.dims,
            "image_map": None if teacher.image_map is None else asdict(teacher.image_map),
            "teacher": plain_state(dict(teacher.state_dict())),
        }


def build(origin: Origin, example_input: Any, settings: Settings) -> Parts:
    """Find the taps and build the teacher from an example, in dry forwards that leave no trace. No hooks are set yet.

    Raises:
        TapError: there are no taps, or those of student and teacher differ in size.
        ReSegError: the example is not an image, or the model is not supported.
    """
    model, own = origin.model, origin.teacher
    image = image_of(example_input)
    shape, spatial = image.shape, tuple(image.shape[2:])
    if own is None:
        refuse_sharded(model)
        _refuse_more_than_the_image(example_input, image)
    plan, trace = look(model, example_input, taps=origin.taps, levels=settings.levels, encoder=settings.encoder)
    output = select_output(trace.output, shape[0], spatial, settings.output_path)
    classes, bounded = output.shape[1], trace.activation(output) is not None
    encoding = LabelEncoding(settings.label_input, classes, len(spatial), settings.ignore_index)
    if own is None:
        return _parts(origin, settings, encoding, plan, plan, (shape[1], classes, shape[1]), bounded)
    channels = input_channels(own, default=encoding.channels)
    label = torch.zeros(shape[0], channels, *spatial, device=image.device, dtype=image.dtype)
    theirs, trace = look(own, label, taps=origin.teacher_taps, encoder=settings.encoder)
    out_channels = select_output(trace.output, shape[0], spatial).shape[1]
    if not origin.teacher_taps:
        theirs = theirs.select([level.stride for level in plan.selected])
    return _parts(origin, settings, encoding, plan, theirs, (channels, out_channels, shape[1]))


def restore(origin: Origin, state: Mapping[str, Any], settings: Settings, known: Parts | None, keep: bool) -> Parts:
    """The parts that a state describes, with its weights: the `known` ones if `keep` and if they fit, else new ones.

    Raises:
        ReSegError: the state is of another model, or of a teacher that is not here. The known parts are unchanged.
        TapError: the model does not have the taps of the state.
    """
    if state["own_teacher"] != (origin.teacher is not None):
        raise ReSegError(
            "a state that was saved with teacher= can only be loaded with the same teacher=, and a state that was "
            "saved without it only without it"
        )
    plan, teacher_plan = plan_from_dict(state["taps"]), plan_from_dict(state["teacher_taps"])
    if known is not None:
        refuse_other_channels(known.student.plan, plan)
    parts = known if keep else None
    # made anew only where it differs: compiled models hold their hooks
    if parts is None or not (
        same_taps(parts.student.plan, plan) and same_taps(parts.targets.extractor.plan, teacher_plan)
    ):
        encoding = LabelEncoding(settings.label_input, state["num_classes"], state["dims"], settings.ignore_index)
        channels = tuple(state[name] for name in CHANNELS)
        bounded = "after.weight" in state["teacher"]  # else its channels alone tell
        parts = _parts(origin, settings, encoding, plan, teacher_plan, channels, bounded)
    try:
        parts.teacher.check_finite("in this state", state["teacher"])
        load_states((parts.teacher, state["teacher"]))
    except ReSegError:
        if parts is not known:
            parts.remove()
        raise
    image_map = state["image_map"]
    parts.teacher.image_map = image_map and ImageMap(tuple(image_map["mean"]), tuple(image_map["std"]))
    return parts


def _refuse_more_than_the_image(example_input: Any, image: Tensor) -> None:
    given = [*example_input.values()] if isinstance(example_input, Mapping) else example_input
    if given is not image and not (isinstance(given, (tuple, list)) and len(given) == 1 and given[0] is image):
        raise ReSegError(
            "the example is not just an image. If it is (image, label) from a loader, pass the image alone. If the "
            "model takes more inputs than the image, its copy would need them along with the label: pass a teacher= "
            "that takes the label alone"
        )


def _parts(
    origin: Origin,
    settings: Settings,
    encoding: LabelEncoding,
    plan: TapPlan,
    teacher_plan: TapPlan,
    channels: tuple[int, ...],
    bounded: bool = False,
) -> Parts:
    """The parts, with a teacher around a copy of the model or around the user's module; `channels` as in `CHANNELS`.

    Raises:
        TapError: the two plans have taps of different sizes.
    """
    mine, theirs = ([*(level.spatial for level in p.selected), p.bottleneck.spatial] for p in (plan, teacher_plan))
    if mine != theirs:
        raise TapError(
            "student and teacher have taps of different sizes, and features are never resized.\n"
            f"{plan.draw('student')}\n{teacher_plan.draw('teacher')}"
        )
    own = origin.teacher
    with preserved_rng():
        teacher = Teacher(
            copy_for_teacher(origin.model, settings.teacher_init) if own is None else own,
            encoding,
            **dict(zip(CHANNELS, channels)),
            output=settings.output_path if own is None else None,
            bounded=bounded,
        )
    student = FeatureExtractor(origin.model, taps=plan)
    return Parts(student, teacher, Targets(teacher, teacher_plan), criterion_of(settings))
