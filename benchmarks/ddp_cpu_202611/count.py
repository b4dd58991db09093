"""Count operators and collectives of a training step: torchrun ... count.py, and flags of
train_gpt2.py. Prints those of rank 0 in step 3."""

import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import train_gpt2
from lib.cli import launched, run
from lib.muon import Muon

STEP = 3
# operators that launch no kernel
VIEWS = ("view", "detach", "expand", "transpose", "permute", "slice", "select", "split", "unbind",
         "alias", "squeeze", "empty", "aten.t.", "as_strided", "unfold", "is_same_size",
         "_local_scalar", "lift_fresh", "broadcast")


def size(value):
    """Bytes of a tensor, or of all tensors in a list."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    return sum(map(size, value))


class Count(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.step = -1
        self.part = "other"
        self.operators = Counter()
        self.collectives = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        if self.step == STEP and name.startswith("c10d."):
            self.collectives.append((self.part, name, size(args[0])))
        elif self.step == STEP and not any(view in name for view in VIEWS):
            self.operators[self.part] += 1
        return function(*args, **kwargs or {})

    def watch(self, owner, name, part):
        """Count what the function `name` of `owner` does as `part`."""
        function = getattr(owner, name)

        def counted(*args, **kwargs):
            self.part = part
            try:
                return function(*args, **kwargs)
            finally:
                self.part = "other"

        setattr(owner, name, counted)

    def watch_steps(self):
        seed_dropout = train_gpt2.seed_dropout  # called once per step

        def begin(seed, step, rank):
            self.step = step
            seed_dropout(seed, step, rank)

        train_gpt2.seed_dropout = begin


def main(argv):
    count = Count()
    count.watch_steps()
    count.watch(train_gpt2, "accumulate", "forward and backward")
    count.watch(train_gpt2, "gradient_norms", "gradient norms")
    count.watch(Muon, "step", "optimizer")
    with count:
        train_gpt2.main(argv)
    if launched()["rank"] > 0:
        return
    for part, n in count.operators.items():
        print(f"{n:6,} operators  {part}")
    for part, name, n in count.collectives:
        print(f"{n:9,} bytes  {name}  {part}")


if __name__ == "__main__":
    run(main)
