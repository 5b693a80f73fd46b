"""What the student is compared with: the frozen teacher's features of label maps, computed as cheaply as possible."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TapError
from ..recording.copying import unwrap
from ..recording.extractor import FeatureExtractor, Features
from ..taps import TapPlan
from . import capture
from .settings import Settings
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
        # asked for features now and then: on in `features_of` alone
        self.extractor = FeatureExtractor(teacher.body, taps=plan, when="always").attach()
        self.extractor.enabled = False
        self._body = unwrap(teacher.body)
        # buffers that a forward in evaluation changes, as (module, name); None: not known yet
        self._moving: list[tuple[nn.Module, str]] | None = None
        self._compiled: Callable[[Tensor], None] | None = None
        self._tried_channels_last = False
        self._captured = capture.Captured()

    def __call__(
        self, label: Tensor, autocast: tuple[bool, torch.dtype], settings: Settings
    ) -> tuple[Features, Tensor | None]:
        """The features of a label map and its valid mask.

        Args:
            label: on the student's device, checked.
            autocast: whether the student ran in autocast, and in which dtype; `settings.teacher_dtype` overrides this.
            settings: how to run.
        """
        teacher, device = self.teacher, label.device
        if unwrap(teacher.body) is not self._body:
            raise TapError(
                "the teacher's body is not the module whose taps are read any more: wrap or replace it before you pass "
                "it to ReSegWrapper as teacher="
            )
        if teacher.reference.device != device:
            teacher.to(device)
        # a body of the user's, or a part of it, may be part of another module, whose train() reaches it
        if any(module.training for module in teacher.body.modules()):
            teacher.eval()
        encoded, valid = teacher.encoding.encode(label)
        enabled, dtype = autocast if settings.lower is None else (True, settings.lower)
        dtype = dtype if enabled else teacher.reference.dtype
        run = teacher.run
        if settings.compile_teacher:
            run = self._compiled = self._compiled or torch.compile(teacher.run)

        def features(encoded: Tensor) -> Features:
            # no cache of casts: a CUDA graph would read one after it is freed
            cast = torch.autocast(device.type, dtype=dtype, enabled=enabled, cache_enabled=False)
            with torch.no_grad(), cast, self._unmoved():
                return self.extractor.features_of(lambda: run(encoded))

        if device.type == "cuda" and dtype.itemsize < 4 and not self._tried_channels_last:
            # convolutions in low precision are several times faster so, whatever the student's are
            self._tried_channels_last = True
            teacher.to_channels_last()
            try:
                return features(encoded), valid
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:  # a view() that counts on the usual order
                logger.info("the teacher does not run with channels last (%s), so it runs as before", error)
                teacher.to_channels_last(False)
        if settings.capture_teacher and capture.serves(device):
            return self._captured(features, encoded, (run, teacher.made_of()), (enabled, dtype)), valid
        return features(encoded), valid

    def remove(self) -> None:
        """Remove the hooks from the teacher, and free its CUDA graphs."""
        self.extractor.remove()
        self._captured.drop()

    def __getstate__(self) -> dict[str, Any]:
        # a copied or pickled one makes its own: a compiled function stays bound to the teacher that it was made of
        return {**self.__dict__, "_compiled": None}

    @contextmanager
    def _unmoved(self) -> Iterator[None]:
        """Restore the buffers that a forward in evaluation mode changes; the first forward shows which ones."""
        first = self._moving is None
        if first and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            yield  # nothing can be compared now
            return
        with self.teacher.unmoved(self._moving) as moved:
            yield
        if first:
            self._moving = moved
            if moved:
                held = {id(module._buffers[name]) for module, name in moved}
                names = [name for name, buffer in self.teacher.named_buffers() if id(buffer) in held]
                message = "the teacher's %s change even in evaluation mode; they are restored, so that it stays frozen"
                logger.warning(message, ", ".join(names))
