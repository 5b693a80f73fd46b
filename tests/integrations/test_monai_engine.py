"""MONAI's engine, run for real: stage 1, steps, checkpoints, a killed run and its resumption, a bundle's config."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import UNet, batch, task_loss
from torch import Tensor

from reseg_loss import DeepSupervision, ReSegError, ReSegWrapper, SemiSupervised
from reseg_loss.integrations.monai import DeepSupervisionHandler, ReSegHandler, SemiSupervisedHandler

pytest.importorskip("ignite")
monai = pytest.importorskip("monai")

from ignite.engine import Engine, Events  # noqa: E402
from monai.bundle import ConfigParser  # noqa: E402
from monai.data import DataLoader, Dataset  # noqa: E402
from monai.engines import SupervisedEvaluator, SupervisedTrainer  # noqa: E402
from monai.handlers import CheckpointLoader, CheckpointSaver, MeanDice  # noqa: E402
from monai.losses import DiceCELoss  # noqa: E402
from monai.networks.nets import UNet as MonaiUNet  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("default"),  # the framework's own are many
    pytest.mark.filterwarnings("error:::reseg_loss"),
    pytest.mark.filterwarnings("ignore:the teacher's reconstruction loss"),
]
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")


def dice_ce(logits: Tensor, label: Tensor) -> Tensor:
    return DiceCELoss(to_onehot_y=True, softmax=True)(logits, label)


class Parts:
    """All objects of a run, newly made."""

    def __init__(self, seed: int = 0, dims: int = 2, **kwargs: Any) -> None:
        torch.manual_seed(seed)
        image, _ = batch(dims=dims)
        self.net = MonaiUNet(dims, 1, 3, (4, 8, 16, 32), (2, 2, 2), act="relu").to(DEVICE)
        self.reseg = ReSegWrapper(self.net, **{"weight": 1.0, **kwargs})
        self.ds = DeepSupervision(self.net, image.to(DEVICE))
        self.optimizer = torch.optim.SGD([*self.net.parameters(), *self.ds.parameters()], 0.05, momentum=0.9)
        self.losses: list[Tensor] = []
        image, label = batch(n=6, dims=dims)
        data = [{"image": x, "label": y[None]} for x, y in zip(image, label)]
        self.loader = DataLoader(Dataset(data), batch_size=2)

    def saved(self, trainer: Any) -> dict[str, Any]:
        return {"net": self.net, "optimizer": self.optimizer, "reseg": self.reseg, "ds": self.ds, "trainer": trainer}

    def run(self, folder: Path, *, epochs: int = 3, resume: bool = False, **kwargs: Any) -> SupervisedTrainer:
        mine = [ReSegHandler(self.reseg, steps=4, progress=False), DeepSupervisionHandler(self.ds)]
        trainer = SupervisedTrainer(
            DEVICE, epochs, self.loader, self.net, self.optimizer, dice_ce, train_handlers=mine, **kwargs
        )
        CheckpointSaver(str(folder), self.saved(trainer), save_interval=1, n_saved=1).attach(trainer)
        if resume:
            (file,) = folder.glob("*.pt")
            CheckpointLoader(str(file), self.saved(trainer)).attach(trainer)  # after ours, on purpose
        trainer.add_event_handler(Events.ITERATION_COMPLETED, self.note)
        trainer.run()
        return trainer

    def note(self, engine: Any) -> None:
        self.losses.append(torch.as_tensor(engine.state.output[0]["loss"]).detach().cpu())


def same(a: Any, b: Any) -> bool:
    """To the bit; on a GPU, which adds in any order, nearly."""
    pairs = list(zip(a, b, strict=True))
    return all(torch.allclose(x, y, rtol=1e-3, atol=1e-4) if CUDA else torch.equal(x, y) for x, y in pairs)


@pytest.fixture(autouse=True)
def _same_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


class KilledError(Exception):
    pass


@pytest.mark.parametrize("dims", [2, 3])
def test_a_killed_run_goes_on_as_if_it_had_not_been(tmp_path, monkeypatch, dims):
    fits = []
    original = ReSegWrapper.fit_recon
    monkeypatch.setattr(ReSegWrapper, "fit_recon", lambda self, *a, **k: fits.append(original(self, *a, **k)))
    whole = Parts(dims=dims, preset="standardized")
    whole.run(tmp_path / "whole")
    assert len(whole.losses) == 9

    cut = Parts(dims=dims, preset="standardized")
    note = cut.note

    def kill(engine: Any) -> None:
        note(engine)
        if len(cut.losses) == 8:
            raise KilledError

    monkeypatch.setattr(cut, "note", kill)
    with pytest.raises(KilledError):
        cut.run(tmp_path / "cut")
    assert len(fits) == 2
    fresh = Parts(seed=7, dims=dims)
    fresh.run(tmp_path / "cut", resume=True)
    assert len(fits) == 2, "the teacher came from the checkpoint"
    assert same(fresh.losses, whole.losses[6:])
    for name in ("net", "ds"):
        assert same(getattr(fresh, name).parameters(), getattr(whole, name).parameters())
    assert same(fresh.reseg.teacher.state_dict().values(), whole.reseg.teacher.state_dict().values())
    assert fresh.reseg.calls == whole.reseg.calls == 9


def test_the_engines_step_is_the_plain_loops_step(tmp_path):
    engine = Parts()
    engine.run(tmp_path, epochs=1)
    plain = Parts()
    plain.reseg.fit_recon(plain.loader, steps=4, progress=False)
    losses = []
    for part in plain.loader:
        image, label = part["image"].to(DEVICE), part["label"].to(DEVICE)
        loss = dice_ce(plain.net(image), label) + plain.reseg.alignment_loss(label) + plain.ds.loss(label, dice_ce)
        plain.optimizer.zero_grad()
        loss.backward()
        plain.optimizer.step()
        losses.append(loss.detach().cpu())
    assert same(engine.losses, losses)
    assert same(engine.net.parameters(), plain.net.parameters())


def test_the_checkpoint_has_the_bare_networks_keys(tmp_path):
    parts = Parts()
    parts.run(tmp_path, epochs=1)
    (file,) = tmp_path.glob("*.pt")
    state = torch.load(file, weights_only=True)
    torch.manual_seed(0)
    bare = MonaiUNet(2, 1, 3, (4, 8, 16, 32), (2, 2, 2), act="relu")
    assert list(state["net"]) == list(bare.state_dict())
    bare.load_state_dict(state["net"])


@pytest.mark.parametrize(
    "kwargs", [{"amp": True, "amp_kwargs": {"dtype": torch.bfloat16}}, {"accumulation_steps": 3}], ids=["amp", "acc"]
)
def test_amp_and_accumulation_count_every_batch(tmp_path, kwargs):
    if not kwargs.keys() <= inspect.signature(SupervisedTrainer).parameters.keys():
        pytest.skip("this MONAI's trainer does not accumulate gradients")
    parts = Parts()
    parts.run(tmp_path, epochs=1, **kwargs)
    assert parts.reseg.calls == parts.ds.calls == 3
    assert all(loss.isfinite() for loss in parts.losses)


@pytest.mark.parametrize("example", [None, batch()[0]], ids=["taps found in stage 1", "taps found before"])
def test_a_trainer_that_compiles_is_served(tmp_path, example):
    parts = Parts()
    parts.reseg = ReSegWrapper(parts.net, example_input=None if example is None else example.to(DEVICE))
    parts.run(tmp_path, epochs=1, compile=True, compile_kwargs={"backend": "eager"})
    assert parts.reseg.calls == parts.ds.calls == 3


def test_at_weight_0_there_is_no_stage_1_and_the_run_is_a_bare_one(tmp_path):
    def run(handlers: Any) -> list[Tensor]:
        torch.manual_seed(0)
        net = UNet().to(DEVICE)
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        loader = [{"image": image, "label": label} for image, label in [batch()] * 3]
        trainer = SupervisedTrainer(DEVICE, 1, loader, net, optimizer, task_loss, train_handlers=handlers(net))
        trainer.run()
        return list(net.parameters())

    assert same(run(lambda net: [ReSegHandler(ReSegWrapper(net, weight=0.0))]), run(lambda net: []))


@pytest.mark.parametrize("weight", [1.0, 0.0])
@pytest.mark.parametrize("name", ["reseg", "ds"])
def test_handlers_of_another_network_are_refused_before_stage_1(name, weight, monkeypatch):
    fits = []
    monkeypatch.setattr(ReSegWrapper, "fit_recon", lambda self, *a, **k: fits.append(self))
    own, other = Parts(), Parts(seed=1)
    getattr(other, name).weight = weight
    handlers = {"reseg": ReSegHandler(other.reseg, steps=4), "ds": DeepSupervisionHandler(other.ds)}
    trainer = SupervisedTrainer(DEVICE, 1, own.loader, own.net, own.optimizer, dice_ce, train_handlers=[handlers[name]])
    message = rf"{type(handlers[name]).__name__} is for another model than the trainer's network: build .* same model"
    with pytest.raises(ReSegError, match=message):
        trainer.run()
    assert not fits


def test_a_network_that_has_the_model_inside_is_served(tmp_path):
    class Scaled(torch.nn.Module):
        def __init__(self, net: torch.nn.Module) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            return self.net(2 * x)

    parts = Parts()
    parts.net = Scaled(parts.net)
    parts.run(tmp_path, epochs=1)
    assert parts.reseg.calls == parts.ds.calls == 3


def test_an_engine_without_the_event_is_refused():
    with pytest.raises(ReSegError, match="no event LOSS_COMPLETED"):
        ReSegHandler(ReSegWrapper(UNet())).attach(Engine(lambda engine, x: None))


CONFIG = {
    "imports": ["$import torch", "$import monai"],
    "device": "$torch.device('cuda' if torch.cuda.is_available() else 'cpu')",
    "network_def": {
        "_target_": "UNet", "spatial_dims": 2, "in_channels": 1, "out_channels": 3,
        "channels": [4, 8, 16, 32], "strides": [2, 2, 2],
    },
    "network": "$@network_def.to(@device)",
    "example": "$torch.zeros(1, 1, 16, 16, device=@device)",
    "loss": {"_target_": "DiceCELoss", "to_onehot_y": True, "softmax": True},
    "reseg": {"_target_": "reseg_loss.ReSegWrapper", "model": "@network", "preset": "standardized"},
    "ds": {
        "_target_": "reseg_loss.DeepSupervision", "model": "@network", "num_classes": 3, "example_input": "@example",
    },
    "optimizer": {
        "_target_": "torch.optim.Adam", "params": "$[*@network.parameters(), *@ds.parameters()]", "lr": 0.001,
    },
    "handlers": [
        {"_target_": "reseg_loss.integrations.monai.ReSegHandler", "reseg": "@reseg", "steps": 2, "progress": False},
        {"_target_": "reseg_loss.integrations.monai.DeepSupervisionHandler", "ds": "@ds"},
        {
            "_target_": "CheckpointSaver", "save_dir": "@folder", "save_final": True,
            "save_dict": {"net": "@network", "optimizer": "@optimizer", "reseg": "@reseg", "ds": "@ds"},
        },
    ],
    "trainer": {
        "_target_": "SupervisedTrainer", "device": "@device", "max_epochs": 1, "train_data_loader": "@loader",
        "network": "@network", "optimizer": "@optimizer", "loss_function": "@loss", "train_handlers": "@handlers",
    },
}  # fmt: skip


def test_a_bundles_config_constructs_it(tmp_path):
    parser = ConfigParser()
    parser.read_config(json.loads(json.dumps(CONFIG)))
    parser["loader"] = Parts().loader
    parser["folder"] = str(tmp_path)
    parser.parse()
    trainer = parser.get_parsed_content("trainer")
    trainer.run()
    assert parser.get_parsed_content("reseg").calls == parser.get_parsed_content("ds").calls == 3
    (file,) = tmp_path.glob("*.pt")
    assert set(torch.load(file, weights_only=True)) == {"net", "optimizer", "reseg", "ds"}


def test_a_run_killed_in_stage_1_does_not_go_on_with_half_a_teacher(tmp_path, monkeypatch):
    parts = Parts()
    saver = CheckpointSaver(str(tmp_path), {"reseg": parts.reseg}, save_final=True)  # it saves on exceptions, too

    def killed(self: Any) -> None:
        raise KilledError

    monkeypatch.setattr(ReSegWrapper, "freeze_teacher", killed)
    trainer = SupervisedTrainer(
        DEVICE, 1, parts.loader, parts.net, parts.optimizer, dice_ce,
        train_handlers=[ReSegHandler(parts.reseg, steps=2, progress=False), saver],
    )  # fmt: skip
    with pytest.raises(KilledError):
        trainer.run()
    monkeypatch.undo()
    (file,) = tmp_path.glob("*.pt")
    fresh = Parts(seed=7)
    fresh.reseg.load_state_dict(torch.load(file, weights_only=True))
    assert not fresh.reseg.ready
    fresh.run(tmp_path / "again", epochs=1)
    assert fresh.reseg.ready


# --- few labels


def unlabelled_images() -> list[Tensor]:
    return [*batch(n=10, seed=1)[0].split(4)]  # 4, 4 and 2


class FewLabels:
    """A trainer with unlabelled images, newly made."""

    def __init__(self, epochs: int = 1, handlers: Any = (), task_loss: Any = None, **kwargs: Any) -> None:
        torch.manual_seed(0)
        self.net = MonaiUNet(2, 1, 3, (4, 8, 16, 32), (2, 2, 2)).to(DEVICE)
        image, label = batch(n=8)
        options = {"rampup_steps": None, "threshold": 0.35, "task_loss": task_loss}
        self.semi = SemiSupervised(self.net, image[:2].to(DEVICE), **options)
        self.optimizer = torch.optim.SGD([*self.net.parameters(), *self.semi.parameters()], 0.05, momentum=0.9)
        self.loader = DataLoader(Dataset([{"image": x, "label": y[None]} for x, y in zip(image, label)]), batch_size=2)
        self.handler = SemiSupervisedHandler(self.semi, unlabelled_images())
        self.outputs: list[Any] = []
        arguments = {"loss_function": self.semi.loss, "train_handlers": [self.handler, *handlers], **kwargs}
        self.trainer = SupervisedTrainer(DEVICE, epochs, self.loader, self.net, self.optimizer, **arguments)

    def run(self) -> FewLabels:
        self.trainer.add_event_handler(
            Events.ITERATION_STARTED, lambda engine: torch.manual_seed(engine.state.iteration)
        )
        self.trainer.add_event_handler(
            Events.ITERATION_COMPLETED, lambda engine: self.outputs.append(engine.state.output)
        )
        self.trainer.run()
        return self


def test_a_step_with_unlabelled_images_is_the_plain_loops_step():
    engine, plain = FewLabels().run(), FewLabels()
    unlabelled = unlabelled_images()
    losses = []
    for step, part in enumerate(plain.loader):
        torch.manual_seed(step + 1)
        loss = plain.semi.loss(part["image"], part["label"], unlabelled[step % 3])
        plain.optimizer.zero_grad()
        loss.backward()
        plain.optimizer.step()
        plain.semi.update()
        losses.append(loss.detach().cpu())
    assert same([torch.as_tensor(out[0]["loss"]).detach().cpu() for out in engine.outputs], losses)
    assert same(engine.net.parameters(), plain.net.parameters())
    assert same(engine.semi.average.state_dict().values(), plain.semi.average.state_dict().values())
    assert engine.semi.stats()["unlabelled"] > 0


def test_the_trainers_output_is_of_the_labelled_images_and_the_trainer_is_left_as_it_was():
    dice = MeanDice(num_classes=3, output_transform=classes)
    few = FewLabels(key_train_metric={"dice": dice}).run()
    for part, out in zip(few.loader, few.outputs):
        assert [tuple(x["pred"].shape) for x in out] == [(3, 16, 16)] * 2
        assert same([x["image"].cpu() for x in out], part["image"])
        assert same([x["label"].cpu() for x in out], part["label"])
    assert 0 <= few.trainer.state.metrics["dice"] <= 1
    assert few.trainer.loss_function == few.semi.loss
    few.semi.update()  # nobody else calls it now
    few.trainer.state.max_epochs = 2
    few.trainer.run()
    assert few.semi.calls == 8


def classes(output: Any) -> Any:
    return [x["pred"].argmax(0, keepdim=True) for x in output], [x["label"] for x in output]


def test_the_mean_teacher_follows_after_each_step_of_the_optimizer(monkeypatch):
    if "accumulation_steps" not in inspect.signature(SupervisedTrainer).parameters:
        pytest.skip("this MONAI's trainer does not accumulate gradients")
    few, seen = FewLabels(accumulation_steps=3), []
    update = few.semi.update
    monkeypatch.setattr(few.semi, "update", lambda: (seen.append(few.semi.calls), update()))
    few.run()
    assert seen == [3, 4]

    class Twice:
        def attach(self, engine: Any) -> None:
            engine.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: few.semi.update())

    few = FewLabels(handlers=[Twice()])
    with pytest.raises(ReSegError, match=r"SemiSupervisedHandler calls update\(\) after each optimizer step"):
        few.run()


@pytest.mark.parametrize(
    "kwargs",
    [{"amp": True, "amp_kwargs": {"dtype": torch.bfloat16}}, {"compile": True, "compile_kwargs": {"backend": "eager"}}],
    ids=["amp", "compile"],
)
def test_amp_and_a_trainer_that_compiles_are_served_with_unlabelled_images(kwargs):
    few = FewLabels(**kwargs).run()
    assert few.semi.calls == 4
    assert all(torch.as_tensor(out[0]["loss"]).isfinite() for out in few.outputs)


def test_the_evaluator_sees_the_mean_teacher_and_saves_its_best(tmp_path):
    few = FewLabels().run()
    dice = MeanDice(num_classes=3, output_transform=classes)
    saver = CheckpointSaver(str(tmp_path), {"net": few.semi.average}, save_key_metric=True)
    seen = []
    evaluator = SupervisedEvaluator(
        DEVICE, few.loader, few.semi.average, key_val_metric={"dice": dice}, val_handlers=[saver]
    )
    evaluator.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: seen.append(engine.state.output[0]["pred"]))
    evaluator.run()
    image = next(iter(few.loader))["image"].to(DEVICE)
    with torch.no_grad():
        assert same([seen[0]], few.semi.average.eval()(image)[:1])
    (file,) = tmp_path.glob("*.pt")
    state = torch.load(file, weights_only=True, map_location=DEVICE)
    assert list(state) == list(few.net.state_dict())
    assert same(state.values(), few.semi.average.state_dict().values())


def test_wrong_uses_with_unlabelled_images_say_what_to_do():
    with pytest.raises(ReSegError, match=r"pass loss_function=semi.loss.*task_loss="):
        FewLabels(loss_function=dice_ce).run()
    other = FewLabels()
    few = FewLabels()
    few.trainer.network = other.net
    with pytest.raises(ReSegError, match="SemiSupervisedHandler is for another model than the trainer's network"):
        few.run()
    for more in ([], [few.handler]):  # alone, and beside the right one
        with pytest.raises(ReSegError, match="SemiSupervisedHandler is for another model than the trainer's network"):
            FewLabels(train_handlers=[*more, other.handler]).run()
    with pytest.raises(ReSegError, match=r"loss_function=semi\.loss of the handler's semi"):
        FewLabels(loss_function=other.semi.loss).run()
    with pytest.raises(ReSegError, match="SemiSupervisedHandler needs a SemiSupervised, got UNet"):
        SemiSupervisedHandler(few.net, unlabelled_images())  # pyright: ignore[reportArgumentType]
    engine = Engine(lambda engine, x: None)
    few.handler.attach(engine)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ReSegError, match=r"call semi.loss in your own update function"):
        engine.run([0])
    with pytest.raises(ReSegError, match="state is of a SemiSupervised, but it is loaded into a SemiSupervisedHandler"):
        few.handler.load_state_dict(few.semi.state_dict())
