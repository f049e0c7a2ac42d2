# Every target sets itself up in .venv from a fresh clone, and does nothing twice.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt
OUT ?= runs/demo

.PHONY: help demo test test-quick test-lowest lint bench bench-gpu notebooks docs dist check-dist clean
help:
	@echo "make demo       train FM, OT, C2OT and W-CFM on 8 gaussians -> moons; table, picture, JSON in $(OUT)"
	@echo "make test       the whole test-suite: about 12 minutes on two cores"
	@echo "make test-quick one file a part of the library: under two minutes"
	@echo "make test-lowest  the whole suite with the lowest versions that pyproject.toml allows"
	@echo "make lint       ruff and mypy"
	@echo "make bench      side-by-side timings against the peers; results in benchmarks/results"
	@echo "make bench-gpu  everything measured on a CUDA card, in nine minutes; results in benchmarks/results"
	@echo "make notebooks  execute the notebooks in examples/notebooks"
	@echo "make docs       the documentation as a site in build/site"
	@echo "make dist       wheel and sdist in dist/"
	@echo "make check-dist the wheel in an environment of its own, outside the clone"

demo: $(VENV)/.examples
	$(BIN)/python examples/demo.py --out $(OUT)

test: $(VENV)/.test $(VENV)/.triton
	@# Two processes of one thread each: small problems leave a second thread idle.
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2 --dist worksteal

# What a change breaks first: the exact toys of transports, couplings, flows and encoders.
QUICK := tests/test_package.py tests/test_architecture.py tests/mbot/test_exact.py tests/mbot/test_losses.py tests/mbot/test_couplings.py \
         tests/flows/test_matching.py tests/flows/test_integrate.py tests/setenc/test_pooling.py tests/setenc/test_encoder.py

test-quick: $(VENV)/.test
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2 --dist worksteal $(QUICK)

# In an environment of its own. Old versions warn and break elsewhere: pytest and the like stay those of constraints.txt.
test-lowest:
	@test -x build/lowest/bin/python || $(PYTHON) -m venv build/lowest
	build/lowest/bin/pip install --quiet --disable-pip-version-check -c constraints.txt torch pytest pytest-xdist hypothesis matplotlib
	build/lowest/bin/pip install --quiet --disable-pip-version-check --only-binary numpy,scipy,POT,numba,scikit-learn,pillow -c constraints-lowest.txt -e .
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive build/lowest/bin/python -m pytest -n 2 --dist worksteal tests/mbot tests/flows \
	  tests/setenc tests/contracts

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

dist: $(VENV)/.examples
	$(PIP) build
	rm -rf dist
	$(BIN)/python -m build --outdir dist .

check-dist: dist
	$(BIN)/python tests/check_dist.py dist

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
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
