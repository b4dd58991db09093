"""--parallel fsdp against DDP and one process, with two and three processes on a CPU (gloo), and
--checkpoint_activations.

    python -m pytest tests/lib/test_parallel.py
"""

import math
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT, TINY_FLAGS, hellaswag_items, read_log, tiny, write_lines
from runs import events, same

from lib.cli import BadInput
from lib.decoding import cast_weights
from lib.parallel import check_parallel, prepare, sizes
from train_gpt2 import GPT

# accumulation, tied embeddings, and gradients that are clipped in some steps
COMMON = [*TINY_FLAGS[2:], "--tie_embeddings", "--total_batch_size", 576, "--micro_batch", 3,
          "--grad_clip", 1.6, "--eval_every", 2, "--keep", 0]
RECIPES = {
    "gpt2": ["--preset", "gpt2", "--weight_decay", 0.5],
    "speedrun": ["--preset", "speedrun", "--batch_warmup", 0, "--max_lr", 0.02],
}


@pytest.fixture
def go(launch, data, tmp_path):
    """A function (name, processes, *flags) that trains -> (losses, checkpoint of the last step)."""
    def run(name, processes, *flags):
        flags = [*COMMON, "--data", data, "--run_name", name, *flags]
        result = launch("train_gpt2.py", *flags, processes=processes)
        assert result.returncode == 0, result.stderr
        folder = tmp_path / "log" / name
        return read_log(folder), torch.load(folder / "ckpt_00006.pt", weights_only=True)

    return run


def forget(folder, *steps):
    for step in steps:
        (folder / f"ckpt_{step:05d}.pt").unlink()


def assert_equal_states(ours, theirs):
    """The same keys, plain tensors of the same shapes, and nearly the same numbers."""
    assert ours.keys() == theirs.keys()
    assert ours["optimizer"]["param_groups"] == theirs["optimizer"]["param_groups"]
    torch.testing.assert_close(ours["model"], theirs["model"], atol=1e-5, rtol=1e-4)
    state = theirs["optimizer"]["state"]
    torch.testing.assert_close(ours["optimizer"]["state"], state, atol=1e-5, rtol=1e-4)
    tied = [ours["model"][name].data_ptr() for name in ("transformer.wte.weight", "lm_head.weight")]
    assert tied[0] == tied[1]


@pytest.mark.parametrize("recipe, processes", [("gpt2", 2), ("speedrun", 3)])
def test_fsdp_has_the_losses_norms_and_checkpoints_of_ddp(recipe, processes, go, tmp_path):
    """With three processes, rows are sharded unevenly."""
    items = write_lines(tmp_path / "hellaswag.jsonl", hellaswag_items(7))
    flags = [*RECIPES[recipe], "--hellaswag_every", 3, "--hellaswag_file", items,
             "--sample_every", 3, "--save_every", 4]
    want, state = go("ddp", processes, *flags)
    losses, sharded = go("fsdp", processes, *flags, "--parallel", "fsdp")
    assert losses == pytest.approx(want, rel=1e-5)
    assert losses.keys() > {(3, "hella"), (4, "val"), (6, "val")}
    assert_equal_states(sharded, state)
    ours, theirs = (events(tmp_path / "log" / name) for name in ("fsdp", "ddp"))
    tags = [tag for tag in theirs if "grad_norm" in tag]
    assert len(tags) == 5  # the whole model, embedding, two blocks, the rest
    norms = [value for _, value in theirs["optim/grad_norm"]]
    assert min(norms) < 1.6 < max(norms)
    for tag in tags:
        for (_, norm), (_, expected) in zip(ours[tag], theirs[tag], strict=True):
            assert norm == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_run_may_switch_between_fsdp_ddp_and_one_process(recipe, go, tmp_path):
    flags = [*RECIPES[recipe], "--save_every", 2, "--context_warmup", 0.7]
    want, state = go("straight", 2, *flags)
    folder = tmp_path / "log" / "changing"
    for processes, mode, steps in ((2, "ddp", (4, 6)), (3, "fsdp", (6,)), (1, "fsdp", (6,)),
                                   (1, "ddp", ())):
        losses, changed = go("changing", processes, *flags, "--parallel", mode)
        forget(folder, *steps)
    assert losses == pytest.approx(want, rel=1e-5)
    assert_equal_states(changed, state)


@pytest.mark.parametrize("flags", [[], ["--parallel", "fsdp"]])
def test_recomputed_activations_change_no_bit(flags, go):
    """Dropout is the same in both forward passes."""
    flags = [*RECIPES["speedrun"], "--dropout", 0.1, "--sample_every", 3, *flags]
    want, state = go("stored", 2, *flags)
    losses, recomputed = go("recomputed", 2, *flags, "--checkpoint_activations")
    assert losses == want
    assert same(recomputed["model"], state["model"])


def stored_tensors(n_layer, recompute):
    """The number of tensors that a model stores for its backward pass."""
    idx = torch.zeros(2, 16, dtype=torch.long)
    model = GPT(tiny(n_layer=n_layer))
    prepare(model, SimpleNamespace(parallel="ddp", checkpoint_activations=recompute), None)
    stored = []

    def store(tensor):
        stored.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(store, lambda tensor: tensor):
        model(idx, idx)
    return len(stored)


