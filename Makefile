# Everything runs in .venv, which make creates; nothing but Python 3.11+ and make is needed.
#   make quickstart            three methods on two small languages, compared, offline
#   make test                  the test suite but for the slow tests, which make test-all runs too
# Another interpreter:         make test PYTHON=python3.12
# Another torch build:         make test TORCH=torch==2.12.0 PIP_FLAGS="--index-url URL"
# One file of tests:           make test PYTEST_FLAGS=tests/training/test_cli.py

PYTHON ?= python3
TORCH ?= torch==2.13.0
PIP_FLAGS ?=
WORKERS ?= -n 2 --dist worksteal
PYTEST_FLAGS ?= $(WORKERS) -m "not slow"
MUTATIONS ?=
DATA ?= ../shared
PROBLEM ?= toy
UV_FLAGS ?=
SKIP ?=
DOCS_TESTS := tests/test_docs.py tests/test_estimator_docs.py

VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(patsubst %/,%,$(dir $(wildcard metaxl_evo/__init__.py vision_tasks/__init__.py))) $(wildcard scripts)

.DELETE_ON_ERROR:
.PHONY: help quickstart test test-all soak mutate lint audit format docs site licences test-versions reproduce-ner-cpu reproduce-vision-cpu benchmark gpu-report clean

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | head -n 6
	@echo "Targets: quickstart test test-all soak mutate lint audit format docs site licences test-versions reproduce-ner-cpu reproduce-vision-cpu benchmark gpu-report clean"

# One stamp an extra: the install runs again only when what it reads has changed.
$(VENV)/.installed-%: setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	grep -v '^torch==' constraints.txt > $(VENV)/constraints.txt
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) -c $(VENV)/constraints.txt '$(TORCH)'
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) -c $(VENV)/constraints.txt -e '.$(if $(filter-out base,$*),[$*])'
	@touch $@

quickstart: $(VENV)/.installed-report
	$(BIN)/metaxl-evo study configs/study/quickstart.yaml --output_dir runs/quickstart-$$(date +%Y%m%d-%H%M%S)

# One thread a worker: two workers on two cores beat one worker with two threads.
test: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_FLAGS) $(addprefix --ignore=,$(SKIP))

test-all: PYTEST_FLAGS = $(WORKERS)
test-all: test

# 10,000 meta steps of five estimators and of few-shot episodes, a study of 200 runs: what is held stays flat. For hours.
soak: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 METAXL_SOAK_STEPS=10000 METAXL_SOAK_RUNS=200 $(BIN)/python -m pytest -s tests/soak

# Mistakes put into a copy, one at a time, each of which a test has to notice; MUTATIONS="NAME NAME" for some of them.
mutate: $(VENV)/.installed-test
	$(BIN)/python -m tests.mutations $(MUTATIONS)

# mypy reads the packages of the tests too (peft).
lint: $(VENV)/.installed-dev $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(SOURCES)

# Known weaknesses of the pinned packages are asked of an advisory service; a package that it cannot answer for fails too.
audit: $(VENV)/.installed-audit
	$(BIN)/bandit -q -c pyproject.toml -r $(SOURCES)
	$(BIN)/pip-audit --strict --disable-pip --no-deps -r constraints.txt

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.installed-test
	$(BIN)/python -m metaxl_evo.estimators.table docs/estimators.md
	$(BIN)/python -m pytest $(DOCS_TESTS)

# Into site/, without a network; its pages open as files, its search wants `python -m http.server -d site`.
site: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

# Finished runs are kept. DATA holds what the page of the results names, or is a folder above it.
below = $(or $(firstword $(wildcard $(DATA)/$(1)/$(2) $(DATA)/$(2))),$(DATA)/$(2))
IMAGES = $(call below,data,images)
COSTS = OMP_NUM_THREADS=1 $(BIN)/python scripts/benchmark_estimators.py --config configs/benchmark/$(1).yaml \
	--output_dir runs/vision_cpu/cost_$(1)
BOTH := --estimators one_step,evograd --orders after_step --training.use_cpu true

WIKIANN = --model_name_or_path $(call below,models,xlmr-mini) --dataset $(call below,data,wikiann)

