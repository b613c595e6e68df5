# Two commands do all the set-up: `make quickstart` and `make test`. Both need only Python 3.11+ and make, and both
# are safe to run again: nothing is installed twice.

PYTHON ?= python3
VENV ?= .venv
# PyTorch's own CPU wheels, for machines whose package index has only the (much larger) CUDA build.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
# Prints the option for that index if it answers within seconds, nothing otherwise: then the usual index serves.
REACHABLE := import signal, sys, urllib.request as u; signal.alarm(8); u.urlopen(sys.argv[1] + "/torch/", timeout=5); print("--index-url", sys.argv[1])
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
STAMP := $(VENV)/.installed
BENCH ?= runs/bench
ROUNDS ?= 1 2

.PHONY: quickstart test test-long faults faults-full lint bench install clean

quickstart: install
	$(BIN)/rayllm pipeline --config jobs/configs/quickstart.yaml $(ARGS)

test: install
	$(BIN)/python -m pytest $(ARGS)

test-long: install
	$(BIN)/python -m pytest --long $(ARGS)

# The scorecard of what may go wrong: docs/reliability.md. Real Ray in both; the first with a fake engine, the second with
# vLLM and DeepSpeed throughout, and with tests that take too long for `make test`.
faults: install
	$(BIN)/python -m pytest --scorecard=fast $(ARGS)

faults-full: install
	$(BIN)/python -m pytest --scorecard=full $(ARGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/mypy

# Leave the machine alone meanwhile, about an hour on two cores (ROUNDS=1: half): other work shows in every figure.
# In a round the floors come anew before every run: a machine that is quick in one minute and slow in another would show
# in the ratio of the two.
bench: install
	@rm -rf $(BENCH)
	@mkdir -p $(BENCH)
	for size in 1m 10m; do $(BIN)/python -m bench.models $(BENCH)/$$size --size $$size || exit 1; done
	for round in $(ROUNDS); do for size in 1m 10m; do \
	  for run in "ppo 0" "ppo 1" "grpo 0" "grpo 1"; do \
	    set -- $$run; run=$$1-lag$$2-$$size-$$round.json; \
	    $(BIN)/python -m bench.floors --model $(BENCH)/$$size --json $(BENCH)/floors-$$run || exit 1; \
	    $(BIN)/python -m bench.ppo --model $(BENCH)/$$size --algorithm $$1 --lag $$2 --json $(BENCH)/$$run $(ARGS) || exit 1; \
	  done; \
	done; done
	@# One engine, which a second one joins.
	$(BIN)/python -m bench.ppo --model $(BENCH)/10m --algorithm grpo --json $(BENCH)/elastic.json policy.num_actors=1 \
	  rollout.num_actors=1 rollout.max_engines=2 policy.cpus_per_actor=0.4 rollout.cpus_per_actor=0.7
	for size in 1m 10m; do \
	  $(BIN)/python -m bench.sync --model $(BENCH)/$$size --json $(BENCH)/sync-$$size.json || exit 1; \
	done
	$(BIN)/python -m bench.overhead --json $(BENCH)/overhead.json
	$(BIN)/python -m bench.plan $(BENCH)/ppo-lag0-*.json
	$(BIN)/python -m bench.report $(BENCH) bench/RESULTS.md

install: $(STAMP)

$(STAMP): pyproject.toml constraints-cpu.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "rayllm needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; set PYTHON=")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (about two minutes; once)"
	@$(PIP) install --constraint constraints-cpu.txt torch $$($(BIN)/python -c '$(REACHABLE)' $(TORCH_INDEX) 2>/dev/null)
	@$(PIP) install --constraint constraints-cpu.txt --editable '.[cpu,dev]'
	@# Pulled in by vLLM for images and sound; their CUDA builds break transformers beside a CPU torch.
	@$(BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $(STAMP)

clean:
	rm -rf $(VENV) runs
