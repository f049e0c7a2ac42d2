# Every target sets itself up in .venv from a fresh clone, and does nothing twice.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt
OUT ?= runs/demo

.PHONY: help demo test lint bench bench-gpu notebooks docs clean
help:
	@echo "make demo       train FM, OT, C2OT and W-CFM on 8 gaussians -> moons; table, picture, JSON in $(OUT)"
	@echo "make test       the whole test-suite"
	@echo "make lint       ruff and mypy"
	@echo "make bench      side-by-side timings against the peers; results in benchmarks/results"
	@echo "make bench-gpu  everything measured on a CUDA card, in nine minutes; results in benchmarks/results"
	@echo "make notebooks  execute the notebooks in examples/notebooks"
	@echo "make docs       the documentation as a site in build/site"

demo: $(VENV)/.test
	$(BIN)/python examples/demo.py --out $(OUT)

test: $(VENV)/.test $(VENV)/.triton
	@# Two processes of one thread each: small problems leave a second thread idle.
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.bench
	$(BIN)/python benchmarks/run.py

bench-gpu: $(VENV)/.bench $(VENV)/.gpu-peers
	$(BIN)/python benchmarks/gpu.py

notebooks: $(VENV)/.notebooks
	$(BIN)/python examples/notebooks/execute.py

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

# One stamp a set of extras: installed again only when the project's requirements change.
$(VENV)/.%: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@# torch by its constraint first: whatever resolves a newer one pulls gigabytes of CUDA packages
	$(PIP) torch
	$(PIP) -e '.[$*]'
	@touch $@

# Triton's interpreter runs the tests of the GPU kernels, and torch's CPU builds come without it. Not in constraints.txt:
# torch's CUDA builds bring a version of their own.
$(VENV)/.triton: $(VENV)/.test
	@$(BIN)/python -c "import triton" 2> /dev/null || $(PIP) triton==3.9.0 || echo "no Triton here: its tests are skipped"
	@touch $@

# Peers of the GPU benchmarks, each where it can be had: a table says which were not.
$(VENV)/.gpu-peers: $(VENV)/.bench
	@for peer in flash-sinkhorn pykeops torch-linear-assignment; do $(PIP) $$peer || echo "without $$peer"; done
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
