"""Chains that are folded give the network's features, and only those are that nothing sees inside."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import UNet, batch
from torch import Tensor, nn

from reseg_loss import FeatureExtractor, ReSegError, ReSegWrapper, Tap
from reseg_loss.fold import FoldedConv, find_chains, folded


def fold(body: nn.Module, example: Tensor, taps: list[Tap], dtype: torch.dtype) -> tuple[nn.Module, int]:
    """The folded network, and the number of its chains."""
    chains = find_chains(body, example, taps)
    return folded(body, chains, dtype), len(chains)


class Chains(nn.Module):
    """Chains of every kind, each of which may be folded or not, by its name."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        for name in ("plain", "biased", "affineless", "tapped", "between", "entered", "hooked", "shared_twice",
                     "branched", "returned"):  # fmt: skip
            conv = nn.Conv2d(4, 4, 3, padding=1, bias=name == "biased")
            norm = nn.BatchNorm2d(4, affine=name != "affineless")
            self.add_module(name, nn.Sequential(conv, norm, nn.ReLU(inplace=name == "plain")))
        self.reflected = nn.Sequential(
            nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(4), nn.ReLU()
        )
        self.relu = nn.ReLU(inplace=True)
        self.residual = nn.Sequential(
            nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        )
        self.batch_stats = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU())
        self.hooked[1].register_forward_hook(lambda module, args, output: 2 * output)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d) and module.running_var is not None:
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
                if module.affine:
                    module.weight.data.normal_()
                    module.bias.data.normal_()

    def forward(self, x: Tensor) -> Any:
        for name in (
            "plain",
            "biased",
            "affineless",
            "reflected",
            "batch_stats",
            "tapped",
            "between",
            "entered",
            "hooked",
        ):
            x = getattr(self, name)(x)
        # one activation in two places, as in a residual block
        x = self.relu(self.residual[1](self.residual[0](x)))
        x = self.relu(x + self.residual[3](self.residual[2](x)))
        x = self.shared_twice(self.shared_twice(x))
        y = self.branched[1](z := self.branched[0](x))
        x = self.branched[2](y) + z
        return x, self.returned[2](w := self.returned[1](self.returned[0](x))), w


def test_only_chains_that_nothing_sees_inside_are_folded_and_the_outputs_are_the_same():
    torch.manual_seed(0)
    model = Chains().eval()
    x = torch.randn(2, 4, 8, 8)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    taps = [Tap("tapped.1"), Tap("between.0"), Tap("entered.1", is_input=True)]
    copy, count = fold(model, x, taps, torch.float32)
    relu = {name: module.relu for name, module in copy.named_modules() if isinstance(module, FoldedConv)}
    whole, without = ("plain.0", "biased.0", "affineless.0"), ("tapped.0", "residual.0", "residual.2", "returned.0")
    assert relu == dict.fromkeys(whole, True) | dict.fromkeys(without, False)
    assert count == len(relu)
    assert copy.reflected[0].weight is model.reflected[0].weight  # no second one in memory
    with torch.no_grad():
        for a, b in zip(model(x), copy(x)):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("inplace", [False, True])
def test_taps_on_the_activation_itself_are_read_from_a_folded_chain(inplace):
    torch.manual_seed(0)
    model = UNet().eval()
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = inplace
    taps = {"encoder": ["encoder.1.2"], "decoder": ["decoder.1.2"], "bottleneck": "bottleneck.2"}
    image = batch()[0]
    extractor = FeatureExtractor(model, taps, image, when="always").attach()
    model(image)
    expected = extractor.pop()
    extractor.enabled = False
    copy, count = fold(model, image, extractor.taps, torch.float32)
    assert count == 7
    with torch.no_grad():
        found = FeatureExtractor(copy, extractor.plan, when="always").attach().features_of(lambda: copy(image))
    torch.testing.assert_close([*found.encoder, *found.decoder, found.bottleneck],
                               [*expected.encoder, *expected.decoder, expected.bottleneck])  # fmt: skip


def test_a_folded_teacher_gives_the_loss_of_low_precision_and_follows_a_loaded_state():
    image, label = batch()
    settings: dict[str, Any] = {"preset": "paper", "weight": 1.0, "teacher_dtype": torch.bfloat16}
    losses = []
    for fold in (False, True):
        torch.manual_seed(0)
        model = UNet()
        torch.manual_seed(1)
        reseg = ReSegWrapper(model, example_input=image, fold_teacher=fold, **settings)
        reseg.freeze_teacher()
        keys = list(reseg.teacher.state_dict())
        torch.manual_seed(2)
        other = ReSegWrapper(model, example_input=image, fold_teacher=fold, **settings)
        other.freeze_teacher()
        for parameter in other.teacher.parameters():
            parameter.mul_(2)
        state = other.state_dict()
        other.remove()
        for _ in range(2):
            model(image)
            losses.append(reseg.alignment_loss(label).item())
            made = reseg._parts.targets._folded
            assert (made is not None) is fold
            reseg.load_state_dict(state)
        assert list(reseg.teacher.state_dict()) == keys
    assert losses[2:] == pytest.approx(losses[:2], rel=1e-2)
    assert abs(losses[0] - losses[1]) > 0.1 * losses[0]


