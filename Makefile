# make demo: everything from nothing to captions. make app: the web page. make test: lint and tests.
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python

.PHONY: demo app test lint clean

demo: $(VENV)/installed
	$(RUN) -m mmadapter.demo

app: $(VENV)/installed
	$(RUN) -m app

test: lint
	$(RUN) -m pytest

lint: $(VENV)/installed-dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

$(VENV)/installed: requirements.txt
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -r requirements.txt
	touch $@

$(VENV)/installed-dev: requirements-dev.txt $(VENV)/installed
	$(RUN) -m pip install -r requirements-dev.txt
	touch $@

clean:
	rm -rf $(VENV)
