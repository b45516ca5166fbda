# `make help` lists the targets. Each sets up what it needs, in $(VENV) and build/, on first use.

PYTHON ?= python3
VENV ?= .venv
# The newer PyTorch on which `make wheel-check` tries the wheel.
NEWER_TORCH ?= 2.14.1

# The pinned PyTorch is a CPU build, for which CUDA kernels would take minutes to compile in vain: they
# are tested on a simulated GPU. With a GPU, `FASTADAPTERS_BUILD=auto make ...` in an environment that has it.
export FASTADAPTERS_BUILD ?= cpu

export PATH := $(abspath $(VENV)/bin):$(PATH)
CSRC := $(wildcard csrc/* csrc/*/* csrc/*/*/*)
CLANG_FORMATTED := $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
CMAKE := cmake -G Ninja -DPython_EXECUTABLE=$(abspath $(VENV)/bin/python)

.DEFAULT_GOAL := help
.PHONY: help setup hooks info lint format test test-main test-gpu test-triton-versions test-clients test-seeds test-isas test-aarch64 sanitize sanitize-device bench bench-full bench-auto interop docs docs-check examples wheel wheel-check wheel-aarch64 release-check hub-check clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "%-22s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# Pins of the tools are in pyproject.toml. The pure build is only the way to install them: it needs no PyTorch.
$(VENV)/tools.stamp: pyproject.toml
	test -e $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	python -m pip install --quiet pip==26.3
	FASTADAPTERS_BUILD=pure pip install --quiet --editable '.[dev]'
	touch $@

$(VENV)/library.stamp: $(VENV)/tools.stamp setup.py $(CSRC)
	pip install --quiet --no-build-isolation --no-deps --editable .
	python -c 'import sys; from fastadapters import backends; sys.exit(backends.library_error)'
	touch $@

setup: $(VENV)/library.stamp ## Create .venv, install the tools and the package with its compiled library

info: setup ## Print what is installed and what runs
	python -m fastadapters.info

hooks: setup ## Build the test hooks
	$(CMAKE) -S . -B build/hooks
	cmake --build build/hooks --target _hooks

lint: setup ## Check style and types
	ruff check .
	ruff format --check .
	mypy
	clang-format --dry-run --Werror $(CLANG_FORMATTED)

format: setup ## Fix the style
	ruff check --fix .
	ruff format .
	clang-format -i $(CLANG_FORMATTED)

# A lane is a process of pytest of its own. New lanes become prerequisites here.
test: lint test-main test-gpu ## Style, types and the tests that need nothing more

# Two processes with two threads each would wait for each other; what threads change is tested apart.
test-main: setup hooks ## The tests but for those of the GPU kernels
	OMP_NUM_THREADS=1 pytest -n 2 tests --ignore tests/gpu --ignore tests/clients

test-gpu: setup ## The GPU kernels, executed without a GPU
	pytest -n 2 tests/gpu

