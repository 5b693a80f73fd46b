"""The frozen teacher's forward as CUDA graphs, which cost the host one launch however many layers there are.

A graph writes its features to the same memory at every replay. Autograd is told about this, and refuses a backward that
comes after the next replay. Python code in the forward (for instance a counting hook) only runs during capture.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..recording.extractor import Features

logger = logging.getLogger("reseg_loss")

LIMIT = 4  # graphs of a teacher: each holds the memory of its forward
WARM_UPS = 2  # before the one that is watched, as torch's notes on CUDA graphs advise


class Captured:
    """The graphs of one teacher, one for every kind of input. A copy or a pickle of this object has none."""

    def __init__(self) -> None:
        self._replays: dict[Any, Callable[[Tensor], Features]] = {}
        self._made_of: Any = None
        self._failed = self._full = False

    def __call__(
        self, forward: Callable[[Tensor], Features], encoded: Tensor, made_of: Any, autocast: tuple[bool, torch.dtype]
    ) -> Features:
        """What `forward` returns for a label, by a replay if possible. The next call overwrites it.

        Args:
            forward: runs the teacher, under the given autocast.
            encoded: its input.
            made_of: equal as long as `forward` runs the same operations on the same memory; the values may change.
            autocast: whether it runs in autocast, and in which dtype it computes.
        """
        if made_of != self._made_of:
            self.drop()
            self._made_of = made_of
        kind = encoded.shape, encoded.dtype, encoded.device, autocast
        if kind not in self._replays and not self._capture(kind, forward, encoded):
            return forward(encoded)
        features = self._replays[kind](encoded)
        for feature in features.all():
            torch.autograd.graph.increment_version(feature)  # autograd does not see a replay
        return features

    def drop(self) -> None:
        """Free the graphs and their memory."""
        self._replays.clear()
        self._made_of = None

    def __reduce__(self) -> tuple[type[Captured], tuple[()]]:
        return type(self), ()

    def _capture(self, kind: Any, forward: Callable[[Tensor], Features], encoded: Tensor) -> bool:
        """Capture the first input of its kind; returns whether that was possible."""
        if self._failed:
            return False
        if len(self._replays) == LIMIT:
            if not self._full:
                logger.info("the teacher has graphs for %d kinds of input and runs other inputs without one", LIMIT)
            self._full = True
            return False
        try:
            self._replays[kind] = capture_forward(forward, encoded)
        except RuntimeError as error:
            # the end of a capture that broke may hide why it did
            if isinstance(error, torch.OutOfMemoryError) or isinstance(error.__context__, torch.OutOfMemoryError):
                raise
            self.drop()
            self._failed = True
            message = "the teacher's forward cannot be captured, so it runs as before; leave out capture_teacher (%s)"
            logger.warning(message, error, exc_info=True)
        return not self._failed


def serves(device: torch.device) -> bool:
    """Whether graphs can be captured on a device now. (A step that is captured itself contains the forward already.)"""
    return device.type == "cuda" and not torch.cuda.is_current_stream_capturing()


def capture_forward(forward: Callable[[Tensor], Features], encoded: Tensor) -> Callable[[Tensor], Features]:
    """A function that copies an input like `encoded` to the graph's and replays it.

    Raises:
        RuntimeError: the forward cannot be captured.
    """
    static, graph = encoded.clone(), torch.cuda.CUDAGraph()
    with torch.cuda.device(static.device):
        aside, stream = torch.cuda.Stream(), torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(WARM_UPS):
                forward(static)
            if _waits(lambda: forward(static)):  # asked before, for a capture that breaks does not leave all as it was
                raise RuntimeError("it waits for the device, for instance in .item() or in a copy to the CPU")
        torch.cuda.current_stream().wait_stream(aside)
        # other threads may do meanwhile what a capture forbids, as those that pin memory do
        mode = "thread_local"
        try:
            # the outer one puts the user's stream back where a capture breaks, which the inner does not
            with torch.cuda.stream(stream), torch.cuda.graph(graph, stream=stream, capture_error_mode=mode):
                features = forward(static)
        except RuntimeError:
            # older torch refuses to draw random numbers from then on, until a capture ends well
            with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=aside, capture_error_mode=mode):
                static.zero_()
            raise

    def replay(encoded: Tensor) -> Features:
        static.copy_(encoded)
        graph.replay()
        return features

    return replay


def _waits(function: Callable[[], Any]) -> bool:
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            function()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return any("synchronizing CUDA operation" in str(warning.message) for warning in caught)
