"""What the student is compared with: a frozen teacher's features of label maps, at the least cost."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import capture
from .features import FeatureExtractor, Features
from .fold import folded
from .settings import Settings
from .taps import TapPlan
from .teacher import Teacher

logger = logging.getLogger("reseg_loss")


class Targets:
    """Runs the teacher up to its last tap, on the label's device.

    Args:
        teacher: frozen by the time of the first call.
        plan: the taps in its body.
    """

    def __init__(self, teacher: Teacher, plan: TapPlan) -> None:
        self.teacher = teacher
        self.extractor = FeatureExtractor(teacher.body, plan, when="always").attach()
        self.extractor.enabled = False  # on while the teacher runs only
        self._compiled: Callable[[Tensor], None] | None = None
        self._tried_channels_last = False
        self._folded: tuple[Any, nn.Module, FeatureExtractor] | None = None  # what it was made of, the body, its taps
        self._captured = capture.Captured()

    def __call__(
        self, label: Tensor, autocast: tuple[bool, torch.dtype], settings: Settings
    ) -> tuple[Features, Tensor | None]:
        """The features of a label map and its valid mask.

        Args:
            label: on the student's device, checked.
            autocast: whether the student ran in autocast, and in which dtype; `settings.teacher_dtype` overrides it.
            settings: how to run.
        """
        teacher, device = self.teacher, label.device
        if teacher.reference.device != device:
            teacher.to(device)
        encoded, valid = teacher.encoding.encode(label)
        enabled, dtype = autocast if settings.lower is None else (True, settings.lower)
        dtype = dtype if enabled else teacher.reference.dtype
        low = dtype.itemsize < 4
        run, extractor = teacher.run, self.extractor
        if settings.compile_teacher:
            run = self._compiled = self._compiled or torch.compile(teacher.run)

        def features(encoded: Tensor) -> Features:
            # no cache of casts: a CUDA graph would read one after it is freed
            cast = torch.autocast(device.type, dtype=dtype, enabled=enabled, cache_enabled=False)
            with torch.no_grad(), cast:
                return extractor.features_of(lambda: run(encoded))

        if device.type == "cuda" and low and not self._tried_channels_last:
            # convolutions in low precision are several times faster so, whatever the student's are
            self._tried_channels_last = True
            teacher.to_channels_last()
            try:
                return features(encoded), valid
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:  # a view() that counts on the usual order
                logger.info("the teacher does not run with channels last (%s) and runs as it was", error)
                teacher.to_channels_last(False)
        fold = settings.fold_teacher and low
        if fold:
            run, extractor = self._fold(encoded, dtype)
        if settings.capture_teacher and capture.serves(device):
            # a folded body is another one once the teacher has changed
            made_of = extractor if fold else (run, [t.data_ptr() for t in teacher.tensors()])
            return self._captured(features, encoded, made_of, (enabled, dtype)), valid
        return features(encoded), valid

    def remove(self) -> None:
        """Take the hooks off the teacher, and free what was made for it."""
        self.extractor.remove()
        self._folded = None
        self._captured.drop()

    def __getstate__(self) -> dict[str, Any]:
        # a copied or pickled one makes its own: a compiled function stays bound to the teacher that it was made of
        return {**self.__dict__, "_compiled": None, "_folded": None}

    def _fold(self, encoded: Tensor, dtype: torch.dtype) -> tuple[Callable[[Tensor], None], FeatureExtractor]:
        """The teacher's forward with its chains folded, and its taps; made anew when the teacher has changed."""
        teacher = self.teacher

        def before(encoded: Tensor) -> Tensor:
            return teacher.before(encoded.to(teacher.reference.dtype))

        made_of = dtype, [(t.data_ptr(), t._version) for t in teacher.tensors()]
        if self._folded is None or self._folded[0] != made_of:
            with torch.no_grad():
                body, count = folded(teacher.body, before(encoded[:1]), self.extractor.taps, dtype)
            logger.info("%d chains of the teacher are folded", count)
            extractor = FeatureExtractor(body, self.extractor.plan, when="always").attach()
            extractor.enabled = False
            self._folded = made_of, body, extractor
        _, body, extractor = self._folded
        return lambda encoded: body(before(encoded)), extractor
