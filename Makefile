# make demo, make test: everything else follows. PYTHON and TORCH may be set: make install TORCH=cu130
PYTHON ?= python3
TORCH ?= cpu
TORCH_VERSION := 2.13.0
TORCH_INDEX ?= https://download.pytorch.org/whl/$(TORCH)
VENV := .venv
BIN := $(VENV)/bin
RUN := runs/digits
RANKS ?= 2
CLUSTER_PACKAGES := slurm-wlm munge openmpi-bin libopenmpi3 docker.io debootstrap openssh-server openssh-client pdsh shellcheck prometheus chromium tini iptables iproute2 btrfs-progs

.PHONY: install gpu-wheels demo test test-slow test-faults test-cluster test-trixie cluster-packages soak check bench docs clean

install: $(VENV)/.installed

# The version carries its build (+cpu), so that no index can slip in a CUDA build; the wheel comes from the configured index if it is
# there and from PyTorch's own otherwise.
$(VENV)/.installed: pyproject.toml constraints.txt Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==$(TORCH_VERSION)+$(TORCH) -c constraints.txt || \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check torch==$(TORCH_VERSION)+$(TORCH) -c constraints.txt --extra-index-url $(TORCH_INDEX)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .[dev]
	touch $@

demo: install
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/deepspeed --num_gpus $(RANKS) launcher/train.py --ds_config configs/deepspeed/zero1.json --run-dir $(RUN)
	$(BIN)/python launcher/demo.py --run-dir $(RUN)

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# More workers than cores: the tests of faults wait, and tests/conftest.py alternates their files with files that compute. Files with
# long runs come first, so that no worker ends with one of them. The tests of deadlines (tests/faults) come after the runs of four
# ranks. Byte code is written, because hundreds of processes import it.
test: install
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder \
	  tests/distributed tests/cases tests/faults tests/gpu_like tests/gpu tests/unit

# Two workers, because many of these tests start four ranks. The tests of deadlines come after those.
test-slow: install
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder \
	  -m "slow and not cluster" tests/distributed tests/cases tests/faults tests/gpu_like tests/unit

test-faults: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not cluster" tests/faults tests/distributed/test_resume.py

# Faults at random instants for MINUTES; root and btrfs-progs add full disks and quotas. Figures: docs/faults.md.
MINUTES ?= 25
soak: install
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults.soak --minutes $(MINUTES)

# Real schedulers, engines and browsers from Debian's packages; needs root. Another build of kubectl may be there already.
cluster-packages:
	command -v apt-get >/dev/null || { echo "make test-cluster needs Debian's apt-get; install by hand: $(CLUSTER_PACKAGES)" >&2; exit 78; }
	dpkg-query --show $(CLUSTER_PACKAGES) >/dev/null 2>&1 || \
	  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $(CLUSTER_PACKAGES) >/dev/null; }
	command -v kubectl >/dev/null || DEBIAN_FRONTEND=noninteractive apt-get install -y -qq kubernetes-client >/dev/null

test-cluster: install cluster-packages
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "cluster and not slow"

# Installs the wheel on a bare Debian 13: minutes, and gigabytes of downloads.
test-trixie: install cluster-packages
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "cluster and slow"

bench: install
	$(BIN)/python benchmarks/step.py
	$(BIN)/python benchmarks/moe.py
	$(BIN)/python benchmarks/checkpoint.py
	$(BIN)/python benchmarks/observe.py

# What an image with torch for CUDA usually lacks, for machines without internet: pip install --no-index --no-deps build/gpu-wheels/*.whl
GPU_PYTHON ?= 3.12
GPU_WHEELS := build/gpu-wheels
gpu-wheels: install
	DS_BUILD_OPS=0 $(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps -c constraints.txt -w $(GPU_WHEELS) deepspeed fairscale
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --python-version $(GPU_PYTHON) \
	  -c constraints.txt -d $(GPU_WHEELS) webdataset braceexpand hjson pydantic pydantic_core annotated-types typing-extensions typing-inspection
	ls -l $(GPU_WHEELS)

# The site is docs/_build/index.html. A broken link, a page outside the contents or an undocumented public name fails the build.
docs: install
	$(BIN)/python docs/generate.py
	$(BIN)/python -m sphinx -q -W --keep-going -n -j auto docs docs/_build

clean:
	rm -rf $(VENV) build dist *.egg-info docs/_build docs/generated
