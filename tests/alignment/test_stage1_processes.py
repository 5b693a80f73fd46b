"""Stage 1 on two processes: one map of the images, one file, and what one refuses all refuse. Also what it runs."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from launch import two_processes
from models import UNet, batch

from reseg_loss import ReSegError, ReSegWrapper

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch is built without distributed")


def fit(rank: int, batches: int = 2, **kwargs: Any) -> ReSegWrapper:
    torch.manual_seed(0)
    reseg = ReSegWrapper(UNet(), example_input=batch()[0])
    data = [batch(seed=10 * rank + i) for i in range(batches)]
    reseg.fit_recon(
        [(image * (100 + rank), label) for image, label in data],
        progress=False,
        standardize_image=True,
        **{"epochs": 1, **kwargs},
    )
    return reseg


def refusal(function: Callable[[], Any]) -> str:
    try:
        function()
    except ReSegError as error:
        return str(error)
    return "it was not refused"


def work(rank: int, folder: Path) -> dict[str, Any]:
    """What one of the processes finds."""
    file = folder / "stage1.pt"
    first = fit(rank, checkpoint=file)
    second = fit(rank, checkpoint=file, epochs=2)
    found: dict[str, Any] = {
        "maps": [reseg.state_dict()["parts"]["image_map"] for reseg in (first, second)],
        "teacher": second.teacher.state_dict(),
        "files": sorted(path.name for path in folder.iterdir() if "stage1" in path.name),
        "folder": refusal(lambda: fit(rank, checkpoint=folder)),
        "uneven": refusal(lambda: fit(rank, batches=2 + rank)),
        "uneven steps": refusal(lambda: fit(rank, batches=2 + rank, epochs=None, steps=5)),
    }
    broken = folder / "broken.pt"
    if rank == 0:
        broken.write_bytes(file.read_bytes()[:-50])
    dist.barrier()
    found["broken"] = refusal(lambda: fit(rank, checkpoint=broken))
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("processes")
    two_processes(__file__, folder)
    return [torch.load(folder / f"{rank}.found", weights_only=True) for rank in range(2)]


def test_every_process_has_the_map_of_the_first_and_keeps_it_on_resuming(found):
    image = batch(seed=0)[0] * 100
    for each in found:
        for image_map in each["maps"]:
            assert image_map["mean"][0] == pytest.approx(image.mean().item())
            assert image_map["std"][0] == pytest.approx(image.std(correction=0).item())
    teachers = [each["teacher"] for each in found]
    assert all(torch.equal(teachers[0][name], teachers[1][name]) for name in teachers[0])


def test_one_process_writes_and_leaves_nothing_else(found):
    assert found[0]["files"] == ["stage1.pt"]


def test_a_file_that_is_of_no_use_is_refused_on_every_process(found):
    for each in found:
        assert "is a folder" in each["folder"]
        assert "is damaged" in each["broken"]


def test_passes_of_other_lengths_are_refused_on_every_process_but_not_a_number_of_steps(found):
    for each in found:
        assert "in an epoch of stage 1: 2 on rank 0, 3 on rank 1" in each["uneven"]
        assert each["uneven steps"] == "it was not refused"


if __name__ == "__main__":
    me, where = int(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{where}/store", rank=me, world_size=2)
    torch.save(work(me, where), where / f"{me}.found")
    dist.destroy_process_group()
