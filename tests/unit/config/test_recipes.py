"""The recipes against what the papers say, quoted here apart from them; and how `--config` finds them."""

import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hpcavg import algorithms
from hpcavg.cli import parsers
from hpcavg.config import recipes
from hpcavg.config.sources import from_sources, tomllib
from hpcavg.data.partition import num_batches
from hpcavg.errors import InputError
from hpcavg.training import optimizers

# -- what the papers say ------------------------------------------------------------------------------------------
#
# Beside options, an experiment has: varied, the values that its runs have, as a list of axes that are combined;
# rates, the learning rate in some epochs, counted from 0.

CIFAR10_SAMPLES, EPSILON_SAMPLES = 50_000, 400_000

# Section 4: "Unless noted, the batchsize we use is 64, and the total amount of data we train is 200 epochs. The initial
# learning rate is 0.1, and decreases to 0.01 after 150 epochs."
HIER_AVG = {"batch_size": 64, "momentum": 0, "rates": {0: 0.1, 149: 0.1, 150: 0.01, 199: 0.01}}
HIER_AVG_CIFAR = {**HIER_AVG, "task": "cifar10", "model": "resnet18", "epochs": 200}
# "ResNet-18, GoogLeNet, MobileNet, and VGG19"
HIER_AVG_NETWORKS = ("resnet18", "googlenet", "mobilenet", "vgg19")
# Section 4.4: "with 16 learners", "At the 90-th epoch"
HIER_AVG_IMAGENET = {**HIER_AVG, "task": "imagenet", "epochs": 90, "intended_learners": 16, "crop_size": 224}
# Table 1: "K-AVG 32 - - - 16 94.00%"; "Hier-AVG - 64 2 4 16", "64 4 4 16", "64 16 4 16"; "K-AVG 4 - - - 32";
# "Hier-AVG - 8 4 8 32"; "K-AVG 4 - - - 64"; "Hier-AVG - 8 1 4 64"; columns Kopt, K2, K1, S, P

# Section 4.1: "the same initial learning rate (gamma_0 = 1)", "The batch size is fixed at B = 16. We run for 600 epochs
# with K = 16 for K-AVG"; section 4.2: "after every 50 epochs, gamma is reduced by half", "fixed as B = 32".
K_AVG = {"task": "cifar10", "epochs": 600, "rates": {0: 1, 49: 1, 50: 0.5, 99: 0.5, 100: 0.25, 599: 2**-11}}
K_AVG_LEARNERS = {"intended_learners": (8, 16, 32, 64, 128)}
# "When we set the initial learning rate gamma_0 = 0.1", which is for P = 128
K_AVG_SLOWER = {"intended_learners": (128,), "learning_rate": (0.1,)}
K_AVG_PERIODS = (1, 2, 4, 16, 32, 64)

# Figure 3: "each worker uses a local batch size 32 and momentum 0.9. The initial learning at each worker is 0.1 and is
# divided by 10 when 8 workers together access 150 epochs and 275 epochs of training data."
PR_SGD = {
    **{"task": "cifar10", "model": "resnet20", "intended_learners": 8, "batch_size": 32, "momentum": 0.9},
    "rates": {0: 0.1, 149: 0.1, 150: 0.01, 274: 0.01, 275: 0.001, 299: 0.001},
}

# Section 6: "The learning rate and regularization parameter are 0.01 and 1e-4, respectively, and the mini-batch size is
# 128", "7 epochs on 5 machines", "tau = 91"; "tau as sqrt(T/pb) = 5"; figure 4: "tau_0 = 91 and tau_i = (1 + i alpha)
# tau_0, with alpha = 1.09", "to have 10 rounds of communication".
LUPA = {"task": "epsilon", "model": "logistic", "batch_size": 128, "weight_decay": 1e-4, "rates": {0: 0.01, 6: 0.01}}
LUPA_FIGURE_2 = {**LUPA, "intended_learners": 5, "epochs": 7}