reproduce-ner-cpu: $(VENV)/.installed-report
	$(BIN)/metaxl-evo study configs/study/ner_cpu.yaml --output_dir runs/ner_cpu $(WIKIANN)
	test -e runs/rtn_horizon/steps/horizons.csv || $(BIN)/python scripts/compare_horizons.py \
		--config configs/ner/wikiann_cpu.yaml --target_languages sw --starts 200 --seeds 0,1,2 --output_dir runs/rtn_horizon/steps $(WIKIANN)
	$(BIN)/python scripts/train_ner.py --config configs/ner/wikiann_cpu_unroll.yaml --output_dir runs/rtn_horizon/found \
		--resume_from_checkpoint latest $(WIKIANN)
	$(BIN)/metaxl-evo study configs/study/rtn_horizon_cpu.yaml --output_dir runs/rtn_horizon/frozen $(WIKIANN)

# The two ends of the ranges in setup.py: the oldest releases that they allow, and the newest of the registry.
CORE := tests/bilevel tests/estimators tests/models tests/ner tests/training
test-versions: $(VENV)/.installed-dev
	for end in lowest-direct highest; do \
		$(BIN)/uv venv --quiet --clear --python $(BIN)/python .venv-$$end && \
		$(BIN)/uv pip install --quiet --python .venv-$$end/bin/python --resolution $$end $(UV_FLAGS) -e '.[test]' && \
		OMP_NUM_THREADS=1 .venv-$$end/bin/python -m pytest $(WORKERS) -m "not slow and not distributed" $(CORE) || exit 1; \
	done

# What an installation brings along, the packages of the extras for users included.
licences: $(VENV)/.installed-dev
	{ sed '/^| Name/,$$d' docs/licences.md; $(BIN)/pip-licenses --format markdown --no-version --order name --packages \
		$$($(BIN)/python -c 'import re; from importlib.metadata import requires as r; \
		print(*sorted({re.match("[\\w.-]+", one)[0] for one in r("metaxl_evo") \
		if "extra" not in one or re.search("\"(peft|plot|report|ray|optuna|demo|trackers)\"", one)}))'); } > docs/licences.new
	mv docs/licences.new docs/licences.md

reproduce-vision-cpu: $(VENV)/.installed-report
	$(BIN)/metaxl-evo study configs/study/fewshot_cpu.yaml --output_dir runs/vision_cpu/fewshot --data $(IMAGES)
	$(BIN)/metaxl-evo study configs/study/noisy_labels_cpu.yaml --output_dir runs/vision_cpu/noise \
		--data $(IMAGES)/mnist_8k_2k.npz
	$(BIN)/metaxl-evo study configs/study/rotation_cpu.yaml --output_dir runs/vision_cpu/rotation \
		--data $(IMAGES)/mnist_8k_2k.npz
	$(call COSTS,rotation) $(BOTH)
	$(call COSTS,fewshot) $(BOTH)
	$(call COSTS,weight_net_scaling_cpu)

reproduce-long-horizon-cpu: $(VENV)/.installed-report
	$(BIN)/metaxl-evo study configs/study/hyper_cleaning_cpu.yaml --output_dir runs/long_horizon/hyper_cleaning_mnist \
		--data $(IMAGES)/mnist_8k_2k.npz
	$(BIN)/metaxl-evo study configs/study/hyper_cleaning_cpu.yaml --output_dir runs/long_horizon/hyper_cleaning_fashion \
		--data $(IMAGES)/fashion_mnist_8k_2k.npz --seeds 0 --max_steps 2000

benchmark: $(VENV)/.installed-plot
	$(BIN)/python scripts/benchmark_estimators.py --config configs/benchmark/$(PROBLEM).yaml \
		--output_dir runs/benchmark/$(PROBLEM)

# Needs CUDA; it writes the page anew.
gpu-report: $(VENV)/.installed-plot
	$(BIN)/python scripts/gpu_report.py --output_dir runs/gpu
	cp runs/gpu/gpu.md docs/results/gpu.md

# runs/ stays: it is the user's work.
clean:
	rm -rf $(VENV) *.egg-info build dist site .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
