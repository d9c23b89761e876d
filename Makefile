PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo serve test whole common clients versions docs screenshots lint bench results nano clean

demo: .venv/.runtime  ## draw pictures from words, then describe one of them
	$(BIN)/python examples/demo.py

serve: .venv/.serve  ## nano over HTTP, on this machine only
	$(BIN)/emu3 serve nano

test: .venv/.installed  ## every test
	$(BIN)/python -m pytest -n 2 --dist loadfile

whole: .venv/.installed  ## fine-tuning at the released model's width, two layers of it; minutes and 10 GB of memory
	$(BIN)/python -m pytest -m whole

common: .venv/.installed  ## transformers' common model tests, on these classes and on its own
	$(BIN)/python tests/common/run.py

clients: .venv/.installed  ## LiteLLM and Open WebUI for real, in environments of their own; about 4 GB
	$(BIN)/python tests/clients/litellm_proxy.py
	$(BIN)/python tests/clients/open_webui.py

versions: .venv/.installed  ## the tests that transformers could break, under its oldest supported, 5.23 and newest release
	$(BIN)/python tests/versions.py

docs: .venv/.installed  ## the reference, from the docstrings, into out/reference/
	$(BIN)/python docs/reference.py

screenshots: .venv/.installed  ## the pictures of the page in the docs; needs Chromium
	$(BIN)/python docs/screenshots.py

lint: .venv/.installed  ## style, types, import directions
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: .venv/.installed  ## speed, as a ratio against transformers on the same weights
	$(BIN)/python benchmarks/generation.py nano
	$(BIN)/python benchmarks/generation.py wide --rounds 2
	$(BIN)/python benchmarks/vision.py
	$(BIN)/python benchmarks/vision.py --size 512 --memory
	$(BIN)/emu3 bench nano

results: .venv/.installed  ## measure nano: docs/results/report.md, and report.html beside it; ten minutes on two cores
	$(BIN)/emu3 eval nano -o docs/results

nano: .venv/.installed  ## train the shipped checkpoint again; a quarter of an hour on an H100, more than a day on two cores
	set -e; for recipe in vision clips shards tales language checkpoint draft; do $(BIN)/emu3 train recipes/nano/$$recipe.toml; done

# A stamp is written last, so an interrupted installation starts again and a finished one is left alone.
.venv/.runtime: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --constraint constraints.txt --editable .
	touch $@

.venv/.serve: .venv/.runtime
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[serve]'
	touch $@

.venv/.installed: .venv/.runtime
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv out build dist
