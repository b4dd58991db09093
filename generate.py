"""Write text with a checkpoint, token by token.

    python generate.py --checkpoint log/<run>/ckpt_<step>.pt --prompt "Once upon a time" --max_new_tokens 100
"""

from dataclasses import dataclass
from typing import Literal

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
    for name, low in (("samples", 1), ("max_new_tokens", 1), ("temperature", 0), ("top_k", 0)):
        if not getattr(sampling, name) >= low:  # nan, too
            raise BadInput(f"--{name} must be at least {low}, not {getattr(sampling, name)}")
    if not 0 <= sampling.seed < 2**63:  # what torch takes
        raise BadInput(f"--seed must be at least 0 and below 2^63, not {sampling.seed}")
    model, tokenizer, _ = load_checkpoint(cfg.checkpoint, pick_device(cfg.device))
    for text in sample(model, tokenizer, sampling):
        print(f"{text}\n---")


if __name__ == "__main__":
    run(main)
