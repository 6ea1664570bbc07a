# Each target does its own set-up: a virtual environment in .venv with the pinned packages.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
REQUIREMENTS := requirements.txt requirements-data.txt requirements-metrics.txt requirements-export.txt \
	requirements-serve.txt requirements-dev.txt
# What exported models are tried with besides, each in a folder of its own: the last transformers
# before 5, and lmms-eval. The rest of what they need comes from .venv.
OLD_TRANSFORMERS := transformers==4.57.6 tokenizers==0.22.2 huggingface_hub==0.36.2
BESIDE := $(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target

.PHONY: setup demo demo-multi lesson test test-all web bench docs clean

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

# One thread for each process: the tests run side by side on all cores. What takes minutes, or needs
# more programs than Python, is marked slow: `make test-all`.
test: CHOICE := -m "not slow"
test: setup
test-all: setup $(VENV)/transformers-4.57/ready $(VENV)/lmms-eval/ready
test test-all:
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n logical $(CHOICE)

$(VENV)/transformers-4.57/ready: $(VENV)/ready
	$(BESIDE) $(@D) $(OLD_TRANSFORMERS)
	touch $@

$(VENV)/lmms-eval/ready: $(VENV)/ready requirements-lmms-eval.txt
	$(BESIDE) $(@D) -r requirements-lmms-eval.txt
	touch $@

# With the demo's model, or the one that is shipped if there is none.
web: setup
	$(RUN) web_demo_vlm.py --out_dir $(firstword $(wildcard out/demo) model/demo)

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
