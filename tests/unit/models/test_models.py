"""The reference networks: what they are, how large, and that each of them trains, is saved and comes back."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import hpcavg
from hpcavg import models
from hpcavg.checkpoints import store
from hpcavg.cli import parsers
from hpcavg.config.options import Config
from hpcavg.errors import InputError
from hpcavg.models import counting, dense, dual_path, inception, mobile, nin, residual

MODELS_PAGE = Path(hpcavg.__file__).parents[1] / "docs" / "models.md"
IMAGENET = (3, 224, 224)


def built(name, shape=None, num_classes=None, seed=3):
    network = models.NETWORKS[name]
    torch.manual_seed(seed)
    return models.build(name, shape or network.input_shape, num_classes or network.num_classes)


def on_meta(function, *arguments, **options):
    """Return a network without memory."""
    with torch.device("meta"):
        return function(*arguments, **options)


def counts(model, shape):
    return counting.num_parameters(model), counting.multiply_adds(model, shape)


@pytest.mark.parametrize("name", models.NETWORKS)
def test_a_network_trains_is_the_same_for_the_same_seed_and_comes_back_from_its_file(name, tmp_path):
    network = models.NETWORKS[name]
    model = built(name)
    state = model.state_dict()
    again = built(name)
    assert all(torch.equal(value, state[key]) for key, value in again.state_dict().items())

    inputs, targets = torch.randn(2, *network.input_shape), torch.tensor([0, 1])
    output = model(inputs)
    assert output.shape == (2, network.num_classes)
    cross_entropy(output, targets).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert all(p.grad.any() for p in model.parameters())  # every layer takes part

    store.save_model(tmp_path / "model.safetensors", state)
    again.load_state_dict(store.load_model(tmp_path / "model.safetensors"))
    image = inputs[:1]
    with torch.no_grad():
        assert torch.equal(model.eval()(image), again.eval()(image))


@pytest.mark.parametrize("name", models.NETWORKS)
def test_the_table_and_the_documentation_hold_the_counts_of_the_module(name):
    network = models.NETWORKS[name]
    model = on_meta(models.build, name, network.input_shape, network.num_classes)
    assert counts(model, network.input_shape) == (network.num_parameters, network.multiply_adds)
    shape = "x".join(map(str, network.input_shape))
    row = f"| {name} | {shape}, {network.num_classes} | {network.num_parameters:,} | {network.multiply_adds:,} |"
    assert row in MODELS_PAGE.read_text()


def test_published_counts():
    """Where the form is a paper's own, or differs from it by layers that can be counted by hand."""
    stem, norm = 7 * 7 * 3 * 64, 2 * 64  # of ImageNet's forms, and 3 x 3 x 3 x 64 of ours
    small_stem = 3 * 3 * 3 * 64
    # He et al. 2016: ResNet-20 has 0.27 M parameters; ResNet-18 takes 1.8e9 FLOPs, ResNet-50 3.8e9 where the first 1x1
    # convolution of a stage halves the image, which saves three quarters of three such convolutions.
    assert models.NETWORKS["resnet20"].num_parameters == 269_722
    assert models.NETWORKS["resnet18-imagenet"].num_parameters == 11_689_512
    assert models.NETWORKS["resnet50-imagenet"].num_parameters == 25_557_032
    saved = sum(
        pixels**2 * channels * channels // 2 * 3 // 4 for channels, pixels in ((256, 56), (512, 28), (1024, 14))
    )
    assert models.NETWORKS["resnet50-imagenet"].multiply_adds - saved == 3_857_973_248
    # Xie et al. 2017: 34.4 M and 68.1 M
    sizes = [on_meta(residual.resnext29, (3, 32, 32), 10, cardinality=c) for c in (8, 16)]
    assert [counting.num_parameters(model) for model in sizes] == [34_426_698, 68_155_210]
    # Simonyan and Zisserman 2015: 138 M and 144 M, with three linear layers and no BatchNorm
    linear = 512 * 7 * 7 * 4096 + 4096 + 4096 * 4096 + 4096 + 4096 * 1000 + 1000
    for name, channels, published in (("vgg16", 4224, 138_357_544), ("vgg19", 5504, 143_667_240)):
        ours = models.NETWORKS[name].num_parameters - (512 * 10 + 10) - 2 * channels
        assert ours + linear == published
    # Howard et al. 2017: 4.2 M, 569 M multiply-adds; our stem has stride 1, so images of half the size pass as theirs
    model = on_meta(mobile.mobilenet, (3, 112, 112), 1000)
    assert counts(model, (3, 112, 112)) == (4_231_976, 568_740_352)
    # Sandler et al. 2018: 3.4 M, which leaves out BatchNorm, 300 M multiply-adds
    model = on_meta(mobile.mobilenetv2, IMAGENET, 1000, early_stride=2)
    assert counts(model, IMAGENET) == (3_504_872, 300_774_272)
    assert sum(p.numel() for p in model.parameters() if p.dim() > 1) == 3_469_760
    # Huang et al. 2017: DenseNet-121 on ImageNet
    ours = counting.num_parameters(on_meta(dense.densenet121, (3, 56, 56), 1000))
    assert ours - small_stem + stem + norm == 7_978_856
    # Chen et al. 2017: 37.8 M, with BatchNorm's statistics, 6.5e9 FLOPs
    model = on_meta(dual_path.dpn92, (3, 56, 56), 1000)
    num_parameters, multiply_adds = counts(model, (3, 56, 56))
    assert num_parameters - small_stem + stem == 37_668_392
    assert multiply_adds + 112**2 * stem - 56**2 * small_stem == 6_501_684_224
    # Szegedy et al. 2015: the convolutions of the nine modules as table 1 has them, with biases in place of BatchNorm
    model = on_meta(inception.googlenet, (3, 28, 28), 1000)
    convs = [m for part in model.modules() if isinstance(part, inception.Inception) for m in part.modules()]
    modules = sum(m.weight.numel() + m.out_channels for m in convs if isinstance(m, nn.Conv2d))
    stem_convs = (stem + 64) + (64 * 64 + 64) + (3 * 3 * 64 * 192 + 192)
    assert modules + stem_convs + 1024 * 1000 + 1000 == 6_998_552
    # Lin et al. 2013: 0.97 M
    norms = [m for m in on_meta(nin.nin, (3, 32, 32), 10).modules() if isinstance(m, nn.BatchNorm2d)]
    assert models.NETWORKS["nin"].num_parameters - sum(m.num_features for m in norms) == 966_986


