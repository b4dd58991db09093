"""Generate text with a checkpoint.

    python generate.py --checkpoint log/<run>/ckpt_<step>.pt --prompt "Once upon a time" --max_new_tokens 100
"""

from dataclasses import dataclass
from typing import Literal

import torch

from lib.cli import BadInput, flag, parse, run
from lib.decoding import SampleConfig, sample
from lib.devices import pick_device
from train_gpt2 import load_checkpoint


@dataclass
class Config:
    checkpoint: str | None = flag(None, "a ckpt_<step>.pt of this project")
    device: Literal["auto", "cuda", "mps", "cpu"] = flag("auto", "auto: cuda, then mps, then cpu")


def main(argv):
    (cfg, sampling), _ = parse((Config, SampleConfig), argv, __doc__)
    if cfg.checkpoint is None:
        raise BadInput("name a --checkpoint, for instance one under log/")
    model, tokenizer, _ = load_checkpoint(cfg.checkpoint, pick_device(cfg.device))
    try:
        texts = sample(model, tokenizer, sampling)
    except torch.OutOfMemoryError as error:
        raise BadInput("out of memory: lower --samples") from error
    for text in texts:
        print(f"{text}\n---")


if __name__ == "__main__":
    run(main)
