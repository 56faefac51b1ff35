# Every target sets up what it needs; a second call does no work twice.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
EXTRAS := wandb,examples
OLDEST := .venv-oldest
AUDIT  := .venv-audit
# Those that need torch-pruning, onnx or safetensors, and the documentation, are left out.
OLDEST_TESTS := $(filter-out tests/structured/% tests/export/% tests/repository/test_docs.py \
	tests/cli/test_export.py tests/integration/% tests/clusters/%, \
	$(wildcard tests/*/test_*.py)) \
	$(addprefix tests/integration/test_,callback.py resume.py masks_in_fit.py ranks.py)

export OMP_NUM_THREADS ?= 2
TEST_WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help demo demo-ddp demo-transformer examples test test-all test-fast test-oldest test-slurm test-gpu coverage soak \
	zoo mutants mutants-sampled bench gpu-check check format lock audit docs clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

demo: $(VENV)/.demo  ## train and prune a CNN on scikit-learn's digits, show the result
	$(BIN)/python examples/digits/demo.py

demo-ddp: export OMP_NUM_THREADS = 1
demo-ddp: $(VENV)/.demo  ## the same on two processes
	$(BIN)/python examples/digits/demo.py --trainer.devices 2 --trainer.strategy ddp

demo-transformer: $(VENV)/.demo  ## train and prune a transformer on Python sources, show what it writes
	$(BIN)/python -m examples.characters.demo

# Those that need no download; the last one reads what the demo has trained, or trains it.
TRAINED := runs/digits/woodfisher/last.ckpt
FIT := $(BIN)/lightning-woodfisher fit --trainer.enable_progress_bar false
examples: export PYTHONWARNINGS = ignore
examples: export JSONARGPARSE_DEPRECATION_WARNINGS = off
examples: $(VENV)/.demo  ## run the quick examples
	$(BIN)/python -m examples.plain_pytorch.digits
	$(BIN)/python -m examples.plain_pytorch.fabric --devices 2
	$(FIT) --config examples/transformer/woodfisher.yaml
	test -f $(TRAINED) || $(FIT) --config examples/digits/woodfisher.yaml
	$(FIT) --config examples/finetune/constant.yaml

PYTEST := $(BIN)/python -m pytest
ON_WORKERS := -n $(TEST_WORKERS) --dist worksteal
# For the inner loop: what a pruning step consists of.
FAST_TESTS := lightning_woodfisher $(addprefix tests/,base callbacks criteria data distributed \
	fisher gradients pruning structured weights)

test: export OMP_NUM_THREADS = 1
test: $(VENV)/.dev  ## run the tests on two cores, except those marked slow (4 minutes)
	$(PYTEST) $(ON_WORKERS) $(PYTEST_ARGS)

test-all: export OMP_NUM_THREADS = 1
test-all: $(VENV)/.dev  ## run all tests, also the slow ones (6 minutes)
	$(PYTEST) $(ON_WORKERS) -m 'not soak' $(PYTEST_ARGS)

test-fast: export OMP_NUM_THREADS = 1
test-fast: $(VENV)/.dev  ## run the tests of a step in one process, for the inner loop (1 minute)
	$(PYTEST) $(ON_WORKERS) -m 'not soak and not slow and not spawns' \
		$(FAST_TESTS) $(PYTEST_ARGS)

# Its environment, with the versions of tests/oldest.txt, takes several GB.
test-oldest: export OMP_NUM_THREADS = 1
# Lightning 2.5 calls what jsonargparse has deprecated, when it is imported.
test-oldest: export JSONARGPARSE_DEPRECATION_WARNINGS = off
test-oldest: $(OLDEST)/.dev  ## run the core tests with the oldest supported versions
	$(OLDEST)/bin/python -m pytest -m 'not soak' $(OLDEST_TESTS) $(PYTEST_ARGS)

# Those that start several ranks run on the CPU: one GPU cannot hold them under NCCL.
GPU_TESTS := $(addprefix tests/,base criteria data fisher gradients integration layerwise pruning \
	structured weights)
test-gpu: export OMP_NUM_THREADS = 1
test-gpu: export WOODFISHER_TEST_DEVICE = cuda
test-gpu: $(VENV)/.dev  ## run the tests of one process on the GPU of this machine
	$(PYTEST) -m 'not soak and not spawns' $(GPU_TESTS) $(PYTEST_ARGS)

coverage: export OMP_NUM_THREADS = 1
coverage: export WOODFISHER_COVERAGE = $(CURDIR)/pyproject.toml
coverage: $(VENV)/.dev  ## run all tests and list the branches that none of them takes
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -m 'not soak' $(PYTEST_ARGS)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

# It installs no SLURM; on Debian, as root:
#   apt-get install --no-install-recommends slurm-wlm munge
# `make test-all` runs these tests, too, and skips them where there is no SLURM.
test-slurm: export OMP_NUM_THREADS = 1
test-slurm: $(VENV)/.dev  ## run the tests on a SLURM of two nodes, started for them
	$(PYTEST) -m slow tests/clusters/test_slurm.py $(PYTEST_ARGS)

soak: export OMP_NUM_THREADS = 1
soak: $(VENV)/.dev  ## long tests: random configurations, files and signals (SOAK_SEED chooses others), flat memory
	$(PYTEST) -m soak $(PYTEST_ARGS)

zoo: export OMP_NUM_THREADS = 1
zoo: $(VENV)/.dev  ## prune all networks of torchvision, some of timm and transformers (hours; goes on if killed)
	$(PIP) install --quiet timm transformers
	$(BIN)/python -m tests.zoo.run $(ZOO_ARGS)

mutants: export OMP_NUM_THREADS = 1
mutants: $(VENV)/.dev  ## break lines of the core one by one; the tests must notice
	$(BIN)/python tests/support/mutation.py

mutants-sampled: export OMP_NUM_THREADS = 1
mutants-sampled: $(VENV)/.dev  ## break 300 sampled places of the core; the tests must notice 9 of 10
	$(PIP) install --quiet --group mutants
	$(BIN)/python tests/support/sampled_mutants.py $(MUTANTS_ARGS)

bench: $(VENV)/.demo  ## measure the engines against the recursion of the literature
	$(BIN)/lightning-woodfisher benchmark $(BENCH_ARGS)

gpu-check: $(VENV)/.dev  ## check that pruning works on this GPU, and measure it (8 minutes)
	$(BIN)/lightning-woodfisher gpu-check --device cuda $(GPU_CHECK_ARGS)

check: $(VENV)/.dev  ## format, lint, import layers, types, spelling
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/mypy
	$(BIN)/codespell *.md Makefile docs examples lightning_woodfisher

format: $(VENV)/.dev  ## put the code into shape
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lock: $(VENV)/.dev  ## write the installed versions to tests/newest.txt, after the tests passed
	$(BIN)/python -m tests.support.newest > tests/newest.txt

# pip-audit asks a database of vulnerabilities, and skips what it does not find there.
audit: $(AUDIT)/.tools  ## look for known vulnerabilities of these versions, check the workflows
	$(AUDIT)/bin/pip-audit --requirement tests/newest.txt --no-deps --disable-pip
	$(AUDIT)/bin/zizmor --offline --min-severity medium .github

docs: $(VENV)/.dev  ## build the documentation into docs/_build/html
	$(BIN)/sphinx-build -W --keep-going -q -b html docs docs/_build/html

clean:  ## remove everything that was made
	rm -rf $(VENV) $(OLDEST) $(AUDIT) runs docs/_build .mypy_cache .pytest_cache .ruff_cache .hypothesis

# pip before 25.1 does not know dependency groups.
$(VENV)/.pip:
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade 'pip>=25.1'
	touch $@

$(VENV)/.demo: $(VENV)/.pip pyproject.toml
	$(PIP) install --quiet -e '.[$(EXTRAS)]'
	touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(PIP) install --quiet -e '.[all]' --group dev
	touch $@

$(OLDEST)/.dev: pyproject.toml tests/oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(OLDEST)/bin/python -m pip install --quiet -e '.[examples]' --group test \
		-c tests/oldest.txt
	touch $@

$(AUDIT)/.tools:
	$(PYTHON) -m venv $(AUDIT)
	$(AUDIT)/bin/python -m pip install --quiet pip-audit zizmor
	touch $@
