# `make` alone prints this help. Values reach the shell through the environment, never spliced into a command.
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup run 01 02 03 04 05 06 train weights picture sweep test test-all soak lab params doctor validate submission bench mlflow lint lock audit clean

PRESET ?= demo
NB ?= 04
export PRESET NB

VENV_PYTHON := .venv/bin/python
PIP_INSTALL := $(VENV_PYTHON) -m pip install --quiet --disable-pip-version-check
LDM := $(VENV_PYTHON) -m ldm_lib
PICTURE := $${LDM_OUTPUTS:-outputs}/picture
# Not reordered, or the pipeline, few tests of minutes, would come last and alone.
TWO_AT_ONCE := --numprocesses 2 --dist loadfile --no-loadscope-reorder
# RUN, PRESET, DATA_DIR, CONDITIONING_DIR, OVERWRITE=1 and SET="key=value key=value" apply to run, 01 to 06 and train.
define STAGES
set -f --; \
for pair in $$SET; do set -- "$$@" --set "$$pair"; done; \
for name in DATA_DIR CONDITIONING_DIR BATCH_SIZE LEARNING_RATE MAX_EPOCHS ACCUMULATE_GRAD_BATCHES DEVICES; do \
  eval "value=\$${$$name:-}"; key=$$(printf %s "$$name" | tr A-Z a-z); \
  if [ -n "$$value" ]; then set -- "$$@" --set "$$key=$$value"; fi; \
done; \
if [ -n "$$OVERWRITE" ]; then set -- "$$@" --overwrite; fi; \
exec $(LDM) run $(1) --run "$${RUN:-$$PRESET}" --preset "$$PRESET" "$$@"
endef

help: ## this list
	@echo "make TARGET [PRESET=smoke|demo|coarse|weights|full] [RUN=name] [DATA_DIR=...] [CONDITIONING_DIR=...] [SET=\"key=value ...\"] [OVERWRITE=1]"
	@awk -F ':.*## ' '/^[a-z0-9][a-z0-9 -]*:.*## / {printf "  %-22s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: .venv/ready ## create .venv and install everything (done by the others when needed); LOCKED=1 as requirements.lock says

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

run: .venv/ready ## all six notebooks: synthetic cohort, or DATA_DIR=... (PRESET=demo by default)
	@$(call STAGES,)

01 02 03 04 05 06: .venv/ready ## one stage of a run: 01 audit, 02 autoencoder, 03 conditioning, 04 training, 05 sampling, 06 scores
	@$(call STAGES,$@)

train: .venv/ready ## stages 01 to 04 with BATCH_SIZE, LEARNING_RATE, MAX_EPOCHS, ACCUMULATE_GRAD_BATCHES, DEVICES
	@$(call STAGES,01 02 03 04)

weights: override export PRESET = weights
weights: .venv/ready ## train what ships: two hours of synthetic cohort, then minutes on a GPU or a day on 2 cores
	@if [ -n "$$DATA_DIR" ]; then \
	  echo "ERROR DATA_DIR is set; what ships knows synthetic patients only. Fix: unset it, or make train PRESET=weights" >&2; exit 1; fi
	@($(call STAGES,01 02 03 04)) && \
	  exec $(LDM) ship "$${LDM_OUTPUTS:-outputs}/$${RUN:-$$PRESET}/04_training/model" --temperature 0.6

picture: .venv/ready ## README's first picture: a synthetic patient never trained on, filled by the shipped weights; 5 minutes
	@set -e; \
	$(LDM) run 01 --run picture --preset weights --set synthetic_first=9001 --set synthetic_patients=2 --set masks_per_patient=1; \
	$(LDM) evaluate "$(PICTURE)/01_data_audit/synthetic/data" --output "$(PICTURE)/filled" --samples 16 --pictures 1; \
	cp "$(PICTURE)/filled/Synthetic_09001-0000.png" docs/filled.png

sweep: .venv/ready ## many runs, one table: make sweep GRID=docs/sweep.yaml JOBS=2
	@if [ -z "$$GRID" ]; then echo "ERROR GRID is empty. Fix: make sweep GRID=docs/sweep.yaml JOBS=2" >&2; exit 1; fi
	@exec $(LDM) sweep "$$GRID" --jobs "$${JOBS:-1}"

test: .venv/ready ## fast tests and one tiny pipeline, under 8 minutes
	@$(VENV_PYTHON) -m pytest -m "not slow" $(TWO_AT_ONCE)

test-all: .venv/ready ## every test
	@$(VENV_PYTHON) -m pytest $(TWO_AT_ONCE)