# Two at a time, each quiet unless it fails.
DRAWN := $(shell grep -l '^from hypothesis' tests/*.py)
test-seeds: setup ## The drawn samples under 30 seeds on each instruction set of this CPU, in 15 minutes
	isas=$$(python -m fastadapters.info | sed -n 's/^ *cpu isas here *//p') && test -n "$$isas" && \
	for isa in $$isas; do for seed in $$(seq 30); do echo $$isa $$seed; done; done | \
	  OMP_NUM_THREADS=1 xargs -P 2 -L 1 sh -c 'log=$$(FASTADAPTERS_CPU_ISA=$$0 pytest -m hypothesis \
	    --hypothesis-profile=seeds --hypothesis-seed=$$1 $(DRAWN) 2>&1) && \
	    echo "$$0, seed $$1: passed" || { echo "$$0, seed $$1: $$log"; exit 1; }'

# A copy of the package, of links, around a library that emulates the instruction sets this CPU lacks.
OP_TESTS := $(foreach op,bottleneck multiway grouped multimodal cross_modal_attention sequence_fusion,tests/test_$(op).py)
test-isas: setup ## The ops' tests and the C++ tests on every instruction set, those that this CPU lacks emulated
	$(CMAKE) -S . -B build/hooks
	cmake --build build/hooks --target _C $(CPP_TESTS)
	rm -rf build/isas && mkdir -p build/isas
	cp -rs $(abspath fastadapters) build/isas/
	ln -sfn $(abspath kernels) build/isas/fastadapters/kernels
	ln -sf $(abspath build/hooks/_C.abi3.so) build/isas/fastadapters/
	ctest --test-dir build/hooks --output-on-failure
	for isa in amx avx512_bf16 avx512; do \
	  FASTADAPTERS_CPU_ISA=$$isa PYTHONPATH=build/isas OMP_NUM_THREADS=1 pytest -n 2 -k 'not eager' $(OP_TESTS) || exit 1; \
	done

# The other versions of Triton that the kernels are for, each beside the PyTorch of $(VENV).
TRITON_VERSIONS ?= 3.6.0 3.8.0 3.9.0

# The interpreter of Triton 3.6 fails with NumPy 2.4.
BESIDE_3.6.0 := numpy==2.3.5

build/triton/%.stamp: $(VENV)/library.stamp
	pip install --quiet --no-deps --upgrade --target build/triton/$* triton==$* $(BESIDE_$*)
	touch $@

test-triton-versions: $(TRITON_VERSIONS:%=build/triton/%.stamp) ## Test the Triton kernels under each Triton they are for (3 GB)
	for version in $(TRITON_VERSIONS); do \
	  PYTHONPATH=build/triton/$$version pytest -n 2 tests/gpu/test_triton_compile.py \
	    tests/gpu/every_architecture.py tests/test_triton_interpreter*.py || exit 1; \
	done

# Packages whose adapters `fastadapters.patch` replaces, and what they import, beside the PyTorch of $(VENV).
# Another version of transformers than that of the other tests is what `adapters` wants.
CLIENTS := adapters==1.3.0 transformers==4.57.6 huggingface_hub==0.36.2 tokenizers==0.22.1 torchscale==0.3.0 \
  requests==2.34.2 urllib3==2.8.0 idna==3.20 certifi==2026.10.19.post1 charset_normalizer==3.5.3
# In a place of its own: torchvision is built for CUDA, and transformers looks for it.
OPEN_CLIP := open_clip_torch==3.3.0 torchvision==0.28.0 ftfy==6.3.1 wcwidth==0.9.4

build/clients.stamp: $(VENV)/tools.stamp
	pip install --quiet --no-deps --no-compile --upgrade --target build/clients $(CLIENTS)
	touch $@

build/open_clip.stamp: $(VENV)/tools.stamp
	pip install --quiet --no-deps --no-compile --upgrade --target build/open_clip $(OPEN_CLIP)
	touch $@

test-clients: setup build/clients.stamp build/open_clip.stamp ## Test `fastadapters.patch` and the head of CLIP on the packages themselves (160 MB)
	PYTHONPATH=build/clients OMP_NUM_THREADS=1 pytest -n 2 tests/clients
	PYTHONPATH=build/open_clip OMP_NUM_THREADS=1 pytest tests/clients

CPP_TESTS = $(notdir $(basename $(wildcard tests/cpp/test_*.cpp)))
sanitize: setup ## Run the C++ kernel tests under the address, undefined and thread sanitizers
	for kind in address,undefined thread; do \
	  $(CMAKE) -S . -B build/sanitize-$$kind -DFASTADAPTERS_SANITIZE=$$kind -DFASTADAPTERS_EMULATE=amx && \
	  cmake --build build/sanitize-$$kind --target $(CPP_TESTS) && \
	  ctest --test-dir build/sanitize-$$kind --output-on-failure || exit 1; \
	done

# Debian: apt-get install g++-aarch64-linux-gnu qemu-user
AARCH64 := aarch64-linux-gnu
test-aarch64: setup ## The C++ kernel tests compiled for 64-bit ARM, run by qemu-user (needs its g++, too)
	$(CMAKE) -S . -B build/aarch64 -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
	  -DCMAKE_CXX_COMPILER=$(AARCH64)-g++ '-DCMAKE_CROSSCOMPILING_EMULATOR=qemu-aarch64;-L;/usr/$(AARCH64)'
	cmake --build build/aarch64 --target $(CPP_TESTS)
	ctest --test-dir build/aarch64 --output-on-failure

# The cache of PyTorch's allocator would hide what is out of bounds.
sanitize-device: setup ## With a GPU: the CUDA kernels under compute-sanitizer
	for tool in memcheck racecheck synccheck; do \
	  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 1 \
	    python -m pytest tests/gpu/test_real_device.py -k "matches_reference and cuda" || exit 1; \
	done

# The tables show the bottleneck with kept pages, too: see docs/performance.md.
bench: setup ## The main benchmarks and their table, in 12 minutes
	mkdir -p build
	pytest benches --benchmark-quiet --benchmark-json=build/bench.json
	FASTADAPTERS_KEEP_PAGES=1 pytest benches/test_bottleneck.py --dtype float32,autocast --benchmark-quiet --benchmark-json=build/bench-kept.json
	python -m benches.report build/bench.json build/bench-kept.json

bench-full: setup ## All benchmarks and their table
	mkdir -p build
	pytest benches --full --benchmark-quiet --benchmark-json=build/bench.json
	FASTADAPTERS_KEEP_PAGES=1 pytest benches/test_bottleneck.py --full --benchmark-quiet --benchmark-json=build/bench-kept.json
	python -m benches.report build/bench.json build/bench-kept.json

bench-auto: setup ## Whether `auto` loses to eager anywhere: every op with kernels, on one thread and on all, in 10 minutes
	python -m benches.auto

ARCHITECTURES := 8.0 8.6 8.9 9.0 10.0 12.0+PTX
interop: setup build/clients.stamp ## Losses and times of the clients with and without `fastadapters.patch`, into docs/interop.md
	PYTHONPATH=build/clients OMP_NUM_THREADS=1 python -m benches.patched

docs: setup ## Build the site into build/site; warnings are errors
	NO_MKDOCS_2_WARNING=1 python -m mkdocs build --quiet --strict

docs-check: docs ## Screenshots of README and site by headless Chromium, into build/look, to be looked at
	python docs/look.py

EXAMPLES = $(filter-out side_by_side __init__,$(notdir $(basename $(wildcard examples/*.py))))
examples: setup ## Run the examples: their pictures into docs/examples, in 3 minutes
	for example in $(EXAMPLES); do python -m examples.$$example || exit 1; done

wheel: setup ## Build the wheel into dist/, with every architecture where it has CUDA kernels
	TORCH_CUDA_ARCH_LIST='$(ARCHITECTURES)' pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .

wheel-check: wheel ## Test the wheel on a newer PyTorch (5 GB), from site-packages
	$(PYTHON) -m venv --clear build/newer
	build/newer/bin/python -m pip install --quiet torch==$(NEWER_TORCH) pytest hypothesis dist/*-abi3-*.whl
	cd build && newer/bin/python -m fastadapters.info
	build/newer/bin/pytest tests/test_bottleneck.py

# Each interpreter, the oldest and the newest PyTorch, all combinations; what is not on disk is some GB each.
RELEASE_PYTHONS ?= python3.10 python3.11 python3.12 python3.13
RELEASE_TORCHES ?= 2.11.0 $(NEWER_TORCH)

build/release-tools.stamp: $(VENV)/tools.stamp
	pip install --quiet --upgrade --target build/release-tools twine==7.0.0 auditwheel==6.8.2 uv==0.13.9 check-jsonschema==0.39.0
	touch $@

# The packages of `kernels` alone: PyTorch and huggingface_hub are those of $(VENV).
build/hub-tools.stamp: $(VENV)/tools.stamp
	pip install --quiet --no-deps --upgrade --target build/hub-tools kernels==0.17.2 kernels-data==0.16.2 kernel-abi-check==0.14.1
	pip install --quiet --upgrade --target build/hub-tools sigstore==4.5.1 tomlkit==0.15.2
	touch $@

hub-check: setup build/hub-tools.stamp ## The package as Hugging Face's `kernels` takes it: staged, built for this CPU, loaded twice
	rm -rf build/hub/torch-ext build/hub/csrc build/hub/build.toml
	python hub/stage.py build/hub
	PYTHONPATH=build/hub-tools OMP_NUM_THREADS=1 python hub/check.py build/hub

release-check: setup build/release-tools.stamp ## The sdist and the wheel as others get them: contents, metadata, tag, installations (GBs)
	RELEASE_TOOLS=$(abspath build/release-tools) RELEASE_PYTHONS='$(RELEASE_PYTHONS)' RELEASE_TORCHES='$(RELEASE_TORCHES)' .ci/release-check

# Debian: apt-get install g++-aarch64-linux-gnu qemu-user; the script fetches Python for arm64 itself.
wheel-aarch64: setup build/release-tools.stamp ## The wheel for 64-bit ARM, built and used by an aarch64 Python under qemu-user (4 GB)
	RELEASE_TOOLS=$(abspath build/release-tools) TORCH=2.13.0 .ci/aarch64-wheel

clean: ## Remove what was built, but for .venv
	rm -rf build dist *.egg-info fastadapters/_C.abi3.so fastadapters/_build.json $(VENV)/library.stamp
