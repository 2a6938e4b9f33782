# Everything happens in .venv; nothing has to be sourced. CONTRIBUTING.md has the rest.
VENV := .venv
CMAKE := $(shell command -v cmake || echo $(CURDIR)/$(VENV)/bin/cmake)

.PHONY: setup demo test lint bench docs clean

# The first run takes minutes, the next ones nothing.
setup: $(VENV)/.installed

demo: setup
	$(VENV)/bin/cmanp demo

test: setup
	$(VENV)/bin/python scripts/run_tests.py

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/codespell
	$(VENV)/bin/python scripts/check_xml_yaml.py

# With the peers of requirements/evaluate.txt; some 25 minutes.
bench: $(VENV)/.peers
	$(VENV)/bin/cmanp bench

# The pages of docs/ and the API reference, in build/docs/. A warning is an error.
docs: setup
	$(VENV)/bin/sphinx-build -W --keep-going -q -d build/doctrees docs build/docs
	@echo written: build/docs/index.html

$(VENV)/.peers: $(VENV)/.installed requirements/evaluate.txt constraints.txt
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt \
	    -r requirements/evaluate.txt
	@touch $@

clean:
	rm -rf $(VENV) build install log

$(VENV)/.created:
	scripts/create_venv $(VENV)
	@touch $@

$(VENV)/.requirements: $(VENV)/.created constraints.txt $(wildcard requirements/*.txt)
	scripts/install_requirements $(VENV)
	@touch $@

# Generated interfaces, and links to our own modules: edited code is used at once.
$(VENV)/.installed: $(VENV)/.requirements CMakeLists.txt package.xml scripts/executable.py.in \
    $(wildcard msg/*.msg srv/*.srv launch/* config/*)
	scripts/install_into_venv $(VENV) $(CMAKE)
	@touch $@
