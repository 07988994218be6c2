"""The modules' order, their weight, and that every public name says what it is."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import hpcavg

PACKAGE = Path(hpcavg.__file__).parent

# A module may import modules of lower levels, and those of its own level only within its own folder.
LEVELS = [
    {
        "hpcavg",
        "hpcavg.errors",
        "hpcavg.folding",
        "hpcavg.launched",
        "hpcavg.merge",
        "hpcavg.place",
        "hpcavg.prefetch",
        "hpcavg.schedule",
        "hpcavg.streams",
    },
    {
        "hpcavg.rule",
        "hpcavg.advice",
        "hpcavg.children",
        "hpcavg.events",
        "hpcavg.files",
        "hpcavg.job",
        "hpcavg.launcher",
        "hpcavg.models",
        "hpcavg.models.basic",
        "hpcavg.models.counting",
        "hpcavg.models.dense",
        "hpcavg.models.dual_path",
        "hpcavg.models.inception",
        "hpcavg.models.layers",
        "hpcavg.models.mobile",
        "hpcavg.models.nin",
        "hpcavg.models.residual",
        "hpcavg.models.vgg",
        "hpcavg.mpi_library",
        "hpcavg.recipes",
    },
    {
        "hpcavg.catalogue",
        "hpcavg.topology",
        "hpcavg.flat",
        "hpcavg.eager",
        "hpcavg.node_memory",
        "hpcavg.run_lock",
        "hpcavg.state_file",
    },
    {
        "hpcavg.algorithms",
        "hpcavg.calls",
        "hpcavg.constants",
        "hpcavg.forms",
        "hpcavg.health",
        "hpcavg.mean",
        "hpcavg.mean.arrays",
        "hpcavg.mean.choice",
        "hpcavg.mean.compression",
        "hpcavg.mean.cuda",
        "hpcavg.mean.cuda_aware",
        "hpcavg.mean.cuda_ipc",
        "hpcavg.mean.cuda_support",
        "hpcavg.mean.devices",
        "hpcavg.mean.mpi",
        "hpcavg.mean.pending",
        "hpcavg.mean.rows",
        "hpcavg.mean.shared",
        "hpcavg.mean.staged",
        "hpcavg.mean.twolevel",
        "hpcavg.mean.wire",
        "hpcavg.metrics",
        "hpcavg.progress",
        "hpcavg.recovery",
        "hpcavg.supervisor",
    },
    {
        "hpcavg.config",
        "hpcavg.gradients",
        "hpcavg.optimizer_state",
        "hpcavg.outer_state",
        "hpcavg.replica",
        "hpcavg.rounds",
        "hpcavg.server",
        "hpcavg.watchdog",
    },
    {
        "hpcavg.asynchronous",
        "hpcavg.delayed",
        "hpcavg.policies",
        "hpcavg.pauses",
        "hpcavg.placement",
        "hpcavg.sources",
        "hpcavg.summary",
    },
    {"hpcavg.averaging", "hpcavg.cli"},
    {
        "hpcavg.averager",
        "hpcavg.checkpoint",
        "hpcavg.data",
        "hpcavg.data.array_pickle",
        "hpcavg.data.augmentation",
        "hpcavg.data.cifar10",
        "hpcavg.data.class_folders",
        "hpcavg.data.epsilon",
        "hpcavg.data.gratings",
        "hpcavg.data.libsvm",
        "hpcavg.data.partition",
        "hpcavg.data.photo_augmentation",
        "hpcavg.data.shards",
        "hpcavg.emergency",
        "hpcavg.learning_rate",
        "hpcavg.local_optimizer",
        "hpcavg.tasks.task",
    },
    {
        "hpcavg.data.command",
        "hpcavg.data.imagenet",
        "hpcavg.data.mapped",
        "hpcavg.resume",
        "hpcavg.run_folder",
        "hpcavg.saving",
    },
    {
        "hpcavg.tasks",
        "hpcavg.tasks.cifar10",
        "hpcavg.tasks.digits",
        "hpcavg.tasks.epsilon",
        "hpcavg.tasks.imagenet",
        "hpcavg.tasks.synthetic",
    },
    {"hpcavg.checkpointer", "hpcavg.evaluation", "hpcavg.feed", "hpcavg.model_passes", "hpcavg.survey"},
    {"hpcavg.account", "hpcavg.trial"},
    {"hpcavg.record"},
    {"hpcavg.train", "hpcavg.curves", "hpcavg.info"},
    {"hpcavg.report"},
    {"hpcavg.__main__"},
]
LEVEL = {module: level for level, modules in enumerate(LEVELS) for module in modules}


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def imported(tree):
    """Yield (line, module) of every import of the package."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in LEVEL else node.module for name in names]
        else:
            continue
        yield from ((node.lineno, name) for name in names if name.split(".")[0] == "hpcavg")


def test_imports_point_downward():
    wrong = []
    for module, path in modules():
        if module == "hpcavg":  # the facade: names what the rooms above it hold, and imports them when they are used
            continue
        for line, name in imported(ast.parse(path.read_text())):
            same_room = module.rpartition(".")[0] or module
            allowed = LEVEL[name] < LEVEL[module] or (
                LEVEL[name] == LEVEL[module] and name.startswith((f"{module}.", f"{same_room}.")) and "." in same_room
            )
            if not allowed and name.rpartition(".")[0] != module:
                wrong.append(f"{path.name}:{line} {module} -> {name}")
    assert wrong == []


def test_every_module_has_a_level():
    assert {module for module, _ in modules()} == set(LEVEL)


def test_no_module_outgrows_its_room():
    assert [path.name for _, path in modules() if len(path.read_text().splitlines()) > 400] == []


def loaded_after(statement):
    program = f"import sys\n{statement}\nprint(*sys.modules)"
    return set(
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    )


def test_the_command_line_needs_neither_torch_nor_mpi():
    loaded = loaded_after("import hpcavg.cli; hpcavg.cli.train_parser().format_help(); hpcavg.algorithms.hier_avg()")
    assert not loaded & {"torch", "mpi4py.MPI", "numpy", "h5py"}


def test_a_rank_imports_no_library_that_only_rank_0_needs():
    loaded = loaded_after("import hpcavg.train")
    assert "torch" in loaded
    assert not loaded & {"sklearn", "matplotlib", "rich", "sympy"}


def test_what_is_checked_early_needs_no_torch():
    loaded = loaded_after("import hpcavg.__main__, hpcavg.run_folder, hpcavg.topology")
    assert not loaded & {"torch", "h5py", "numpy"}


def test_files_of_a_run_need_no_mpi():
    assert "mpi4py.MPI" not in loaded_after("import hpcavg.data.command, hpcavg.data.imagenet, hpcavg.data.epsilon")
    assert not loaded_after("import hpcavg.checkpoint") & {"mpi4py.MPI", "h5py", "hpcavg.averager"}


def test_built_in_tasks_are_the_ones_the_options_name():
    from hpcavg.config import BUILT_IN_TASKS

    found = {path.stem for path in (PACKAGE / "tasks").glob("*.py")}
    assert found - {"__init__", "task"} == set(BUILT_IN_TASKS)


def test_no_collective_goes_on_a_communicator_that_nobody_can_revoke():
    """mpi4py reduces Python objects on a hidden duplicate: who waits there does not hear of a death."""
    pattern = re.compile(r"\.(all)?reduce\(|\.(ex)?scan\(")
    assert [path.name for path in PACKAGE.rglob("*.py") if pattern.search(path.read_text())] == []