def test_recomputed_activations_are_not_stored():
    inputs = 2  # of a block: the residual stream and the embedding
    assert stored_tensors(4, recompute=True) == stored_tensors(2, recompute=True) + 2 * inputs
    assert stored_tensors(4, recompute=False) > stored_tensors(2, recompute=False) + 2 * 15


def test_a_copy_for_decoding_runs_its_own_blocks():
    idx = torch.randint(61, (2, 9))
    model = GPT(tiny())
    prepare(model, SimpleNamespace(parallel="ddp", checkpoint_activations=True), None)
    model.eval()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        light = cast_weights(model)
        assert torch.equal(light(idx), model(idx))
        assert light.transformer.h[0].attn.c_attn.weight.dtype == torch.bfloat16
        for name, p in light.named_parameters():
            if "attn" in name:
                p.zero_()
        assert not torch.equal(light(idx), model(idx))


@pytest.fixture
def go_patched(launch, data, tmp_path):
    """A function (patch) that trains `gpt2` with FSDP on two processes -> the run folder.

    patch: code that runs before, with train_gpt2 imported.
    """
    def run(patch):
        script = tmp_path / "patched.py"
        script.write_text(PATCHED.format(patch=patch))
        result = launch(script, *COMMON, *RECIPES["gpt2"], "--parallel", "fsdp", "--data", data,
                        "--run_name", "a", processes=2)
        assert result.returncode == 0, result.stderr
        return tmp_path / "log" / "a"

    return run


PATCHED = f"""
import math, os, sys
sys.path.insert(0, {str(ROOT)!r})
import train_gpt2
from lib.cli import run
{{patch}}
run(train_gpt2.main)
"""
ONE_RANK_FAILS = """
real = train_gpt2.GPT.forward
calls = []
def forward(self, idx, targets=None, **settings):
    out = real(self, idx, targets, **settings)
    if targets is not None and self.training:
        calls.append(out)
        if os.environ["RANK"] == "1" and len(calls) == 7:  # in step 2: a step has three passes
            out.register_hook(lambda grad: grad * math.inf)
    return out
train_gpt2.GPT.forward = forward
"""
OPERATORS_OF_ADAMW = """
from torch.utils._python_dispatch import TorchDispatchMode
real = train_gpt2.AdamW.step
class Operators(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        names = [kind.__name__ for kind in types]
        with open("seen_by_" + os.environ["RANK"], "a") as file:
            print(func.__name__, *names, file=file)
        return func(*args, **(kwargs or {}))
def step(self):
    with Operators():
        real(self)
train_gpt2.AdamW.step = step
"""


def test_all_processes_skip_a_step_that_is_non_finite_on_one(go_patched):
    folder = go_patched(ONE_RANK_FAILS)
    assert torch.load(folder / "ckpt_00006.pt", weights_only=True)["skipped"] == 1
    assert all(math.isfinite(loss) for loss in read_log(folder).values())


def test_a_step_of_adamw_sees_no_dtensors(go_patched, tmp_path):
    go_patched(OPERATORS_OF_ADAMW)
    for rank in "01":
        seen = set((tmp_path / f"seen_by_{rank}").read_text().splitlines())
        assert len(seen) > 5
        # the moments, in the first step
        assert {line for line in seen if "DTensor" in line} == {"zeros_like.default DTensor"}


@pytest.mark.parametrize("n, parts", [(1, 2), (4, 2), (5, 3), (5, 4), (0, 2), (2, 3)])
def test_sizes_are_those_of_chunks(n, parts):
    chunks = [len(chunk) for chunk in torch.zeros(n).chunk(parts)] if n else []
    assert sizes(n, parts) == chunks + [0] * (parts - len(chunks))


@pytest.mark.parametrize("flags, device, names", [
    (dict(parallel="fsdp", checkpoint_activations=False), "cpu", "--n_experts"),
    (dict(parallel="ddp", checkpoint_activations=True), "cpu", "--checkpoint_activations"),
    (dict(parallel="fsdp", checkpoint_activations=False), "mps", "mps"),
])
def test_what_does_not_work_is_refused(flags, device, names):
    experts = 0 if device == "mps" else 4
    with pytest.raises(BadInput, match=names):
        check_parallel(SimpleNamespace(**flags), SimpleNamespace(n_experts=experts),
                       torch.device(device))


# --------------------------------------------------------------------------------------------------
# Compilation


@pytest.mark.slow  # a C++ compiler builds the kernels
def test_compiled_blocks_share_a_graph_and_have_the_losses_of_plain_ones(launch, data, tmp_path):
    """The first two steps are half batches of 6 sequences per process, in one pass each."""
    flags = [*COMMON, *RECIPES["speedrun"], "--n_layer", 3, "--context_warmup", 0.7, "--data", data,
             "--sample_every", 3, "--total_batch_size", 768, "--batch_warmup", 800,
             "--micro_batch", 12]
    fsdp = ["--parallel", "fsdp", "--checkpoint_activations", "--compile"]
    logs = []
    for name, more in (("plain", []), ("compiled", fsdp)):
        result = launch("train_gpt2.py", *flags, "--run_name", name, *more, processes=2)
        assert result.returncode == 0, result.stderr
        assert "was recompiled" not in result.stdout
        logs.append(read_log(tmp_path / "log" / name))
    assert logs[1] == pytest.approx(logs[0], rel=1e-4)
