# make train: a small model on this machine in minutes, nothing to download but packages.
# make test, make lint: the checks .ci/run makes. Settings: PYTHON (3.10 or newer), ARGS (flags of train_gpt2.py).
PYTHON ?= python3
BIN = .venv/bin
ARGS ?=

# The venv's torchrun starts the venv's Python (a box's own would start the box's), and puts -- before the script: without
# it, torchrun under Python 3.11 and older takes our --run for an abbreviation of its own --run_path.
define TORCHRUN
#!/bin/sh
for arg; do
  shift
  case "$$seen:$$arg" in :*.py) seen=1; set -- "$$@" -- ;; esac
  set -- "$$@" "$$arg"
done
exec "$$(dirname "$$0")/python" -m torch.distributed.run "$$@"
endef
export TORCHRUN

.PHONY: train test test-slow lint clean

train: $(BIN)/.main
	@$(BIN)/python fineweb.py --docstrings --tokenizer bpe:4096
	@$(BIN)/python train_gpt2.py --preset tiny $(ARGS)
	@echo 'in the commands above and below, python means the one of `source .venv/bin/activate`'
	@echo 'the real run:  python fineweb.py && torchrun --standalone --nproc_per_node=8 train_gpt2.py'

test: $(BIN)/.dev
	@$(BIN)/python -m pytest -m "not slow" -n 2

test-slow: $(BIN)/.dev
	@$(BIN)/python -m pytest -m slow

lint: $(BIN)/.dev
	@$(BIN)/python -m ruff check .

clean:
	rm -rf .venv docstrings

# A rented box often brings a torch built for its driver: the venv keeps it instead of downloading gigabytes.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo 'Python 3.10 or newer is needed: make PYTHON=python3.12 ...'; exit 2; }
	@if $(PYTHON) -c 'import torch, sys; sys.exit(not (2, 11) <= tuple(map(int, torch.__version__.split("+")[0].split(".")[:2])) <= (2, 13))' 2>/dev/null; \
	then echo 'keeping the torch of $(PYTHON)'; $(PYTHON) -m venv --system-site-packages .venv; else $(PYTHON) -m venv .venv; fi \
	|| { rm -rf .venv; echo 'cannot make .venv: on Debian and Ubuntu, apt-get install python3-venv'; exit 2; }

$(BIN)/.main: $(BIN)/python requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@printf '%s\n' "$$TORCHRUN" > $(BIN)/torchrun; chmod +x $(BIN)/torchrun
	@touch $@

$(BIN)/.dev: $(BIN)/.main requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@
