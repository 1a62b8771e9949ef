# make demo: a first run on drawn data.   make test: the whole suite.   Both install requirements-tested.txt into .venv.
# make clean: removes the environments and caches, no run and no data set.
# make test-oldest, make test-newest: the whole suite with the oldest and the newest libraries, in .venv-oldest and .venv-newest.
PYTHON ?= python3
VENV := .venv
PIP_INSTALL := bin/pip install --quiet --disable-pip-version-check

.PHONY: demo test test-oldest test-newest lint clean

demo: $(VENV)/.installed
	$(VENV)/bin/python perpeft_lora_ia3.py --dataset demo --peft_type lora --device cpu
	$(VENV)/bin/python -m scripts.report runs/demo_lora_lr0.001_wd0.0001_seed0 --device cpu

test: $(VENV)/.installed-tests lint
	$(VENV)/bin/python -m pytest -n 2

test-oldest: .venv-oldest/.installed
	.venv-oldest/bin/python -m pytest -n 2

test-newest: .venv-newest/.installed
	.venv-newest/bin/python -m pytest -n 2

lint: $(VENV)/.installed-tests
	$(VENV)/bin/ruff check .

$(VENV)/.installed: requirements-tested.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/$(PIP_INSTALL) -r requirements-tested.txt
	touch $@

$(VENV)/.installed-tests: $(VENV)/.installed tests/requirements.txt
	$(VENV)/$(PIP_INSTALL) -r tests/requirements.txt
	touch $@

# torch first, as on a machine that has one: requirements.txt must keep it
.venv-oldest/.installed: requirements.txt constraints-torch2.2.txt tests/requirements.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/$(PIP_INSTALL) torch==2.2.0 numpy==1.26.3 transformers==4.49.0 peft==0.18.1
	.venv-oldest/$(PIP_INSTALL) -r requirements.txt -r tests/requirements.txt -c constraints-torch2.2.txt
	touch $@

.venv-newest/.installed: requirements.txt tests/requirements.txt
	$(PYTHON) -m venv .venv-newest
	.venv-newest/$(PIP_INSTALL) --upgrade -r requirements.txt -r tests/requirements.txt
	touch $@

clean:
	rm -rf $(VENV) .venv-oldest .venv-newest .pytest_cache .ruff_cache
