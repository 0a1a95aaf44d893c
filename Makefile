# Every target sets up .venv by itself, with pip, and says what it is doing.
SHELL := bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXTRAS := train,graph,nbs,text,trackers,export,cluster,frameworks,dev
export PATH := $(CURDIR)/$(BIN):$(PATH)
# two processes at a time: more threads than cores cost ten times the time
export OMP_NUM_THREADS ?= 1
# where there is no card, Triton's kernels run in its interpreter
export TRITON_INTERPRET ?= $(if $(wildcard /dev/nvidiactl),0,1)
# one step of a target: its header, its commands, their seconds
step = @echo "== $(1)"; SECONDS=0; { $(2); } && echo "== $(firstword $(1)) took $$SECONDS s"
# the pages of the experiments are run by `softnce run`; the code of the experiments is a folder in theirs
notebooks = nbdev_test --n_workers 2 $(1) --skip_folder_re '^([_.]|experiments)' \
	&& nbdev_test --n_workers 2 $(1) --path nbs/experiments/code
# a file of tests stays in one process, with the processes and data that its tests share
PYTEST := pytest -q -n 2 --dist loadfile
CLUSTER := pytest -q -x -p no:cacheprovider tests/cluster/sweeps_on_slurm.py
.DEFAULT_GOAL := help
# pip shows what it fetches, with a bar
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt
# the rates that results/digits.csv chose
CHOSEN := -p lrs_ce='[0.01]' -p lrs_nce='[0.03]'
SWEEP := -p seeds='[0, 1, 2]' -p ledger=true
TINY ?= data/tiny-imagenet-200.zip
REDUCED = -p dataset=tiny_imagenet -p root=$(abspath $(TINY)) -p classes=50 -p recipe=small -p model=small_cnn -p image_size=32 -p width=8 -p hidden=256 -p auto_augment=none -p precision=fp32 -p channels_last=false -p warmup_epochs=1
.PHONY: help run test test-all test-cluster ledgers tiny-ledgers bench gpu docs lab export clean

help:            ## this list
	@grep -E '^[a-z-]+: .*##' Makefile | sed -E 's/:.*## */\t/' | expand -t 14

$(VENV)/.ready: settings.ini setup.py pyproject.toml constraints.txt
	@echo "== setting up $(VENV), once: up to 7 GB, some minutes by network and disk"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(call step,1/2 torch and torchvision,$(INSTALL) torch torchvision)
	$(call step,2/2 timm and torch-geometric and jupyter and nbdev,$(INSTALL) --editable '.[$(EXTRAS)]')
	@touch $@

run: $(VENV)/.ready    ## the paper's first result, an image training, and the five losses on real images: 5 minutes on two free cores, after the install
	softnce run gmm
	softnce run images
	softnce run digits
	@echo "== every figure above is drawn from its run's metrics; finished runs are skipped next time"
	@echo "== the command is $(BIN)/softnce; in this shell:  . $(BIN)/activate  and then:  softnce list"

test: $(VENV)/.ready    ## everything CI checks: notebooks, package, site, tests, wheel
	$(call step,1/5 package and README are what the notebooks give; the house rules hold,python tools/check.py)
	$(call step,2/5 every notebook that exports or explains runs,$(call notebooks,))
	$(call step,3/5 the site builds,$(MAKE) --no-print-directory docs)
	$(call step,4/5 pytest,$(PYTEST))
	$(call step,5/5 the wheel imports with torch and numpy alone,python tools/check_wheel.py)

test-all: test    ## test, and the slow cells and tests too
	$(call step,1/2 the slow cells,$(call notebooks,--flags slow))
	$(call step,2/2 the slow tests,pytest -q -m slow)

test-cluster: $(VENV)/.ready    ## sweeps on a real Slurm that is started for it (Debian, root; a few minutes)
	$(call step,1/1 sweeps on a real Slurm that loses jobs and nodes,$(CLUSTER))

ledgers: $(VENV)/.ready    ## the experiments at full size, into results/ (about an hour)
	softnce run gmm -p full=true -p ledger=true
	for lr in 0.001 0.003 0.01 0.03 0.1; do softnce run digits -p lr_ce=$$lr -p lr_nce=$$lr -p seeds='[10, 11, 12]' -p report=valid; done
	softnce run digits
	softnce collect runs/digits --csv results/digits.csv
	softnce run noise_samples -p batch_sizes='[16, 64, 256]' -p epochs='[15, 15, 15]' -p same_steps='[4]' -p sizes='[16, 128]' -p lrs='[[0.003, 0.01], [0.01, 0.03], [0.01, 0.03]]' $(SWEEP)
	softnce run noise_samples -p sources='[hard_labels]' -p batch_sizes='[64]' -p epochs='[15]' -p lrs='[[0.01, 0.03]]' $(SWEEP)
	softnce run label_smoothing -p epsilons='[0.0, 0.1, 0.2, 0.4]' $(CHOSEN) $(SWEEP)
	for page in heads calibration; do softnce run $$page $(CHOSEN) $(SWEEP); done
	softnce run tables $(CHOSEN) -p seeds='[0, 1, 2, 3, 4]' -p ledger=true
	softnce run cell_types -p folds='[0, 1, 2]' -p seeds='[0, 1, 2]' -p epochs_hard=40 -p epochs_soft=40 -p ledger=true
	softnce run imbalance && softnce collect runs/imbalance --csv results/imbalance.csv

tiny-ledgers: $(VENV)/.ready    ## the sweeps on Tiny ImageNet reduced for the CPU (TINY=its zip file or folder)
	softnce run noise_samples $(REDUCED) -p sources='[in_batch]' -p batch_sizes='[64]' -p epochs='[4]' -p lrs='[[0.01, 0.03]]' -p seeds='[0]' -p ledger=true
	softnce run noise_samples $(REDUCED) -p batch_sizes='[64]' -p epochs='[4]' -p lrs='[[0.01]]' $(SWEEP)
	softnce run noise_samples $(REDUCED) -p sources='[in_batch]' -p batch_sizes='[1024]' -p fixed_batch=1024 -p epochs='[4]' -p lrs='[[0.01, 0.03]]' $(SWEEP)
	softnce run tables $(REDUCED) -p batch_size=64 -p epochs=4 -p lrs_ce='[0.01]' -p lrs_nce='[0.01]' $(SWEEP)

# the ledger remembers what is done, the folder of the run need not
bench: $(VENV)/.ready    ## time and memory of the losses on this device, into results/bench.csv (about ten minutes on two cores)
	softnce run benchmark -p ledger=true --out "$$(mktemp -d)"

# MINUTES of a call; TINY: Tiny ImageNet, for the trainings
gpu: $(VENV)/.ready    ## on a card: test and tune the kernels, time the losses, train what is next; goes on where it stopped
	python tools/gpu.py --minutes $(or $(MINUTES),9) --tiny $(TINY)

docs: $(VENV)/.ready    ## the site, in _docs/
	python tools/docs.py

lab: $(VENV)/.ready    ## JupyterLab on the notebooks
	jupyter lab nbs

export: $(VENV)/.ready    ## notebooks -> softnce/, README.md; clean the notebooks
	nbdev_export
	nbdev_clean
	python tools/readme.py
	python tools/stubs.py

clean:           ## remove what can be made again (runs/ and .venv stay)
	rm -rf _docs _proc build dist *.egg-info .pytest_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
