# A fresh machine needs Python 3.11+ and make; everything else goes into .venv.
PYTHON ?= python3
VENV ?= .venv
PIP = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: train test parity lint types clean

train: $(VENV)/.run  ## train the embedded VLoRA Vision Transformer on real digits
	$(VENV)/bin/python train.py

test: $(VENV)/.test  ## the test suite
	$(VENV)/bin/python -m pytest -n auto

parity: $(VENV)/.parity  ## the same numbers from torch, PEFT and the authors' own package
	$(VENV)/bin/python -m pytest tests/parity

lint: $(VENV)/.test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(VENV)/.test
	$(VENV)/bin/pyright

clean:  ## remove .venv; runs stay
	rm -rf $(VENV)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing into $(VENV) (a minute or two, once)"
	$(PIP) --editable .
	@touch $@

$(VENV)/.test: $(VENV)/.run
	$(PIP) --editable ".[test]"
	@touch $@

# The reference package of the VLoRA paper declares timm, of which nothing here is used.
$(VENV)/.parity: $(VENV)/.test
	$(PIP) --editable ".[test,parity]"
	$(PIP) --no-deps vlora==0.1.2
	@touch $@
