# Every target that needs it makes .venv first, and again when what it was made from has changed.
PYTHON ?= python3

VENV := .venv
BIN := $(VENV)/bin
# What running needs, and what tests and checks need beside it.
RUNNABLE := $(VENV)/.installed-run
INSTALLED := $(VENV)/.installed-dev
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c tools/constraints.txt
NATIVE_SOURCES := $(shell find src/csrc -type f \( -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' \))
EMULATION_SOURCES := $(wildcard tests/emulation/*.h)
# The scripts call `python`: let it be the one in .venv.
IN_VENV := PATH="$(CURDIR)/$(BIN):$$PATH"

.DEFAULT_GOAL := help
.PHONY: help venv demo real-model real-report cuda test test-mutations test-faults test-zoo test-doors test-door-lmcache test-door-vllm test-door-sglang test-door-kvpress test-browser report gpu test-gpu test-gpu-sanitized test-sanitized lint format fuzz bench clean
.DELETE_ON_ERROR:

help: ## List the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 18

# The first time pip shows what it does; later it has little to do.
$(RUNNABLE): pyproject.toml tools/constraints.txt setup.py $(NATIVE_SOURCES)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "make: Python 3.11 or newer is needed; name yours: make PYTHON=python3.11" >&2; exit 1; }
	@echo "make: installing what running needs into $(VENV) (torch is large), and compiling the kernels"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) $(if $(wildcard $(RUNNABLE)),-q) -e .
	@$(BIN)/python -c 'import cachegen._native'
	@touch $@

# Not as the extra of the package, which would be built again.
$(INSTALLED): $(RUNNABLE)
	@echo "make: adding what tests and checks need to $(VENV)"
	@$(BIN)/python -c 'import tomllib; \
	    project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
	    print(*project["optional-dependencies"]["dev"], sep="\n")' >$(VENV)/requirements-dev.txt
	@$(PIP) $(if $(wildcard $(INSTALLED)),-q) -r $(VENV)/requirements-dev.txt
	@touch $@

venv: $(INSTALLED) ## Make or refresh .venv

demo: $(RUNNABLE) ## Prefill, encode, decode and answer a question with the bundled model
	@$(IN_VENV) bash scripts/demo.sh

REAL_MODEL := models/smollm2-135m
real-model: $(INSTALLED) ## Get SmolLM2-135M-Instruct into models/smollm2-135m: a download of 93 MB
	@$(BIN)/python tools/get_small_model.py $(REAL_MODEL)

# REAL_DATA: a folder of texts (docs/datasets.md); without it, the repository's own. REAL_REPORT: further flags.
REAL_DATA ?=
REAL_REPORT ?=
real-report: real-model ## Measure that model, every method beside the usual ones: docs/results/smollm2; about an hour
	@$(IN_VENV) python scripts/real_report.py --model_id $(REAL_MODEL) $(if $(REAL_DATA),--path_to_data $(REAL_DATA)) $(REAL_REPORT)

# PAPER: flags of scripts/paper.py, such as another model's; REPORT_FOLDERS: further results to be shown beside.
PAPER ?=
REPORT_FOLDERS ?=
report: $(INSTALLED) ## Do the paper's experiments with the bundled model, and make a page of them: build/report/report.html
	@$(IN_VENV) python scripts/paper.py all --output_path build/report $(PAPER)
	@$(IN_VENV) python scripts/report.py build/report $(REPORT_FOLDERS) --output_path build/report/report.html

cuda: $(INSTALLED) ## Compile the CUDA module for all GPUs that are supported; needs nvcc, no GPU
	@CACHEGEN_CUDA=all $(BIN)/python setup.py build_ext --inplace

test: $(INSTALLED) ## Run all tests that need neither a GPU nor the internet
	@$(BIN)/python -m pytest -n auto --dist loadfile

test-mutations: $(INSTALLED) ## Change lines of the emulated kernels, one by one; the comparisons must notice
	@$(BIN)/python -m pytest -m mutation -n auto

test-faults: $(INSTALLED) ## Kill the scripts, fill their disks, deny them memory, lie to them: what docs/reliability.md says
	@$(BIN)/python -m pytest -m faults -n auto --dist loadfile

test-zoo: $(INSTALLED) ## Try a tiny random model of every family: what docs/models.md says
	@$(BIN)/python -m pytest tests/zoo -m "zoo or not zoo" -n auto --dist loadgroup

# An environment for each engine. What .venv has is not installed again, torch above all.
# LMCACHE, VLLM, SGLANG, KVPRESS: another version, such as 'lmcache>=0.5.6'; CACHEGEN_DOORS_MODEL: a model's folder instead of a tiny random model.
DOORS := build/doors
LMCACHE ?=
VLLM ?=
SGLANG ?=
KVPRESS ?=
DOOR_VERSIONS = $(filter $*%,$(LMCACHE) $(VLLM) $(SGLANG) $(KVPRESS))
DOOR_TESTS_lmcache := test_lmcache test_metrics
DOOR_TESTS_vllm := test_vllm test_serving test_metrics
DOOR_TESTS_sglang := test_sglang
DOOR_TESTS_kvpress := test_kvpress
test-doors: test-door-lmcache test-door-vllm test-door-sglang test-door-kvpress ## Run the plug-ins in the packages they are for, an environment for each in build/doors

test-door-lmcache test-door-vllm test-door-sglang test-door-kvpress: test-door-%: $(DOORS)/%/bin/python
	@grep -v '^$*' tools/doors-$*.txt >$(DOORS)/$*/requirements.txt
	@$(DOORS)/$*/bin/python -m pip install -q --disable-pip-version-check -r $(DOORS)/$*/requirements.txt
	@$(DOORS)/$*/bin/python -m pip install -q --disable-pip-version-check --no-deps --upgrade \
	    "$(or $(DOOR_VERSIONS),$(shell grep '^$*' tools/doors-$*.txt))"
	@$(DOORS)/$*/bin/python -m pytest $(DOOR_TESTS_$*:%=tests/doors/%.py) -m doors

$(DOORS)/%/bin/python: $(INSTALLED)
	@test -x $@ || $(BIN)/python -m venv $(DOORS)/$*
	@$@ -c 'import sys, sysconfig; \
	    open(sysconfig.get_path("purelib") + "/project.pth", "w").write(sys.argv[1] + "\n")' \
	    "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
	@touch $@

test-browser: $(INSTALLED) ## Look at the report's page in headless chromium, which must be there
	@$(BIN)/python -m pytest -m browser tests/test_report_browser.py

test-gpu: $(INSTALLED) ## Run the CUDA tests; fails where there is no GPU or no test
	@$(BIN)/python -c 'import sys, torch; torch.cuda.is_available() or sys.exit("make test-gpu: torch sees no CUDA GPU")'
	@$(BIN)/python -c 'import importlib.util, sys; importlib.util.find_spec("torchac_cuda") or sys.exit( \
	    "make test-gpu: torchac_cuda is not built: put nvcc 12 or newer on PATH, then make cuda test-gpu")'
	@$(BIN)/python -m pytest -m cuda || { \
	    status=$$?; test $$status -ne 5 || echo "make test-gpu: there is no test marked cuda" >&2; exit $$status; }

# GPU_REPORT: further flags, such as --dry_run.
GPU_REPORT ?=
gpu: $(INSTALLED) ## Prove and measure everything on a GPU in ten minutes: build/gpu
	@$(BIN)/python benchmarks/gpu_report.py $(GPU_REPORT)

SANITIZER ?= compute-sanitizer
GPU_TOOLS ?= memcheck racecheck synccheck
test-gpu-sanitized: $(INSTALLED) ## Run the CUDA tests under each tool of compute-sanitizer; slow
	@command -v $(SANITIZER) >/dev/null || { \
	    echo "make test-gpu-sanitized: no $(SANITIZER) on PATH: it comes with the CUDA toolkit" >&2; exit 1; }
	@for tool in $(GPU_TOOLS); do \
	    echo "make: the CUDA tests under $$tool"; \
	    PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(SANITIZER) --tool $$tool --target-processes all --error-exitcode 1 \
	        $(BIN)/python -m pytest -q -m cuda -k 'not allocates_nothing' tests/test_coder_cuda.py || exit 1; \
	done

lint: $(INSTALLED) ## Check style and types, changing nothing
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/pyright --pythonpath $(BIN)/python
	@$(BIN)/clang-format --dry-run -Werror $(NATIVE_SOURCES) $(EMULATION_SOURCES)

format: $(INSTALLED) ## Rewrite the sources in the house style
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format
	@$(BIN)/clang-format -i $(NATIVE_SOURCES) $(EMULATION_SOURCES)

FUZZ_SECONDS ?= 60
FUZZ_TARGETS := decoders round_trip tables components paths
FUZZ_READERS := chunks blobs kv profile config manifest store records
# All of the CPU's kernels, without their bindings.
FUZZ_SOURCES := $(filter-out %/bindings.cpp,$(wildcard src/csrc/cpu/*.cpp))
FUZZ_FLAGS := -max_total_time=$(FUZZ_SECONDS) -print_final_stats=1 -artifact_prefix=build/fuzz/
fuzz: $(INSTALLED) ## Fuzz the native coders and every reader of foreign bytes, FUZZ_SECONDS each
	@mkdir -p build/fuzz
	@for target in $(FUZZ_TARGETS); do \
	    echo "make: fuzzing the $$target"; \
	    sources=; case $$target in paths|decoders|components) sources="$(FUZZ_SOURCES)";; esac; \
	    clang++ -std=c++17 -O1 -g -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=undefined -ffp-contract=off \
	        -Isrc/csrc -Itests/fuzz tests/fuzz/fuzz_$$target.cpp $$sources -o build/fuzz/$$target -pthread || exit 1; \
	    mkdir -p build/fuzz/corpus_$$target; \
	    build/fuzz/$$target $(FUZZ_FLAGS) \
	        build/fuzz/corpus_$$target >build/fuzz/$$target.log 2>&1 || { tail -40 build/fuzz/$$target.log >&2; exit 1; }; \
	    grep stat::number build/fuzz/$$target.log; \
	done
	@test -d build/fuzz/python || $(BIN)/python -m pip install -qq --disable-pip-version-check \
	    --target build/fuzz/python atheris==3.0.0
	@for target in $(FUZZ_READERS); do \
	    echo "make: fuzzing the reader of $$target"; \
	    script="fuzz_readers.py $$target"; test ! -f tests/fuzz/fuzz_$$target.py || script=fuzz_$$target.py; \
	    PYTHONPATH=build/fuzz/python $(BIN)/python tests/fuzz/$$script build/fuzz/corpus_$$target $(FUZZ_FLAGS) \
	        >build/fuzz/$$target.log 2>&1 || { tail -40 build/fuzz/$$target.log >&2; exit 1; }; \
	    grep stat::number build/fuzz/$$target.log; \
	done

SANITIZED := build/sanitized
SANITIZED_TESTS ?= test_lossless test_integers test_byte_analysis test_analysis test_cpu_paths test_coder_cpu test_components test_symbol_model test_golden test_codec test_container
test-sanitized: $(INSTALLED) ## Run the tests of the native module, built with ASan and UBSan
	@mkdir -p $(SANITIZED)
	@cp -R src/cachegen $(SANITIZED)/ && rm -f $(SANITIZED)/cachegen/*.so
	@$${CXX:-g++} -std=c++17 -O1 -g -shared -fPIC -fvisibility=hidden -ffp-contract=off -pthread \
	    -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -Isrc/csrc \
	    -I$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("include"))') src/csrc/cpu/*.cpp \
	    -o $(SANITIZED)/cachegen/_native$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')
	@LD_PRELOAD="$$($${CXX:-g++} -print-file-name=libasan.so) $$($${CXX:-g++} -print-file-name=libstdc++.so)" \
	    ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=$(SANITIZED):. \
	    $(BIN)/python -m pytest -q -o pythonpath=. -p no:cacheprovider $(SANITIZED_TESTS:%=tests/%.py)

bench: $(INSTALLED) ## Measure the coders: bytes first, then times
	@$(IN_VENV) python benchmarks/coder_throughput.py
	@$(IN_VENV) python benchmarks/method_throughput.py --threads 1 --num_tokens 1024
	@$(IN_VENV) python benchmarks/transform_shape.py --layers 8 --num_tokens 1024 --step_log 5 --threads 1 --rounds 9 --ablation

clean: ## Remove what was built; .venv stays and is refreshed by the next target
	@rm -rf build dist .pytest_cache .ruff_cache .hypothesis $(RUNNABLE) $(INSTALLED) src/cachegen.egg-info src/*.so src/cachegen/*.so
	@find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
