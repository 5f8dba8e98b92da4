# Each target is one line; .ci/run calls sanitize, lint, test and oldest.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
# pip would compile every Python file; what is imported is compiled as it is imported
PIP := $(PY) -m pip install -q --no-compile
# whose byte code is then kept, even where the container forbids it: torch takes seconds to compile
unexport PYTHONDONTWRITEBYTECODE
# plans that every torch of the window can train
OLD_PLANS := 130b-float32-dp=2 glm4-float32-tp=2 10b-float32-pp=2,micro_batches=4
SOURCES := setup.py pyproject.toml $(shell find csrc -type f 2>/dev/null)

.PHONY: setup align test matrix oldest oldest-ready lint sanitize bench peers deepspeed deepspeed-record openvino npu clean
.DEFAULT_GOAL := setup

$(VENV)/torch.stamp:
	$(PYTHON) -m venv $(VENV) && $(PIP) -U pip setuptools wheel ninja && $(PIP) torch==2.13.0 && touch $@

$(VENV)/ready.stamp: $(VENV)/torch.stamp $(SOURCES)
	$(PIP) --no-build-isolation -e '.[onnx,train,structured,dev]' && touch $@

setup: $(VENV)/ready.stamp ## everything the other targets need

align: setup ## the main job: one GLM on every usable backend, one verdict
	$(VENV)/bin/glm-core align run --out runs/align

test: setup peers openvino npu ## the whole suite
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist worksteal

matrix: setup ## the whole suite with each torch of the window, each in an environment of its own (20 GB)
	$(PY) tests/versions/matrix.py

oldest-ready: setup ## the environment of `oldest`, as good as it can be made; that target tells what is wrong with it
	-nice $(PY) tests/versions/matrix.py --torch 2.7.1 --prepare

oldest: setup ## a part of the suite with the oldest torch, Python and numpy
	$(PY) tests/versions/matrix.py --torch 2.7.1 tests/ops tests/model tests/versions \
		$(foreach t,balance checkpoint exact graph optimizer train,tests/training/test_$(t).py) \
		$(foreach plan,$(OLD_PLANS),"tests/distributed/test_plans.py::test_a_plan_trains_as_one_process[$(plan)]")

lint: setup ## style, types, spelling
	$(VENV)/bin/ruff format --check && $(VENV)/bin/ruff check && $(VENV)/bin/mypy && $(VENV)/bin/codespell && $(VENV)/bin/clang-format --dry-run -Werror $$(find csrc -name '*.h' -o -name '*.cpp')

sanitize: ## the C++ kernels under AddressSanitizer and UBSan
	sh csrc/tests/sanitize.sh

bench: setup ## whole training steps and dispatch, against peers and ceilings
	$(PY) -m glm_core.bench.step --peer transformers && $(PY) -m glm_core.bench.dispatch

peers: setup ## SwissArmyTransformer's own GLM-130B, in an environment of its own
	test -d .venv-sat || sh tests/peers/setup_sat.sh

deepspeed: setup ## real DeepSpeed, in an environment of its own
	test -d .venv-deepspeed || sh tests/deepspeed/setup_deepspeed.sh || echo "no DeepSpeed to be had here: its tests are skipped"

deepspeed-record: deepspeed ## what real DeepSpeed does with the tests' scripts, recorded again
	$(PY) tests/deepspeed/record.py

openvino: setup ## ONNX Runtime's OpenVINO provider, in an environment of its own
	test -d .venv-openvino || sh tests/backends/setup_openvino.sh

npu: setup ## the real torch_npu over stub CANN libraries, in an environment of its own
	test -d .venv-npu || sh tests/peers/setup_npu.sh || echo "no torch_npu to be had here: its tests are skipped"

clean: ## forget builds, runs and caches
	rm -rf $(VENV) .venv-* build runs .cache *.egg-info
