"""The page's code is run: in one process here, and in two that torchrun starts; its table names what was tested."""

from __future__ import annotations

import json
import os
import re
from typing import Any

import frameworks_worker as worker
import pytest
import torch
from frameworks_page import PAGE, code_after_the_diff, code_before_the_diff, section
from launch import TORCHRUN, run
from models import UNet, batch, task_loss
from torch.utils._pytree import tree_leaves

from reseg_loss.integrations.nnunet import __main__ as printer

pytestmark = [
    pytest.mark.filterwarnings("default"),  # the frameworks' own are many
    pytest.mark.filterwarnings("error:::reseg_loss"),
    pytest.mark.filterwarnings("ignore:the teacher's reconstruction loss"),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of the two processes found."""
    folder = tmp_path_factory.mktemp("frameworks")
    # two processes on one GPU would need another backend
    run(*TORCHRUN, worker.__file__, folder, CUDA_VISIBLE_DEVICES="")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def both(found: list[dict[str, Any]], check: Any) -> list[Any]:
    results = [each[check.__name__] for each in found]
    for result in results:
        if isinstance(result, ModuleNotFoundError):
            pytest.skip(str(result))
        if isinstance(result, Exception):
            pytest.fail(str(result))
    return results


def equal(a: Any, b: Any) -> bool:
    first, second = tree_leaves(a), tree_leaves(b)
    return len(first) == len(second) and all(
        torch.equal(torch.as_tensor(x), torch.as_tensor(y)) for x, y in zip(first, second)
    )


@pytest.mark.parametrize("check", [worker.ddp, worker.fsdp2, worker.accelerate], ids=lambda check: check.__name__)
def test_on_two_processes_a_killed_run_goes_on_as_if_it_had_not_been(found, check):
    if torch.__version__ < "2.7" and check is worker.fsdp2:
        pytest.skip("FSDP2 of torch 2.6 does not run on a CPU")
    for result in both(found, check):
        whole, resumed = result["whole"], result["resumed"]
        assert (whole["fits"], resumed["fits"]) == (1, 0), "the teacher came from the checkpoint"
        assert equal(resumed["losses"], whole["losses"][6:])
        assert len(resumed["losses"]) == 3
        for part in {"model", "ds", "teacher"} & set(whole):
            assert equal(resumed[part], whole[part]), part
        assert resumed["calls"] == whole["calls"] == 9


@pytest.mark.parametrize("check", worker.CHECKS, ids=lambda check: check.__name__)
def test_on_two_processes_all_have_the_same_model_heads_and_teacher(found, check):
    if torch.__version__ < "2.7" and check is worker.fsdp2:
        pytest.skip("FSDP2 of torch 2.6 does not run on a CPU")
    zero, one = (result.get("whole", result) for result in both(found, check))
    assert zero["calls"] == one["calls"] > 0
    for part in {"model", "ds", "teacher"} & set(zero):
        assert equal(zero[part], one[part]), part
    if zero["losses"]:
        assert not equal(zero["losses"], one["losses"]), "each process has a part of the batches"


def test_nnunets_lines_add_a_folder_with_our_trainers(monkeypatch, capsys):
    assert 'eval "$(python -m reseg_loss.integrations.nnunet)"' in section("nnU-Net v2")
    monkeypatch.delenv("nnUNet_extTrainer", raising=False)
    for named in ([], ["/some/where"], ["/some/where", str(printer.folder())]):
        monkeypatch.setenv("nnUNet_extTrainer", os.pathsep.join(named))
        expected = [*named[:1], str(printer.folder())]
        printer.main([])
        name, _, paths = capsys.readouterr().out.strip().partition("=")
        assert name == "export nnUNet_extTrainer"
        assert paths.split(os.pathsep) == expected
        with monkeypatch.context() as patch:
            patch.setattr("sys.stdout.isatty", lambda: True)
            printer.main([])
        bash, powershell = capsys.readouterr().out.splitlines()
        assert bash == f"{name}={paths}"
        assert powershell == f"# in PowerShell: $env:nnUNet_extTrainer = '{os.pathsep.join(expected)}'"
    names = sorted(file.name for file in printer.folder().glob("*.py"))
    assert names == ["nnUNetTrainerReSeg.py", "nnUNetTrainerSemi.py"]


def test_lightnings_section_runs(tmp_path, monkeypatch):
    L = pytest.importorskip("lightning.pytorch")  # noqa: N806
    monkeypatch.chdir(tmp_path)
    trainer = "L.Trainer(max_epochs=1, logger=False, enable_progress_bar=False, enable_model_summary=False"
    keys = []
    for code in (code_before_the_diff, code_after_the_diff):
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*batch(n=6)), batch_size=2)
        scope = {"L": L, "torch": torch, "MyUNet": UNet, "train_loader": loader, "task_loss": task_loss}
        exec(code("Lightning", **{"L.Trainer(max_epochs=100": trainer}), scope)
        (file,) = tmp_path.rglob("*.ckpt")
        keys.append(list(torch.load(file, weights_only=True)["state_dict"]))
        file.unlink()
    assert keys[0] == keys[1]


def test_monais_section_runs(tmp_path, monkeypatch):
    pytest.importorskip("ignite")
    pytest.importorskip("monai")
    from monai.bundle import ConfigParser
    from monai.engines import SupervisedTrainer
    from monai.handlers import CheckpointSaver
    from monai.losses import DiceCELoss
    from monai.networks.nets import UNet as MonaiUNet

    monkeypatch.chdir(tmp_path)
    image, label = batch(n=4)
    keys = []
    for code in (code_before_the_diff, code_after_the_diff):
        scope = {
            "UNet": MonaiUNet, "SupervisedTrainer": SupervisedTrainer, "CheckpointSaver": CheckpointSaver,
            "DiceCELoss": DiceCELoss, "torch": torch, "device": torch.device("cpu"),
            "train_loader": [{"image": image, "label": label[:, None]}] * 2,
        }  # fmt: skip
        exec(code("MONAI engines and Ignite", **{"device, 100": "device, 1"}), scope)
        (file,) = tmp_path.rglob("*.pt")
        state = torch.load(file, weights_only=True)
        keys.append((list(state["net"]), sorted(state)))
        file.unlink()
    assert keys[0][0] == keys[1][0]
    assert keys[1][1] == ["ds", "net", "optimizer", "reseg"]

    (config,) = re.findall(r"```json\n(.*?)```", section("MONAI engines and Ignite"), re.DOTALL)
    parser = ConfigParser(json.loads("{" + config + "}"))
    parser["network"] = UNet()
    parser.parse()
    handler, _ = parser.get_parsed_content("handlers")
    assert handler.reseg is parser.get_parsed_content("reseg")
    assert handler.fit_recon == {"epochs": 50}


def test_the_bundles_config_with_unlabelled_images_trains():
    pytest.importorskip("ignite")
    pytest.importorskip("monai")
    from monai.bundle import ConfigParser

    (config,) = re.findall(r"```json\n(.*?)```", section("Few labels in MONAI"), re.DOTALL)
    parser = ConfigParser(json.loads("{" + config.replace("100", "2").replace("2000", "4") + "}"))
    image, label = batch(n=4)
    parser["network"], parser["device"], parser["example"] = UNet(), torch.device("cpu"), image
    parser["train_loader"] = parser["val_loader"] = [{"image": image, "label": label[:, None]}] * 3
    parser["unlabelled_loader"] = [image] * 2
    parser.parse()
    parser.get_parsed_content("trainer").run()
    semi = parser.get_parsed_content("semi")
    assert semi.calls == 6
    assert parser.get_parsed_content("evaluator").network is semi.average


def test_accelerates_section_runs_in_one_process_too_on_a_gpu_if_there_is_one(tmp_path, monkeypatch):
    accelerate = pytest.importorskip("accelerate")
    # a Trainer that ran before in this process has set its precision for all that come after
    monkeypatch.setattr(accelerate.state.AcceleratorState, "_shared_state", {})
    monkeypatch.chdir(tmp_path)
    whole = worker.Run(0)
    code = code_after_the_diff("Accelerate")
    whole.execute(code, sampler=False, Accelerator=accelerate.Accelerator)
    assert len(whole.losses) == 18
    longer = worker.Run(7)
    found = longer.execute(
        code.replace("range(first, 3)", "range(first, 4)"), sampler=False, Accelerator=accelerate.Accelerator
    )
    assert (longer.fits, len(longer.losses), found["calls"]) == (0, 6, 24)


def test_every_section_is_in_the_table_and_every_link_leads_somewhere():
    text = PAGE.read_text()
    titles = re.findall(r"^##+ (.*)$", text, re.MULTILINE)
    anchors = {re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-") for title in titles}
    for target in re.findall(r"\]\(([^)]+)\)", text):
        path, _, anchor = target.partition("#")
        assert path.startswith("http") or (PAGE.parent / path).exists(), target
        assert path or anchor in anchors, target
