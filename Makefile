# make train: a small model on this machine in minutes, nothing to download but packages. Given again, it goes on with
# the last run of the same ARGS if that was interrupted; else it begins a new one.
# make lint, make test, make test-slow: the checks .ci/run makes. Settings: PYTHON (3.10 or newer), ARGS (flags of train_gpt2.py).
PYTHON ?= python3
BIN = .venv/bin
ARGS ?=

# A rented box often brings a torch built for its driver: where the Python at hand has one in range, the venv sees that
# Python's packages (behind its own), and pip finds torch installed instead of downloading gigabytes. A path file does this
# for a system Python, conda and a venv alike; --system-site-packages would miss the packages of a venv.
define FIND_TORCH
import pathlib, subprocess, sys
try:
    import torch
    version = tuple(int(n) for n in torch.__version__.split('+')[0].split('.'))
except (ImportError, ValueError):
    sys.exit()
if (2, 11, 0) <= version <= (2, 13, 0):
    site = subprocess.check_output([sys.argv[1], '-c', 'import sysconfig; print(sysconfig.get_path(\"purelib\"))'], text=True)
    folders = [p for p in sys.path if p.endswith(('site-packages', 'dist-packages'))]
    pathlib.Path(site.strip(), 'box.pth').write_text('\n'.join(folders) + '\n')
    print('keeping torch', torch.__version__, 'of', sys.executable)
endef
export FIND_TORCH

# With the box's torch, pip wrote no torchrun into the venv, and the box's own would start the box's Python: have pip write it.
define TORCHRUN
from pip._vendor.distlib.scripts import ScriptMaker
maker = ScriptMaker(None, '$(BIN)')
maker.variants = {''}
maker.make('torchrun = torch.distributed.run:main')
endef
export TORCHRUN

.PHONY: train test test-slow lint clean

train: $(BIN)/.main
	@$(BIN)/python fineweb.py --docstrings --tokenizer bpe:4096
	@$(BIN)/python train_gpt2.py --preset tiny --resume auto $(ARGS)
	@echo 'in the commands above and below, python means the one of `source .venv/bin/activate`'
	@echo 'the real run:  python fineweb.py && torchrun --standalone --nproc_per_node=8 train_gpt2.py'

test: $(BIN)/.dev
	@$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile

test-slow: $(BIN)/.dev
	@$(BIN)/python -m pytest -m slow -n 2

# Not part of .ci/run: the data step of make train, six times, on the oldest torch in range, in a venv of its own (5 GB).
.PHONY: test-extra
EXTRA = .venv-extra

test-extra:
	@test -x $(EXTRA)/bin/python || $(PYTHON) -m venv $(EXTRA)
	@$(EXTRA)/bin/python -m pip install --quiet --disable-pip-version-check torch==2.11.0 -r requirements.txt
	@for run in 1 2 3 4 5 6; do rm -rf $(EXTRA)/docstrings; \
	$(EXTRA)/bin/python fineweb.py --docstrings --tokenizer bpe:4096 --out $(EXTRA)/docstrings || exit 1; done
	@echo '6 passed'

lint: $(BIN)/.dev
	@$(BIN)/python -m ruff check .

clean:
	rm -rf .venv docstrings

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo 'Python 3.10 or newer is needed: make PYTHON=python3.12 ...'; exit 2; }
	@$(PYTHON) -m venv .venv || { rm -rf .venv; echo 'cannot make .venv: on Debian and Ubuntu, apt-get install python3-venv'; exit 2; }
	@$(PYTHON) -c "$$FIND_TORCH" $(BIN)/python

$(BIN)/.main: $(BIN)/python requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@test -x $(BIN)/torchrun || $(BIN)/python -c "$$TORCHRUN"
	@touch $@

$(BIN)/.dev: $(BIN)/.main requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@
