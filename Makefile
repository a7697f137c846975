# Two commands do everything on a machine with git, make and Python >= 3.10: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
INSTALLED := $(VENV)/.installed

.PHONY: demo test lint clean

demo: $(INSTALLED)
	$(VENV)/bin/python -m nnunet_fratmae.demo demo_output

test: $(INSTALLED)
	$(VENV)/bin/python -m ruff check .
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# Made anew only when the dependencies change, so that the second time needs no network
$(INSTALLED): setup.py pyproject.toml
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VENV)/bin/python -m pip install --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV) demo_output build *.egg-info
