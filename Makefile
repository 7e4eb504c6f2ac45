# make demo: train, sample and score on the example in data/.   make test: all checks and tests.
# make test LOCKED=1: with the very files of requirements-dev.lock.txt.   make lock: write that list anew.
# make coverage: which lines of the package the tests run.
PYTHON ?= python3
VENV ?= .venv
PY = $(VENV)/bin/python
OUT ?= results/demo

.PHONY: demo test check coverage lock clean

demo: $(VENV)/ready
	$(PY) scripts/segmentation_train.py --preset small --data_dir data/training --out_dir $(OUT) \
		--crop wolleb --max_steps 500
	$(PY) scripts/segmentation_sample.py --preset small --data_dir data/testing --model_path $(OUT) --out_dir $(OUT)
	$(PY) scripts/segmentation_env.py --inp_pth $(OUT) --out_pth data/testing

test: check
	$(PY) -m pytest -n auto

check: $(VENV)/ready-to-test
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

coverage: $(VENV)/ready-to-test
	$(PY) -m pytest -n auto --cov --cov-report=term:skip-covered --cov-fail-under=95

lock: $(VENV)/ready-to-test
	$(PY) -m pip install --quiet --disable-pip-version-check uv==0.13.9
	$(PY) docs/lock.py

$(VENV)/ready: requirements.txt
	$(call install,-r requirements.txt)

$(VENV)/ready-to-test: requirements.txt requirements-dev.txt
	$(call install,$(if $(LOCKED),--require-hashes -r requirements-dev.lock.txt,-r requirements-dev.txt))
	touch $(VENV)/ready

# One line says which Python is used; an old one is refused before anything is installed.
define install
	@$(PYTHON) -c 'import sys; v = sys.version_info; \
	print("$(PYTHON) is Python %d.%d (3.11 or newer is needed)" % v[:2]); sys.exit(v < (3, 11))'
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check $(1)
	touch $@
endef

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info
