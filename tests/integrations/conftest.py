"""nnU-Net's data set, planned and preprocessed once for all tests of a process."""

from __future__ import annotations

import multiprocessing
import multiprocessing.pool
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nnunet_tiny as tiny
import pytest

from reseg_loss.integrations.nnunet import __main__ as printer


@pytest.fixture(scope="session")
def one_process() -> Iterator[pytest.MonkeyPatch]:
    """nnU-Net without processes of its own: threads, for each of those would import everything again."""
    from nnunetv2.training.logging.nnunet_logger import MetaLogger

    patch = pytest.MonkeyPatch()
    for name, value in {"def_n_proc": "1", "n_proc_DA": "0", "compile": "f"}.items():
        patch.setenv(f"nnUNet_{name}", value)
    patch.setattr(multiprocessing, "get_context", lambda method=None: _threads())
    patch.setattr(MetaLogger, "plot_progress_png", lambda *args, **kwargs: None)
    yield patch
    patch.undo()


@pytest.fixture(scope="session")
def folders(one_process: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data set, planned and preprocessed."""
    root = tmp_path_factory.mktemp("nnunet")
    for name in ("raw", "preprocessed", "results"):
        (root / name).mkdir()
        one_process.setenv(f"nnUNet_{name}", str(root / name))
    one_process.setenv("nnUNet_extTrainer", str(printer.folder()))
    tiny.write_dataset(root / "raw")
    from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprints, plan_experiments, preprocess

    extract_fingerprints([901], num_processes=1, check_dataset_integrity=True, clean=True)
    one_process.setenv("nnUNet_n_proc_DA", "1")  # 0 crashes the planning
    plan_experiments([901])
    one_process.setenv("nnUNet_n_proc_DA", "0")
    preprocess([901], configurations=("2d", "3d_fullres"), num_processes=(1, 1))
    tiny.shrink_plans(root / "preprocessed")
    printer.main(["prepare", tiny.ID, "-np", "1"])
    return root


def _threads() -> Any:
    own = {name: getattr(multiprocessing, name) for name in ("Manager", "Queue", "Event", "Process")}
    return types.SimpleNamespace(Pool=lambda n=1, *args, **kwargs: multiprocessing.pool.ThreadPool(n), **own)
