# Each target works in a fresh clone, without another having run first.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
SOURCES := _config.yml _toc.yml $(shell find book mmu -type f -not -path '*/__pycache__/*' -not -path '*/.ipynb_checkpoints/*')
CHAPTERS := $(sort $(wildcard book/*.ipynb))

# A hundred interpreters start in `make test`; each would compile the package anew where this is set.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: book test site bench measure wheel lab chapters text fold capture lint clean

book: _build/html/index.html
	@echo "The book is built. Open: file://$(CURDIR)/_build/html/index.html"

test: $(READY) _build/html/index.html
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .
	@$(BIN)/python -m pytest tests mmu --nbval $(CHAPTERS) -n auto --dist loadfile $(TESTFLAGS)

# Exactly what is to be published, in _build/site.
site: $(READY)
	FPF_SITE=1 $(BIN)/jupyter-book build . --path-output _build/publish --all -W -n --keep-going --quiet
	$(BIN)/python book/_tools/site.py _build/publish/_build/html _build/site

# The package against its peers; kept out of `make test`.
bench: $(READY) _build/html/index.html
	$(BIN)/python -m tests.bench

# How cost grows, into book/data/measured.json, which chapters draw; best on a quiet machine. Then `make chapters`.
measure: $(READY)
	$(BIN)/python -m tests.bench --measure

# The package alone: built, installed without the book, and tested.
wheel: $(READY)
	rm -rf _build/wheel && $(PYTHON) -m venv _build/wheel/venv
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir _build/wheel .
	_build/wheel/venv/bin/python -m pip install --quiet --disable-pip-version-check pytest hypothesis _build/wheel/*.whl
	cd tests && ../_build/wheel/venv/bin/python -m pytest -q -c ../pyproject.toml --rootdir .. -p no:cacheprovider \
	  --ignore browser --ignore bench .

lab: $(READY)
	$(BIN)/jupyter lab --ip=127.0.0.1 book

# Execute the chapters, normalise what they print and store it in them.
chapters: $(READY)
	$(BIN)/python book/_tools/chapters.py run $(CHAPTERS)

# Chapters as text: `make text` writes _build/text/*.md, `make fold` takes the edited ones back and executes them.
text: $(READY)
	$(BIN)/python book/_tools/chapters.py text $(CHAPTERS)

fold: $(READY)
	$(BIN)/python book/_tools/chapters.py fold $(CHAPTERS) $(patsubst _build/text/%.md,book/%.ipynb,$(wildcard _build/text/*.md))

# Record a real KVM under software emulation, and hold it against its prediction: CONFIG, SCENARIOS, KERNEL, SEED, OUT.
capture: $(READY)
	$(BIN)/python capture/capture.py --check $(foreach option,CONFIG SCENARIOS KERNEL SEED OUT,\
	  $(if $($(option)),--$(shell echo $(option) | tr A-Z a-z) "$($(option))"))

lint: $(READY)
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

clean:
	rm -rf _build $(VENV) *.egg-info .pytest_cache .hypothesis .ruff_cache

_build/html/index.html: $(READY) $(SOURCES)
	$(BIN)/jupyter-book build . --all -W -n --keep-going --quiet

$(READY): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$$($(PYTHON) --version) is too old: Fast Page Fault needs Python 3.11 or newer (make PYTHON=python3.12 ...)"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "This Python cannot make environments; on Debian the package python3-venv adds that."; \
	  [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq && apt-get install -y -qq python3-venv; }
	$(PYTHON) -m venv $(VENV)
	@# The pip of Python 3.11 takes twice as long. What is never imported is never compiled.
	$(BIN)/python -m pip install -qq --disable-pip-version-check pip==26.3
	$(BIN)/python -m pip install -qq --disable-pip-version-check --no-compile -r requirements.txt
	@touch $@
