"""--parallel fsdp and --checkpoint_activations: training models that do not fit on one GPU.

DDP (lib/devices.py) keeps a copy of the model on each process. FSDP (Zhao et al. 2023,
https://arxiv.org/abs/2304.11277; torch's `fully_shard`) splits each weight, with its gradient and
optimizer state, by rows over the processes. The rows of a block are gathered for its forward and
backward pass only. Sharded tensors are DTensors, whose `to_local` returns this process's rows.

A checkpoint holds whole tensors, so it is the same file however the run was parallelized.
"""

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from lib.checkpoint import map_tensors
from lib.cli import BadInput
from lib.devices import Processes, dtype_of, is_shard, is_sharded, local

FSDP = "fsdp"
MODES = ("ddp", FSDP)


def check_parallel(cfg: Any, model_cfg: Any, device: torch.device) -> None:
    """Raises BadInput if --parallel or --checkpoint_activations cannot train this model."""
    if cfg.parallel == FSDP and model_cfg.n_experts:
        raise BadInput("--parallel fsdp does not shard experts: give --parallel ddp or --n_experts "
                       "0")
    if cfg.parallel == FSDP and device.type not in ("cuda", "cpu"):
        raise BadInput(f"--parallel fsdp does not run on {device.type}: give --parallel ddp")
    if cfg.checkpoint_activations and model_cfg.n_experts:
        raise BadInput("--checkpoint_activations would count the tokens of experts twice: leave it "
                       "out, or give --n_experts 0")


def prepare(model: Any, cfg: Any, processes: Processes) -> None:
    """Apply --checkpoint_activations and --parallel fsdp to a GPT. Call before its optimizer is
    made and before `compile`."""
    if cfg.checkpoint_activations or cfg.parallel == FSDP:
        for block in model.transformer.h:
            block.forward = Forward(block, cfg.checkpoint_activations)
            block.compile = block.forward.compile
    if cfg.parallel == FSDP:
        shard(model, processes)


def n_shards(cfg: Any, processes: Processes) -> int:
    """Parts that the training state of a model is split into."""
    return processes.world_size if cfg.parallel == FSDP else 1


class Forward:
    """The forward pass of a block, between the hooks of FSDP.

    `compile` leaves out the hooks, at which the graph would break. recompute: keep only the inputs
    of the block, and run it again in the backward pass (Chen et al. 2016,
    https://arxiv.org/abs/1604.06174).
    """

    def __init__(self, block: Any, recompute: bool):
        self.block = block
        self.recompute = recompute
        self.run = type(block).forward

    def compile(self, **settings: Any) -> None:
        self.run = torch.compile(self.run, **settings)

    def __call__(self, *args: Any) -> Any:
        if self.recompute and self.block.training:  # not while decoding with a KV cache
            return checkpoint(self.run, self.block, *args, use_reentrant=False)
        return self.run(self.block, *args)


# --------------------------------------------------------------------------------------------------
# Sharding


def shard(model: Any, processes: Processes) -> None:
    """Shard the weights of a GPT in place, block by block; the rest is one more unit.

    The weights of blocks are gathered in the dtype of matmuls, to which autocast would cast them
    anyway: half the bytes. Gradients are still averaged in fp32.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    # the first layer's values are views; nothing is added to them in place
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
    mesh = processes.mesh()
    light = MixedPrecisionPolicy(param_dtype=dtype_of(model), reduce_dtype=torch.float32,
                                 cast_forward_inputs=False)
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh, mp_policy=light)
    fully_shard(model, mesh=mesh)


def from_rank_0(choose: Callable) -> Callable:
    """`choose`, which draws tokens, with rank 0's result on all ranks: if one of them drew another
    token and stopped earlier, the others would wait for its rows."""
    def chosen(logits):
        tokens = choose(logits).contiguous()
        dist.broadcast(tokens, 0)
        return tokens

    return chosen


def gradient_norms(parts: Iterable[Sequence[torch.Tensor]]) -> torch.Tensor:
    """The 2-norm of all gradients of each group of parameters, (n,), the same on all processes."""
    groups = list(parts)
    parameters = [p for group in groups for p in group]
    # a few launches for all tensors, where a call per group takes several each
    norms = torch.stack(torch._foreach_norm([local(p.grad) for p in parameters]))
    lengths = [len(group) for group in groups]
    total = torch.stack(torch._foreach_norm(norms.split(lengths)))
    if is_shard(parameters[0]):
        squares = total.square()
        dist.all_reduce(squares)
        total = squares.sqrt()
    return total


class AdamW(torch.optim.AdamW):
    """AdamW that updates this process's rows of sharded parameters directly.

    Given DTensors, torch's own spends tens of milliseconds per step on checks while the GPU waits.
    """

    def _init_group(self, group, *lists):
        has_complex = super()._init_group(group, *lists)
        for tensors in lists:  # parameters, gradients, moments, step counts
            tensors[:] = map(local, tensors)
        return has_complex


# --------------------------------------------------------------------------------------------------
# Checkpoints


def state_of(model: Any, optimizer: torch.optim.Optimizer,
             processes: Processes) -> dict[str, Any]:
    """{"model", "optimizer"}: their state dicts, for a checkpoint.

    Sharded tensors are gathered one at a time, and copied to the CPU on rank 0. Other ranks get
    None in their place.
    """
    if not is_sharded(model):
        return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    copies: dict[int, torch.Tensor | None] = {}  # tied weights stay one tensor

    def gather(tensor):
        if id(tensor) not in copies:
            whole = tensor.full_tensor() if is_shard(tensor) else tensor
            copies[id(tensor)] = None
            if processes.main:
                copies[id(tensor)] = torch.empty_like(whole, device="cpu").copy_(whole)
        return copies[id(tensor)]

    with torch.no_grad():
        weights = model.state_dict(keep_vars=True)
        state = {"model": dict(weights), "optimizer": optimizer.state_dict()}
        return map_tensors(gather, state)


def load_weights(model: Any, weights: dict[str, torch.Tensor]) -> None:
    """Load whole weights into a model that may be sharded."""
    own = model.state_dict()
    shards = {}
    for name, weight in weights.items():
        shards[name] = shard_like(weight, own.get(name))
    model.load_state_dict(shards)


def shard_state(state: dict[int, dict], optimizer: torch.optim.Optimizer) -> dict[int, dict]:
    """The "state" of an optimizer's state dict, with whole tensors -> the same, sharded as the
    optimizer's parameters are."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    shards: dict[int, dict] = {}
    for index, values in state.items():
        p = parameters[index]
        shards[index] = {name: shard_like(value, p) for name, value in values.items()}
    return shards


