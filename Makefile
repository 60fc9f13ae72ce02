# `make` alone prints help. Values reach the shell through the environment and are never spliced into a command.
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup run 01 02 03 04 05 06 train weights picture sweep test test-all soak lab params doctor validate submission bench docs mlflow lint lock audit clean

PRESET ?= demo
NB ?= 04
export PRESET NB

VENV_PYTHON := .venv/bin/python
PIP_INSTALL := $(VENV_PYTHON) -m pip install --quiet --disable-pip-version-check
LDM := $(VENV_PYTHON) -m ldm_lib
PICTURE := $${LDM_OUTPUTS:-outputs}/picture
# Not reordered: the pipeline has few tests that take minutes, and would run last and alone.
TWO_AT_ONCE := --numprocesses 2 --dist loadfile --no-loadscope-reorder
# RUN, PRESET, DATA_DIR, CONDITIONING_DIR, BRAINS, OVERWRITE=1 and SET="key=value key=value" apply to run, 01 to 06 and train.
define STAGES
set -f --; \
for pair in $$SET; do set -- "$$@" --set "$$pair"; done; \
for name in DATA_DIR CONDITIONING_DIR BRAINS BATCH_SIZE LEARNING_RATE MAX_EPOCHS ACCUMULATE_GRAD_BATCHES DEVICES; do \
  eval "value=\$${$$name:-}"; key=$$(printf %s "$$name" | tr A-Z a-z); [ $$name = BRAINS ] && key=brains_dir; \
  if [ -n "$$value" ]; then set -- "$$@" --set "$$key=$$value"; fi; \
done; \
if [ -n "$$OVERWRITE" ]; then set -- "$$@" --overwrite; fi; \
exec $(LDM) run $(1) --run "$${RUN:-$$PRESET}" --preset "$$PRESET" "$$@"
endef

help: ## print this list
	@echo "make TARGET [PRESET=smoke|demo|coarse|weights|people|full] [RUN=name] [DATA_DIR=...] [CONDITIONING_DIR=...] [BRAINS=...] [SET=\"key=value ...\"] [OVERWRITE=1]"
	@awk -F ':.*## ' '/^[a-z0-9][a-z0-9 -]*:.*## / {printf "  %-22s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: .venv/ready ## create .venv and install everything (other targets do it when needed); LOCKED=1 uses requirements.lock

.venv/ready: pyproject.toml
	@set -e; for python in "$$PYTHON" python3.11 python3.12 python3.13 python3; do \
	  if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then found=$$python; break; fi; \
	done; \
	if [ -z "$$found" ]; then echo "ERROR no Python 3.11 or newer found. Fix: install one, or make PYTHON=/path/to/python3" >&2; exit 1; fi; \
	echo "setting up .venv with $$("$$found" --version); this takes a few minutes once"; \
	"$$found" -m venv .venv; \
	case "$$LOCKED" in \
	  ''|0) $(PIP_INSTALL) --editable '.[dev]' ;; \
	  *) $(PIP_INSTALL) --require-hashes --requirement requirements.lock; \
	     $(PIP_INSTALL) --no-deps --no-build-isolation --editable . ;; \
	esac
	@touch $@

run: .venv/ready ## run all six notebooks on the synthetic cohort, on DATA_DIR=... or on people in BRAINS=... (default: PRESET=demo)
	@$(call STAGES,)

01 02 03 04 05 06: .venv/ready ## run one stage: 01 audit, 02 autoencoder, 03 conditioning, 04 training, 05 sampling, 06 evaluation
	@$(call STAGES,$@)

train: .venv/ready ## run stages 01 to 04 with BATCH_SIZE, LEARNING_RATE, MAX_EPOCHS, ACCUMULATE_GRAD_BATCHES, DEVICES
	@$(call STAGES,01 02 03 04)