# Section 4.1: "linearly increased from 0.0001 to 0.01 in the first 30% epochs and then decreased from 0.01 to 0.0001 in
# latter 70% epochs", "total training epochs as 50", "The weight decay ... is 0.01. And the momentum of SGD ... is 0.9";
# section 4.2: "All models are trained with 32 workers", "the local batch size B_l is 32", "tau is 4", "d is 1".
DASGD = {
    **{"task": "cifar10", "model": "resnet50", "momentum": 0.9, "weight_decay": 0.01, "batch_size": 32, "epochs": 50},
    "rates": {0: 0.0001, 7.5: 0.00505, 15: 0.01, 32.5: 0.00505, 50: 0.0001},
}
DASGD_CIFAR = {**DASGD, "intended_learners": 32}
DASGD_NETWORKS = [
    {"model": ("googlenet", "vgg16", "resnet50", "resnet101", "densenet121", "mobilenetv2", "resnext29", "dpn92")}
]
# Section 4.4: "increases linearly from 0.0005 to 0.005 in the first 20% epochs and decreases linearly from 0.005 to
# 0.00005 in the last 80% epochs", "20 epochs", "8 workers and the batch size is 256", "tau is 2", "d is 1".
DASGD_IMAGENET = {
    **{"task": "imagenet", "model": "resnet18-imagenet", "momentum": 0.9, "weight_decay": 0.01, "epochs": 20},
    **{"intended_learners": 8, "batch_size": 256 // 8, "crop_size": 224},
    "rates": {0: 0.0005, 2: 0.00275, 4: 0.005, 12: 0.002525, 20: 0.00005},
}


def hier_avg(k1, k2, size, learners):
    return {"algorithm": "hier_avg", "k1": k1, "k2": k2, "group_size": size, "intended_learners": learners}


def k_avg(k, learners):
    return {"algorithm": "k_avg", "k": k, "intended_learners": learners}


DOWNPOUR = {"algorithm": "downpour", "n_push": 16, "n_fetch": 16, "num_servers": 1, "intended_learners": 8}
EAMSGD = {"algorithm": "eamsgd", "tau": 16, "alpha": None, "num_servers": 1, "intended_learners": 8}
SYNC = {"algorithm": "sync_sgd", "variant": "gradients"}

PAPERS = {
    "hier-avg/figure1": HIER_AVG_CIFAR
    | hier_avg(4, 8, 4, 32)
    | {"varied": [{"model": HIER_AVG_NETWORKS, "k2": (8, 16, 32)}]},
    "hier-avg/figure3": HIER_AVG_CIFAR
    | hier_avg(4, 32, 4, 16)
    | {"varied": [{"model": HIER_AVG_NETWORKS, "k1": (4, 8)}]},
    "hier-avg/figure4": HIER_AVG_CIFAR
    | hier_avg(4, 32, 4, 16)
    | {"varied": [{"model": HIER_AVG_NETWORKS, "group_size": (2, 4)}]},
    "hier-avg/figure5-hier-avg": HIER_AVG_IMAGENET | hier_avg(20, 43, 4, 16),
    "hier-avg/figure5-k-avg": HIER_AVG_IMAGENET | k_avg(43, 16),
    "hier-avg/table1-p16-k-avg": HIER_AVG_CIFAR | k_avg(32, 16),
    "hier-avg/table1-p16-k2-64": HIER_AVG_CIFAR | hier_avg(4, 64, 4, 16) | {"varied": [{"k1": (2, 4, 16)}]},
    "hier-avg/table1-p32-k-avg": HIER_AVG_CIFAR | k_avg(4, 32),
    "hier-avg/table1-p32-k2-8": HIER_AVG_CIFAR | hier_avg(4, 8, 8, 32) | {"varied": [{"group_size": (4, 8)}]},
    "hier-avg/table1-p64-k-avg": HIER_AVG_CIFAR | k_avg(4, 64),
    "hier-avg/table1-p64-k2-8": HIER_AVG_CIFAR | hier_avg(1, 8, 4, 64),
    **{
        f"k-avg/figure{figure}-{name}": K_AVG
        | averaging
        | {"model": model, "batch_size": 16, "momentum": momentum, "varied": [K_AVG_LEARNERS, *more]}
        for figure, model in ((1, "vgg16"), (2, "nin"))
        for name, averaging, momentum, more in (
            ("k-avg", k_avg(16, 8), 0, []),
            ("downpour", DOWNPOUR, 0, [K_AVG_SLOWER]),
            ("eamsgd", EAMSGD, 0.9, [K_AVG_SLOWER]),
        )
    },
    **{
        f"k-avg/figure{figure}": K_AVG
        | k_avg(16, 8)
        | {"model": model, "batch_size": 32, "momentum": 0, "varied": [{**K_AVG_LEARNERS, "k": K_AVG_PERIODS}]}
        for figure, model in ((5, "vgg16"), (6, "nin"))
    },
    "k-avg/figure7": K_AVG
    | {"algorithm": "sgd", "intended_learners": 1, "model": "vgg16", "batch_size": 32, "momentum": 0}
    | {"varied": [{"model": ("vgg16", "nin")}]},
    "pr-sgd/figure3-pr-sgd": PR_SGD | {"algorithm": "pr_sgd", "interval": 4, "varied": [{"interval": (4, 8, 16, 32)}]},
    "pr-sgd/figure3-sync-sgd": PR_SGD | SYNC,
    "lupa-sgd/figure2-lupa": LUPA_FIGURE_2 | {"algorithm": "lupa", "tau": 91, "varied": [{"tau": (5, 91)}]},
    "lupa-sgd/figure2-one-shot": LUPA_FIGURE_2 | {"algorithm": "one_shot"},
    "lupa-sgd/figure2-sync-sgd": LUPA_FIGURE_2 | SYNC,
    "lupa-sgd/figure4-lupa": LUPA | {"algorithm": "lupa", "tau": 91, "intended_learners": 4, "steps": 5469},
    "lupa-sgd/figure4-ada-lupa": LUPA
    | {"algorithm": "ada_lupa", "tau0": 91, "alpha": 1.09, "rounds": None, "intended_learners": 4, "steps": 5469},
    "dasgd/table1-dasgd": DASGD_CIFAR
    | {"algorithm": "dasgd", "tau": 4, "delay": 1, "xi": 0.25, "varied": DASGD_NETWORKS},
    "dasgd/table1-local-sgd": DASGD_CIFAR | k_avg(4, 32) | {"varied": DASGD_NETWORKS},
    "dasgd/table1-mini-batch-sgd": DASGD_CIFAR | SYNC | {"varied": DASGD_NETWORKS},
    "dasgd/table1-mini-batch-sgd-32": DASGD | {"algorithm": "sgd", "intended_learners": 1, "varied": DASGD_NETWORKS},
    # Section 4.3: "the baseline setting: m = 32, tau = 4, d = 2, B_l = 32, and xi = 0.25"; "from 2 to 256", "as large
    # as 256 or small as 8", "32 or 64", "from 4 to 32", "from 0 to 7 by fixing the number of local steps as 8".
    "dasgd/figure4": DASGD_CIFAR
    | {"algorithm": "dasgd", "tau": 4, "delay": 2, "xi": 0.25}
    | {
        "varied": [
            {"intended_learners": (2, 32, 256)},
            {"batch_size": (8, 32, 64, 256)},
            {"tau": (4, 8, 32)},
            {"tau": (8,), "delay": tuple(range(8))},
        ]
    },
    "dasgd/figure5-dasgd": DASGD_IMAGENET
    | {"algorithm": "dasgd", "tau": 2, "delay": 1, "xi": 0.25}
    | {"varied": [{"tau": (3,), "delay": (2,)}, {"tau": (4,), "delay": (3,)}]},
    "dasgd/figure5-local-sgd": DASGD_IMAGENET | k_avg(2, 8),
    "dasgd/figure5-mini-batch-sgd": DASGD_IMAGENET | SYNC,
}
# What a file says though it were the default, so that it can be read by itself.
STATED = {
    *("task", "model", "algorithm", "intended_learners", "optimizer", "learning_rate", "momentum", "weight_decay"),
    *("schedule", "batch_size"),
}
# What follows from others where it is unset, or sets the rate, which no experiment lets it.
UNSTATED = {"alpha", "rounds", "mu", "shift"}


def test_every_recipe_has_its_paper_and_every_paper_its_recipes():
    assert recipes.names() == sorted(PAPERS)


@pytest.mark.parametrize("name", PAPERS)
def test_a_recipe_has_the_settings_of_its_paper(name):
    said = {option: value for option, value in PAPERS[name].items() if option not in ("varied", "rates")}
    config = from_sources(name, {})
    assert {option: getattr(config, option) for option in said} == said
    assert config.optimizer == "sgd"
    if "weight_decay" not in said:
        assert config.weight_decay == 0


@pytest.mark.parametrize("name", PAPERS)
def test_the_learning_rate_is_that_of_the_paper(name):
    config = from_sources(name, {})
    per_epoch = 100 if config.schedule == "one-cycle" else 2  # the rates do not depend on it
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=config.learning_rate)
    total_steps = (config.epochs or 7) * per_epoch
    scheduler = optimizers.build_scheduler(config.optimization, optimizer, total_steps, per_epoch)
    found = []
    for _ in range(total_steps + 1):
        found.append(optimizer.param_groups[0]["lr"])
        if scheduler is not None and len(found) <= total_steps:
            optimizer.step()
            scheduler.step()
    for epoch, rate in PAPERS[name]["rates"].items():
        if epoch * per_epoch <= total_steps:  # 90 epochs end before the rate falls
            # The peak of torch's cycle is less than a step too early.
            assert found[round(epoch * per_epoch)] == pytest.approx(rate, rel=2e-3)


@pytest.mark.parametrize("name", PAPERS)
def test_a_recipe_names_the_runs_of_its_paper(name):
    expected = set()
    for axes in PAPERS[name].get("varied", []):
        for values in itertools.product(*axes.values()):
            expected.add(frozenset(zip(axes, values, strict=True)))
    found = set()
    for options in recipes.variations(name):
        config = from_sources(name, options)
        found.add(frozenset((option, getattr(config, option)) for option in options))
    assert found == expected


@pytest.mark.parametrize("name", PAPERS)
def test_a_file_can_be_read_by_itself(name):
    text = (recipes.FOLDER / f"{name}.toml").read_text()
    assert re.match(r"# (Hier-AVG|K-AVG|PR-SGD|LUPA-SGD|DaSGD), (figures?|table) \d", text)
    assert "\n# Paper: section " in text
    assert "\n# Left open: " in text
    assert max(map(len, text.splitlines())) <= 120
    stated = tomllib.loads(text)
    own = set(algorithms.option_names(stated["algorithm"].replace("-", "_")))
    assert STATED | (own - UNSTATED) <= set(stated)
    assert ("epochs" in stated) != ("steps" in stated)


def test_epochs_have_the_steps_that_the_papers_count():
    """DaSGD: "the total number of iterations is 2450"; LUPA-SGD: T = 21875 of 5 machines together."""
    dasgd, lupa = from_sources("dasgd/table1-dasgd", {}), from_sources("lupa-sgd/figure2-lupa", {})
    assert dasgd.epochs * num_batches(CIFAR10_SAMPLES, 32, dasgd.batch_size) == 2450
    assert lupa.epochs * num_batches(EPSILON_SAMPLES, 5, lupa.batch_size) * 5 == 21875


# -- how they are found -------------------------------------------------------------------------------------------


def test_config_help_lists_them_without_torch_or_mpi():
    program = (
        "import atexit, sys; atexit.register(lambda: print(*{'torch', 'mpi4py.MPI', 'numpy'} & set(sys.modules)));"
        "from hpcavg.cli.main import main; main(['--config', 'help'])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    *lines, loaded = done.stdout.splitlines()
    assert loaded == ""
    assert [line.split()[0] for line in lines[1:]] == sorted(PAPERS)
    row = next(line for line in lines if line.startswith("hier-avg/table1-p64-k2-8 "))
    assert row.endswith("  Hier-AVG, table 1: K2 = 8, K1 = 1, S = 4, ResNet-18, CIFAR-10, P = 64 (93.17 %)")


def test_the_suffix_may_be_left_out_and_a_file_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "hier-avg/table1-p64-k2-8"
    assert from_sources(f"{name}.toml", {}) == from_sources(name, {})
    path = tmp_path / f"{name}.toml"
    path.parent.mkdir()
    path.write_text("k2 = 5\n")
    assert from_sources(f"{name}.toml", {}).k2 == 5
    assert recipes.find(name) == recipes.FOLDER / f"{name}.toml"  # no file has this name


def test_names_near_an_unknown_one_are_told():
    with pytest.raises(InputError) as caught:
        parsers.parse_train(["--config", "hier-avg/figure2.toml"])
    line = caught.value.as_option()
    assert line.startswith("--config hier-avg/figure2.toml: must be a file that can be read (No such file")
    assert line.endswith("or a recipe: hier-avg/figure4, hier-avg/figure3, hier-avg/figure1")
    with pytest.raises(InputError, match=r"or one of the recipes that --config help lists$"):
        parsers.parse_train(["--config", "x"])
    for outside in ("../configs/hier-avg/figure1", "/hier-avg/figure1"):
        with pytest.raises(InputError):
            parsers.parse_train(["--config", outside])


def test_a_job_script_keeps_the_name(capsys):
    parsers.write_job(["slurm", "--nodes", "4", "--config", "hier-avg/table1-p16-k2-64", "--data-dir", "/data"])
    assert " --config hier-avg/table1-p16-k2-64 --data-dir /data " in capsys.readouterr().out


def test_the_page_has_every_recipe():
    page = (Path(__file__).parents[3] / "docs" / "recipes.md").read_text()
    assert re.findall(r"^\| `([\w/.-]+)` \|", page, re.MULTILINE) == recipes.names()