def shard_like(value: Any, like: Any) -> Any:
    """A copy of this process's rows of a whole tensor, as a DTensor sharded as `like` is.

    Other values, such as step counts, are returned as they are.
    """
    if not is_shard(like) or getattr(value, "shape", None) != like.shape:
        return value
    from torch.distributed.tensor import DTensor

    mesh = like.device_mesh
    chunks = (*value.chunk(mesh.size()), *[value[:0]] * mesh.size())
    rows = chunks[mesh.get_local_rank()]
    rows = torch.empty_like(rows, device=like.device).copy_(rows)
    return DTensor.from_local(rows, mesh, like.placements, run_check=False, shape=like.shape,
                              stride=like.stride())


# --------------------------------------------------------------------------------------------------
# Muon


class Exchange:
    """Moves sharded matrices of one shape (rows, cols) between two layouts, by one all-to-all each:
    each process has its rows of all n matrices, or all rows of its share of the matrices."""

    def __init__(self, like: Any, n: int):
        """like: one of the sharded matrices."""
        world_size = like.device_mesh.size()
        self.rank = like.device_mesh.get_local_rank()
        self.cols = like.size(1)
        self.rows = sizes(like.size(0), world_size)  # of a matrix, on each process
        self.owned = sizes(n, world_size)            # matrices of each process

    def gather(self, shards: list[torch.Tensor]) -> torch.Tensor:
        """n x (own rows, cols) -> (own matrices, rows, cols)."""
        here = self.owned[self.rank]
        pieces = self._swap(torch.stack(shards), self._of_matrices(), self._of_rows())
        pieces = [piece.view(here, rows, self.cols)
                  for piece, rows in zip(pieces, self.rows, strict=True)]
        return torch.cat(pieces, dim=1)

    def scatter(self, matrices: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The reverse of `gather`."""
        pieces = [piece.flatten() for piece in matrices.split(self.rows, dim=1)]
        pieces = self._swap(torch.cat(pieces), self._of_rows(), self._of_matrices())
        return torch.cat(pieces).view(sum(self.owned), self.rows[self.rank], self.cols).unbind()

    def _of_matrices(self):
        """Numbers that this process has of each process's matrices, while it has only its rows."""
        return [count * self.rows[self.rank] * self.cols for count in self.owned]

    def _of_rows(self):
        """Numbers in each process's rows of this process's matrices."""
        return [self.owned[self.rank] * rows * self.cols for rows in self.rows]

    def _swap(self, sent, sent_sizes, received_sizes):
        received = sent.new_empty(sum(received_sizes))
        dist.all_to_all_single(received, sent.flatten(), received_sizes, sent_sizes)
        return received.split(received_sizes)


def sizes(n: int, parts: int) -> list[int]:
    """The sizes of torch.chunk's chunks, as FSDP shards rows: the last ones may be smaller or 0."""
    size = -(-n // parts)
    return [min(size, max(n - i * size, 0)) for i in range(parts)]
