# Each target does its own set-up: a virtual environment in .venv with the pinned packages.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
DEMO_MODEL := --out_dir out/demo --dim 128 --n_layers 6 --tokenizer model/demo/tokenizer --vision_model model/demo/vision_model

.PHONY: setup demo test web bench clean

setup: $(VENV)/ready

$(VENV)/ready: requirements.txt requirements-dev.txt
	@echo "installing packages into $(VENV): 2 GB or more, some minutes"
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-dev.txt
	touch $@

demo: setup
	$(RUN) -m scripts.demo

test: setup
	$(VENV)/bin/ruff check .
	$(RUN) -m pytest

web:
	@test -f out/demo/sft_vlm_128.pth || (echo "error: no demo model yet: run make demo first" && exit 2)
	@$(MAKE) --no-print-directory setup
	$(RUN) web_demo_vlm.py $(DEMO_MODEL)

bench: setup
	$(RUN) -m scripts.bench

clean:
	rm -rf out/demo $(VENV)