@pytest.mark.parametrize("name", models.NETWORKS)
def test_the_smallest_inputs_leave_batchnorm_several_values_also_in_a_batch_of_one(name):
    pixels = models.NETWORKS[name].min_pixels
    if pixels is None:
        assert on_meta(models.build, name, (2000,), 3)(torch.empty(1, 2000, device="meta")).shape == (1, 3)
        return
    if len(models.NETWORKS[name].input_shape) == 2:
        shape, small, kind = (1, pixels), (2, pixels - 1), f"signals of 2x{pixels - 1}"
    else:
        pixels = max(pixels, 2)
        shape, small, kind = (1, pixels, pixels + 1), (2, pixels, 0), f"images of 2x{pixels}x0"
    assert on_meta(models.build, name, shape, 3)(torch.empty(1, *shape, device="meta")).shape == (1, 3)
    for odd, says in ((small, f"{kind}; {name} takes those of"), ((40,), "inputs of shape 40; ")):
        with pytest.raises(InputError, match=f"^model='{name}': must be a network for {says}"):
            models.build(name, odd, 3)


def test_what_is_said_of_an_unknown_name_and_of_images_too_small():
    with pytest.raises(InputError, match="must be one of logistic, mlp, cnn, cnn1d, resnet1d, nin, vgg16"):
        models.build("fancy", (3, 32, 32), 10)
    with pytest.raises(InputError) as caught:
        models.build("vgg16", (1, 8, 8), 10)
    line = "--model vgg16: must be a network for images of 1x8x8; vgg16 takes those of 32x32 and more"
    assert caught.value.as_option() == line
    with pytest.raises(InputError) as caught:
        models.build("cnn", (1, 40), 10)
    assert caught.value.as_option() == "--model cnn: must be a network for inputs of shape 1x40; cnn takes images"
    assert Config(model="resnet18_imagenet").model == "resnet18-imagenet"


def test_two_classes_of_logistic_regression_share_one_vector():
    """Cross entropy over (0, w.x + b) is log(1 + exp(-s (w.x + b))), s = -1 or 1, and starts at log 2."""
    model = built("logistic", (5,), 2)
    assert counting.num_parameters(model) == 6
    x, y = torch.randn(7, 5, dtype=torch.float64), torch.tensor([0, 1, 1, 0, 1, 0, 0])
    model = model.double()
    assert cross_entropy(model(x), y).item() == pytest.approx(0.6931471805599453)
    with torch.no_grad():
        model.linear.weight.normal_()
        model.linear.bias.fill_(0.3)
    margins = (2 * y - 1) * (x @ model.linear.weight[0] + 0.3)
    assert torch.allclose(cross_entropy(model(x), y), torch.nn.functional.softplus(-margins).mean())


def test_half_precision_and_channels_last():
    """Nothing in a network depends on dtype or layout: outputs are float32's, as far as the dtype carries."""
    for name in ("logistic", "nin", "resnet20", "googlenet", "densenet121", "dpn92", "mobilenetv2"):
        network = models.NETWORKS[name]
        model = built(name).eval()
        inputs = torch.randn(2, network.input_shape[0], *2 * [network.min_pixels or 8])
        with torch.no_grad():
            expected = model(inputs)
            found = model.to(memory_format=torch.channels_last)(inputs.to(memory_format=torch.channels_last))
            with torch.autocast("cpu", torch.bfloat16):
                half = model(inputs)
        scale = expected.abs().max() + 1e-9
        assert (found - expected).abs().max() <= 1e-4 * scale
        assert (half.float() - expected).abs().max() <= 0.1 * scale


def test_the_list_of_the_command_line():
    lines = models.describe().splitlines()
    assert [line.split()[0] for line in lines] == ["network", *models.NETWORKS]
    assert len({line.index(line.split()[4]) + len(line.split()[4]) for line in lines}) == 1
    assert max(map(len, lines)) <= 120
    for arguments in (["--model", "help"], ["--steps", "3", "--model=help"]):
        assert parsers.wants_help(arguments)
        assert parsers.listing(arguments) == models.describe()
    for arguments in ([], ["--model"], ["--model", "cnn"], ["--output", "help"]):
        assert not parsers.wants_help(arguments)
    text = parsers.train_parser().format_help()
    assert re.search(r"--model help lists\s+them\s+\[cnn\]", text)
    assert "dpn92" not in text


def test_the_list_needs_neither_torch_nor_mpi():
    command = [sys.executable, "-X", "importtime", "-m", "hpcavg", "--model", "help"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout == models.describe() + "\n"
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert "hpcavg.models" in imported
    assert not imported & {"torch", "mpi4py.MPI", "numpy"}
