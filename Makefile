# make demo: a first run on drawn data.   make test: the whole suite.   Both install what they need into .venv.
PYTHON ?= python3
VENV := .venv

.PHONY: demo test lint clean

demo: $(VENV)/.installed
	$(VENV)/bin/python perpeft_lora_ia3.py --dataset demo --peft_type lora --device cpu
	$(VENV)/bin/python -m scripts.report runs/demo_lora_lr0.001_wd0.0001_seed0 --device cpu

test: $(VENV)/.installed-tests lint
	$(VENV)/bin/python -m pytest

lint: $(VENV)/.installed-tests
	$(VENV)/bin/ruff check .

$(VENV)/.installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/.installed-tests: $(VENV)/.installed tests/requirements.txt
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -r tests/requirements.txt
	touch $@

clean:
	rm -rf $(VENV) runs dataset/demo*
