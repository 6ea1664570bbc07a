# Each target does its own set-up: a virtual environment in .venv with the pinned packages.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
REQUIREMENTS := requirements.txt requirements-data.txt requirements-metrics.txt requirements-export.txt \
	requirements-serve.txt requirements-dev.txt

.PHONY: setup demo demo-multi lesson test web bench docs clean

setup: $(VENV)/ready

$(VENV)/ready: $(REQUIREMENTS)
	@echo "installing packages into $(VENV): 2 GB or more, some minutes"
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check $(addprefix -r ,$(REQUIREMENTS))
	touch $@

demo: setup
	$(RUN) -m scripts.demo

# Afterwards: the model learns to compare two images.
demo-multi: setup
	$(RUN) -m scripts.demo --multi

# One thread for each process: the tests run side by side on all cores.
test: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n logical

web:
	@test -f out/demo/sft_vlm_128.pth || (echo "error: no demo model yet: run make demo first" && exit 2)
	@$(MAKE) --no-print-directory setup
	$(RUN) web_demo_vlm.py --out_dir out/demo

# A class in a notebook; the browser opens by itself.
lesson: setup
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-lesson.txt
	$(RUN) -m jupyterlab docs/lesson.ipynb

bench: setup
	$(RUN) -m scripts.bench

docs: setup
	$(RUN) -m scripts.docs

clean:
	rm -rf out/demo $(VENV)