soak: .venv/ready ## 200 mixed cases, one in five bad, and a pipeline killed at 30 moments; an hour or two, prints the figures
	@exec $(VENV_PYTHON) tests/support/soak.py all

lab: .venv/ready ## JupyterLab on the notebooks, on 127.0.0.1 with a token
	@umask 077; .venv/bin/jupyter lab --ServerApp.ip=127.0.0.1 --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/notebooks/01_data_audit.ipynb

params: .venv/ready ## parameters of a stage: make params NB=04 PRESET=full
	@exec $(LDM) params "$$NB" --preset "$$PRESET"

doctor: .venv/ready ## check installation and machine
	@exec $(LDM) doctor

validate: .venv/ready ## check every case of DATA_DIR
	@if [ -z "$$DATA_DIR" ]; then echo "ERROR DATA_DIR is empty. Fix: make validate DATA_DIR=/path/to/cases" >&2; exit 1; fi
	@exec $(LDM) validate "$$DATA_DIR" --conditioning-dir "$$CONDITIONING_DIR"

submission: .venv/ready ## check and zip what was filled: make submission DATA_DIR=... RESULTS=... [OUTPUT=F.zip]
	@if [ -z "$$DATA_DIR" ] || [ -z "$$RESULTS" ]; then \
	  echo "ERROR DATA_DIR or RESULTS is empty. Fix: make submission DATA_DIR=/path/to/cases RESULTS=/path/to/results" >&2; exit 1; fi
	@exec $(LDM) submission --data "$$DATA_DIR" --results "$$RESULTS" $${OUTPUT:+--output "$$OUTPUT"}

bench: .venv/ready ## a case, autoencoder and training step beside what is commonly done, as ratios; 10 GB, 15 minutes, FULL=1 longer
	@exec $(LDM) bench $$(case "$$FULL" in ''|0) ;; *) echo --full ;; esac)

mlflow: .venv/ready ## browse tracked figures and panels on 127.0.0.1:5000
	@umask 077; MLFLOW_DISABLE_TELEMETRY=true .venv/bin/mlflow ui --host 127.0.0.1 --port 5000 --workers 1 \
	  --backend-store-uri "sqlite:///$$PWD/outputs/mlflow.db" --serve-artifacts --artifacts-destination "$$PWD/outputs/mlflow"

lint: .venv/ready ## ruff, and notebooks without outputs
	@$(VENV_PYTHON) -m ruff check . && $(VENV_PYTHON) -m ruff format --check .
	@.venv/bin/nbstripout --verify --keep-id --extra-keys "metadata.papermill cell.metadata.papermill" notebooks/*.ipynb

define LOCK_HEAD
# Every package of the tested set with its sha256, for Linux x86-64 (glibc 2.28 or newer) and CPython 3.11; by `make lock`.
#   make setup LOCKED=1                                   or, in a virtual environment of your own:
#   pip install --require-hashes -r requirements.lock && pip install --no-deps --no-build-isolation -e .
# torch is the build on PyPI, for CUDA 13, and brings its libraries (nvidia-*, cuda-*, triton) to machines without a GPU
# too. Where the set was tested with torch's CPU build, this is the same version of it; all else is what was tested.
endef

lock: export HEAD = $(LOCK_HEAD)
lock: .venv/ready ## write requirements.lock: what .venv holds, with hashes, for Linux x86-64 and CPython 3.11
	@$(VENV_PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' \
	  || { echo "ERROR the lock is for CPython 3.11. Fix: rm -rf .venv && make PYTHON=python3.11 lock" >&2; exit 1; }
	@$(VENV_PYTHON) -m pip list --exclude-editable --format freeze | sed 's/+.*//' > .venv/tested.txt
	@$(PIP_INSTALL) --editable '.[lock]'
	@printf '%s\n' "$$HEAD" > .venv/requirements.lock
	@.venv/bin/uv pip compile pyproject.toml --extra dev --constraints .venv/tested.txt --generate-hashes --quiet \
	  --only-binary :all: --emit-build-options --no-emit-index-url --no-config --no-header --no-annotate \
	  --python $(VENV_PYTHON) --python-platform x86_64-manylinux_2_28 >> .venv/requirements.lock
	@mv .venv/requirements.lock requirements.lock

audit: .venv/ready ## ask PyPI for known vulnerabilities of what requirements.lock names; needs the network
	@$(PIP_INSTALL) --editable '.[audit]'
	@.venv/bin/pip-audit --strict --disable-pip --require-hashes --requirement requirements.lock

clean: ## remove caches; never outputs, never data
	rm -rf .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
	find ldm_lib tests notebooks \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +
