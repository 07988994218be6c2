"""The modules' order, their weight, and that every public name says what it is."""

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import hpcavg

PACKAGE = Path(hpcavg.__file__).parent

# Lowest first: a package imports from those above its own line in this list, and from itself without a circle.
PACKAGES = [
    "utils",
    "errors",
    "algorithms",
    "models",
    "data",
    "config",
    "distributed",
    "engines",
    "tasks",
    "averaging",
    "machine",
    "checkpoints",
    "results",
    "training",
    "experiments",
    "cli",
    "__main__",
]


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def package_of(module):
    return module.split(".")[1]


def imports():
    """Return, by module, the modules of the package that it imports; what only type checkers read counts, too."""
    paths = dict(modules())
    found = {}
    for module, path in paths.items():
        names = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                full = {alias.name: f"{node.module}.{alias.name}" for alias in node.names}
                names |= {name if name in paths else node.module for name in full.values()}
        # What is in hpcavg/__init__.py is below everything: the version. It imports nothing before it is asked for.
        found[module] = {name for name in names if name.startswith("hpcavg.")}
    del found["hpcavg"]
    return found


def test_every_module_is_in_a_package():
    names = {module for module, _ in modules()} - {"hpcavg"}
    assert {package_of(name) for name in names} == set(PACKAGES)


def test_packages_import_downward():
    order = {name: number for number, name in enumerate(PACKAGES)}
    wrong = [
        f"{module} -> {name}"
        for module, names in imports().items()
        for name in names
        if order[package_of(name)] > order[package_of(module)]
    ]
    assert wrong == []


def test_no_import_goes_in_a_circle():
    try:
        graphlib.TopologicalSorter(imports()).prepare()
    except graphlib.CycleError as error:
        raise AssertionError(" -> ".join(error.args[1])) from None


def loaded_after(statement):
    program = f"import sys\n{statement}\nprint(*sys.modules)"
    return set(
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    )


def test_the_command_line_needs_neither_torch_nor_mpi():
    loaded = loaded_after(
        "import hpcavg.cli.parsers; hpcavg.cli.parsers.train_parser().format_help(); hpcavg.algorithms.hier_avg()"
    )
    assert not loaded & {"torch", "mpi4py.MPI", "numpy", "h5py"}


def test_a_rank_imports_no_library_that_only_rank_0_needs():
    loaded = loaded_after("import hpcavg.training.trainer")
    assert "torch" in loaded
    assert not loaded & {"sklearn", "matplotlib", "rich", "sympy"}


def test_what_is_checked_early_needs_no_torch():
    loaded = loaded_after("import hpcavg.cli.main, hpcavg.results.run_folder, hpcavg.distributed.topology")
    assert not loaded & {"torch", "h5py", "numpy"}


def test_files_of_a_run_need_no_mpi():
    assert "mpi4py.MPI" not in loaded_after("import hpcavg.cli.data_command, hpcavg.data.imagenet, hpcavg.data.epsilon")
    assert not loaded_after("import hpcavg.checkpoints.store") & {"mpi4py.MPI", "h5py", "hpcavg.averaging.averager"}


def test_no_collective_goes_on_a_communicator_that_nobody_can_revoke():
    """mpi4py reduces Python objects on a hidden duplicate: who waits there does not hear of a death.

    The process groups of NCCL are no communicators, and are not used if ranks may die.
    """
    pattern = re.compile(r"(?<!group)\.(all)?reduce\(|\.(ex)?scan\(")
    assert [path.name for path in PACKAGE.rglob("*.py") if pattern.search(path.read_text())] == []


def test_the_package_needs_neither_benchmarks_nor_tests_and_benchmarks_need_no_tests():
    wrong = []
    for folder, above in (("hpcavg", "benchmarks|tests"), ("benchmarks", "tests")):
        pattern = re.compile(rf"^\s*(from|import) ({above})\b", re.MULTILINE)
        wrong += [path.name for path in (PACKAGE.parent / folder).rglob("*.py") if pattern.search(path.read_text())]
    assert wrong == []