def test_folding_and_compiling_exclude_each_other():
    with pytest.raises(ReSegError, match="choose one"):
        ReSegWrapper(UNet(), compile_teacher=True, fold_teacher=True)


class Blocks(nn.Module):
    """Blocks that end within a chain, as a residual branch whose activation comes after it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1))
        self.norm = nn.Sequential(nn.BatchNorm2d(4))
        self.relu = nn.Sequential(nn.ReLU())
        self.branch = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))
        self.after = nn.ReLU()
        for norm in (self.norm[0], self.branch[1]):
            norm.running_mean.normal_()

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.branch(self.relu(self.norm(self.conv(x)))))


@pytest.mark.parametrize("tap", ["conv", "in:norm", "norm", "in:relu", "relu", "branch", "in:after"])
def test_what_a_block_returns_or_takes_in_is_what_it_was_where_the_block_ends_within_a_chain(tap):
    torch.manual_seed(0)
    model, x, tap = Blocks().eval(), torch.randn(2, 3, 8, 8), Tap.parse(tap)
    seen = []
    for network in (model, fold(model, x, [tap], torch.float32)[0]):
        module = network.get_submodule(tap.module)
        module.register_forward_hook(lambda _, args, output: seen.append((args[0] if tap.is_input else output).clone()))
        with torch.no_grad():
            network(x)
    torch.testing.assert_close(*seen, rtol=1e-4, atol=1e-5)


class Careful(nn.Module):
    """A network with a part that it does not want in autocast."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
        self.last = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return self.last(self.part(x.float()).mean((2, 3)))


def test_a_part_without_autocast_stays_in_the_dtype_of_its_input():
    torch.manual_seed(0)
    model, x = Careful().eval(), torch.randn(2, 3, 8, 8)
    copy, count = fold(model, x, [], torch.bfloat16)
    assert count == 1
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected, found = model(x), copy(x)
    assert found.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("mean", [0.0, 20.0])
def test_a_folded_convolution_is_within_twice_the_error_of_the_three_in_low_precision(mean, relu):
    errors = []
    for seed in range(8):
        torch.manual_seed(seed)
        conv, norm = nn.Conv2d(16, 24, 3, padding=1), nn.BatchNorm2d(24)
        x = torch.randn(2, 16, 20, 20) + mean
        conv.eval(), norm.train()
        with torch.no_grad():
            norm.momentum = None
            norm(conv(x))  # the statistics of such inputs
            norm.weight.uniform_(0.5, 2), norm.bias.normal_()
            chain = nn.Sequential(conv, norm, nn.ReLU() if relu else nn.Identity()).eval()
            with torch.autocast("cpu", torch.bfloat16):
                found, naive = FoldedConv(conv, norm, relu, torch.bfloat16)(x), chain(x)
            exact = chain.double()(x.bfloat16().double())
        assert found.dtype == naive.dtype == torch.bfloat16
        errors.append([float((y.double() - exact).norm()) for y in (found, naive)])
    ours, theirs = torch.tensor(errors).mean(0)
    assert ours <= 2 * theirs


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_fused_operation_on_cuda_reads_no_uninitialised_memory_and_agrees(dtype, relu):
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    chain = nn.Sequential(conv, norm, nn.ReLU() if relu else nn.Identity()).eval().double().cuda()
    fused = FoldedConv(chain[0], chain[1], relu, dtype).cuda()
    x = torch.randn(8, 16, 56, 56, device="cuda")
    expected = chain(x.double()).detach()
    poison = torch.full_like(expected, float("nan"), dtype=dtype, memory_format=torch.channels_last)
    del poison  # the output takes its place
    with torch.autocast("cuda", dtype):
        found = fused(x.contiguous(memory_format=torch.channels_last))
    assert found.isfinite().all()
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert float((found.double() - expected).norm() / expected.norm()) < 1e-2


class Tied(UNet):
    """The deepest decoder block's input goes through the weight of a convolution of the encoder."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.encoder[2][0].weight

        def there_and_back(module: nn.Module, args: Any, y: Tensor) -> Tensor:
            return nn.functional.conv2d(nn.functional.conv_transpose2d(y, weight, padding=1), weight, padding=1)

        handle = self.up[0].register_forward_hook(there_and_back)
        try:
            return super().forward(x)
        finally:
            handle.remove()


class Asking(UNet):
    """Its forward reads an attribute of a convolution."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.expand(-1, self.encoder[0][0].in_channels, -1, -1))


@pytest.mark.parametrize("network", [Tied, Asking, UNet])
def test_a_teacher_that_reads_its_weights_elsewhere_runs_unfolded(network, caplog):
    image, label = batch(4)
    values = []
    for fold in (False, True):
        torch.manual_seed(0)
        model = network()
        reseg = ReSegWrapper(model, example_input=image, preset="paper", teacher_dtype="bfloat16", fold_teacher=fold)
        for module in reseg.teacher.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_var.fill_(0.05)
        reseg.freeze_teacher()
        model(image)
        values.append(torch.stack([*reseg.alignment_loss(label, components=True).values()]))
        assert reseg._parts.targets._folded is None or fold
    unfolded = "the teacher cannot be folded and runs as it is" in caplog.text
    assert unfolded is (network is not UNet)
    if unfolded:
        assert torch.equal(*values)
    else:
        torch.testing.assert_close(*values, rtol=0.02, atol=0)
        assert not torch.equal(*values)