weights: .venv/ready ## train the pretrained weights: further, on people with BRAINS=...; or from scratch, on synthetic patients
	@if [ -n "$$DATA_DIR" ]; then \
	  echo "ERROR DATA_DIR is set; pretrained weights are made from synthetic patients or BRAINS only. Fix: unset it, or make train PRESET=weights" >&2; exit 1; fi
	@PRESET=weights; if [ -n "$$BRAINS" ]; then PRESET=people; fi; \
	($(call STAGES,01 02 03 04)) && \
	  rm -f ldm_lib/pretrained/README.md && exec $(LDM) export "$${LDM_OUTPUTS:-outputs}/$${RUN:-$$PRESET}/04_training/model" --output ldm_lib/pretrained --temperature 0.6

picture: .venv/ready ## draw README's first figure from a healthy person's scan, BRAIN=FILE; without it, a synthetic patient for the gallery
	@set -e; \
	if [ -n "$$BRAIN" ]; then \
	  figure=person; made="$(PICTURE)/$$(basename -- "$$BRAIN")"; mkdir -p "$$made/scan"; cp -- "$$BRAIN" "$$made/scan/"; \
	  $(LDM) cohort --from "$$made/scan" --output "$$made" --masks 1; \
	else \
	  figure=synthetic; made="$(PICTURE)/01_data_audit/synthetic"; \
	  $(LDM) run 01 --run picture --preset weights --set synthetic_first=9001 --set synthetic_patients=2 --set masks_per_patient=1; \
	fi; \
	$(LDM) evaluate "$$made/data" --output "$$made/filled" --samples 8 --temperature 1 --steps 16 --pictures 1; \
	cp -- "$$made"/filled/*.png "docs/$$figure.png"

sweep: .venv/ready ## run many parameter sets and write one table: make sweep GRID=docs/sweep.yaml JOBS=2
	@if [ -z "$$GRID" ]; then echo "ERROR GRID is empty. Fix: make sweep GRID=docs/sweep.yaml JOBS=2" >&2; exit 1; fi
	@exec $(LDM) sweep "$$GRID" --jobs "$${JOBS:-1}"

test: .venv/ready ## run the fast tests and one tiny pipeline; under 8 minutes
	@$(VENV_PYTHON) -m pytest -m "not slow" $(TWO_AT_ONCE)

test-all: .venv/ready ## run every test
	@$(VENV_PYTHON) -m pytest $(TWO_AT_ONCE)

soak: .venv/ready ## inpaint 200 cases, one in five invalid, and kill a pipeline 30 times; 1 to 2 hours
	@exec $(VENV_PYTHON) tests/support/soak.py all

lab: .venv/ready ## open JupyterLab on 127.0.0.1 with a token; LAB_OPTIONS="--no-browser --port=8890"
	@case "$$(id -u) $$LAB_OPTIONS " in *" --allow-root "*) ;; "0 "*) \
	  echo "ERROR lab: JupyterLab does not start as root, as in many containers. Fix: make lab LAB_OPTIONS=\"$${LAB_OPTIONS:+$$LAB_OPTIONS }--allow-root\"" >&2; exit 1 ;; esac
	@umask 077; set -f; exec .venv/bin/jupyter lab $$LAB_OPTIONS --ServerApp.ip=127.0.0.1 --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/notebooks/01_data_audit.ipynb

params: .venv/ready ## list the parameters of a stage: make params NB=04 PRESET=full
	@exec $(LDM) params "$$NB" --preset "$$PRESET"

doctor: .venv/ready ## check the installation and this machine
	@exec $(LDM) doctor

validate: .venv/ready ## check every case of DATA_DIR; SET="assume_orientation=LPS nan_as_zero=true" relaxes the checks
	@if [ -z "$$DATA_DIR" ]; then echo "ERROR DATA_DIR is empty. Fix: make validate DATA_DIR=/path/to/cases" >&2; exit 1; fi
	@set -f --; \
	for pair in $$SET; do \
	  option=--$$(printf %s "$${pair%%=*}" | tr _ -); \
	  case "$$pair" in *=true) set -- "$$@" "$$option" ;; *=false) ;; *) set -- "$$@" "$$option=$${pair#*=}" ;; esac; \
	done; \
	exec $(LDM) validate "$$DATA_DIR" --conditioning-dir "$$CONDITIONING_DIR" "$$@"

submission: .venv/ready ## check and zip inpainted cases: make submission DATA_DIR=... RESULTS=... [OUTPUT=F.zip]
	@if [ -z "$$DATA_DIR" ] || [ -z "$$RESULTS" ]; then \
	  echo "ERROR DATA_DIR or RESULTS is empty. Fix: make submission DATA_DIR=/path/to/cases RESULTS=/path/to/results" >&2; exit 1; fi
	@exec $(LDM) submission --data "$$DATA_DIR" --results "$$RESULTS" $${OUTPUT:+--output "$$OUTPUT"}

bench: .venv/ready ## measure a case from start to exit, and speed and memory at full size as ratios to common implementations; 10 GB, 20 minutes (FULL=1: longer)
	@exec $(VENV_PYTHON) -m benchmarks $$(case "$$FULL" in ''|0) ;; *) echo --full ;; esac)

docs: .venv/ready ## build the documentation into site/; warnings are errors
	@.venv/bin/mkdocs --version >/dev/null 2>&1 || $(PIP_INSTALL) --editable '.[docs]'
	@NO_MKDOCS_2_WARNING=1 exec .venv/bin/mkdocs build --strict --quiet

mlflow: .venv/ready ## browse tracked metrics and images on 127.0.0.1:5000
	@umask 077; MLFLOW_DISABLE_TELEMETRY=true .venv/bin/mlflow ui --host 127.0.0.1 --port 5000 --workers 1 \
	  --backend-store-uri "sqlite:///$$PWD/outputs/mlflow.db" --serve-artifacts --artifacts-destination "$$PWD/outputs/mlflow"

lint: .venv/ready ## check style (ruff), types (mypy) and that notebooks hold no outputs
	@$(VENV_PYTHON) -m ruff check . && $(VENV_PYTHON) -m ruff format --check .
	@$(VENV_PYTHON) -m mypy
	@.venv/bin/nbstripout --verify --keep-id --extra-keys "metadata.papermill cell.metadata.papermill" notebooks/*.ipynb

define LOCK_HEAD
# Every package of the tested set with its sha256, for Linux x86-64 (glibc 2.28 or newer) and CPython 3.11; by `make lock`.
#   make setup LOCKED=1                                   or, in a virtual environment of your own:
#   pip install --require-hashes -r requirements.lock && pip install --no-deps --no-build-isolation -e .
# torch is the build on PyPI, for CUDA 13, and brings its libraries (nvidia-*, cuda-*, triton) to machines without a GPU
# too. Where the set was tested with torch's CPU build, this is the same version of it; all else is what was tested.
endef

lock: export HEAD = $(LOCK_HEAD)
lock: .venv/ready ## write requirements.lock: the packages of .venv with hashes, for Linux x86-64 and CPython 3.11
	@$(VENV_PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' \
	  || { echo "ERROR the lock is for CPython 3.11. Fix: rm -rf .venv && make PYTHON=python3.11 lock" >&2; exit 1; }
	@$(VENV_PYTHON) -m pip list --exclude-editable --format freeze | sed 's/+.*//' > .venv/tested.txt
	@$(PIP_INSTALL) --editable '.[lock]'
	@printf '%s\n' "$$HEAD" > .venv/requirements.lock
	@.venv/bin/uv pip compile pyproject.toml --extra dev --constraints .venv/tested.txt --generate-hashes --quiet \
	  --only-binary :all: --emit-build-options --no-emit-index-url --no-config --no-header --no-annotate \
	  --python $(VENV_PYTHON) --python-platform x86_64-manylinux_2_28 >> .venv/requirements.lock
	@mv .venv/requirements.lock requirements.lock

audit: .venv/ready ## look up known vulnerabilities of the packages in requirements.lock; needs the network
	@$(PIP_INSTALL) --editable '.[audit]'
	@.venv/bin/pip-audit --strict --disable-pip --require-hashes --requirement requirements.lock

clean: ## remove caches and builds, never outputs or data
	rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis build dist site *.egg-info
	find ldm_lib tests notebooks \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +
