"""Muon for hidden matrices and AdamW for all other parameters, as one torch optimizer.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) replaces a weight matrix's
momentum by the nearest semi-orthogonal matrix, so that a step is equally long in all directions.
It is computed by a few matmuls: each iteration applies an odd polynomial to the singular values, by
default those of Polar Express (Amsel et al. 2025, https://arxiv.org/abs/2505.16932).
Embeddings, head and vectors stay with AdamW (Loshchilov & Hutter 2019,
https://arxiv.org/abs/1711.05101).
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.optim.adamw import adamw

from lib.devices import compute_dtype, is_shard, local
from lib.parallel import Exchange

# Polar Express (algorithm 1 of the paper): coefficients (a, b, c) of minimax polynomials
# a x + b x^3 + c x^5, applied one after the other to singular values in [1e-3, 1]. Five bring them
# to 0.87 to 1.13. Beyond the interval they diverge, so 1.01 leaves room for rounding.
_MINIMAX = (
    (8.287212018145626, -23.59588651909882, 17.30038731253092),
    (4.107059111542198, -2.947849916737908, 0.5448431082926598),
    (3.948690853482296, -2.9089021159629485, 0.5518191394370133),
    (3.3184196573706, -2.4884880243148744, 0.5100489401237202),
    (2.300652019954818, -1.668903984574751, 0.41880731195256765),
)
POLAR_EXPRESS = tuple((a / 1.01, b / 1.01**3, c / 1.01**5) for a, b, c in _MINIMAX)
# Jordan's: one polynomial five times, singular values end between 0.7 and 1.2
NEWTON_SCHULZ = ((3.4445, -4.7750, 2.0315),) * 5

DEFAULTS: dict[str, dict] = {
    "muon": dict(momentum=0.95, weight_decay=0.0, splits=1),
    "adamw": dict(betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0),
}


def orthogonalize(X: torch.Tensor,
                  coefficients: Sequence[tuple] = POLAR_EXPRESS) -> torch.Tensor:
    """Matrices (n, rows, cols), each U S V^T -> U S' V^T with S' close to 1, in X's dtype."""
    tall = X.size(-2) > X.size(-1)
    X = X.mT if tall else X  # a view, no copy; its Gram matrix is the smaller one
    X = X / X.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)  # now no singular value is above 1
    for a, b, c in coefficients:
        A = torch.bmm(X, X.mT)
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)             # b A + c A^2
        X = torch.baddbmm(X, B, X, beta=a)                      # a X + B X
    return X.mT if tall else X


def low_precision(X: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Matrices (n, rows, cols) in the dtype of their orthogonalization, bf16 or fp16.

    In fp16, gradients would underflow, so the matrices are normalized first.
    """
    if dtype == torch.float16:
        X = X / X.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    return X.to(dtype)


class Muon(torch.optim.Optimizer):
    """Muon and AdamW as one optimizer. Each parameter group names its kind:

    kind="muon":  matrices (rows, cols), or batches of them (experts, rows, cols); lr, momentum,
                  weight_decay, splits. A fused weight is orthogonalized as `splits` blocks of rows:
                  3 for q, k, v; 2 for gate, value. A block steps by lr * sqrt(max(1, rows / cols))
                  times its orthogonalized Nesterov momentum.
    kind="adamw": parameters of any shape; lr, betas, eps, weight_decay.

    Weight decay is decoupled: p *= 1 - lr * weight_decay. Parameters without a gradient are
    skipped.

    Under torch.distributed, gradients must be equal on all ranks (DDP). Each rank orthogonalizes
    its share of the matrices, then all ranks gather them. Every rank has the whole momentum, so a
    state fits any number of processes. The iteration runs in bf16 on GPUs that support it (sm_80),
    in fp16 on older ones, and in the parameters' dtype on other devices.

    With FSDP, each rank has some rows of each parameter, gradient and state. A matrix is gathered
    on one rank, orthogonalized there, and the rows of its update are sent back.
    """

    def __init__(self, param_groups: Iterable[dict],
                 coefficients: Sequence[tuple] = POLAR_EXPRESS):
        super().__init__([DEFAULTS[group["kind"]] | group for group in param_groups], {})
        self.coefficients = coefficients
        self.prepared: Any = None  # what `_start_muon` returned
        for group in self.param_groups:
            if group["kind"] == "muon":
                check_splits(group)

    @torch.no_grad()
    def prepare(self) -> None:
        """Launch what a step computes from the matrices' gradients, and change nothing but these.

        That is most of a step. It needs no learning rate, so it may be launched before it is known
        whether the step will be taken; if it is not, call `zero_grad`. Optional.
        """
        work = self._with_gradients("muon")
        if not sharded(work):  # whole matrices take memory: `step` gathers one shape at a time
            self.prepared = self._start_muon(work)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update every parameter that has a gradient, without a device sync. Overwrites the
        gradients of matrices."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.prepared is None:
            self.prepare()
        matrices = self._with_gradients("muon")
        if sharded(matrices):
            for group, params in matrices:
                for same in of_one_shape(params):
                    self._muon_sharded(group, same)
        for group, params in self._with_gradients("adamw"):  # while the last matrices are gathered
            self._adamw(group, params)
        if self.prepared is not None:
            self._finish_muon(matrices, *self.prepared)
            self.prepared = None
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        self.prepared = None

    def _with_gradients(self, kind):
        """[(group, its parameters that have a gradient)] of the groups of this kind."""
        found = []
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params and group["kind"] == kind:
                found.append((group, params))
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for p, state in self.state.items():
            if "step" in state:  # torch leaves it on the CPU; the fused kernel needs p's device
                state["step"] = state["step"].to(p.device)

    def _buffers(self, params, name):
        """The state tensors `name` of these parameters, created as zeros."""
        for p in params:
            if name not in self.state[p]:
                self.state[p][name] = torch.zeros_like(p)
        return [local(self.state[p][name]) for p in params]

    def _step_counts(self, params):
        for p in params:
            if "step" not in self.state[p]:
                self.state[p]["step"] = torch.zeros((), device=p.device)
        return [self.state[p]["step"] for p in params]

    def _adamw(self, group, params):
        beta1, beta2 = group["betas"]
        grads = [local(p.grad) for p in params]
        adamw([local(p) for p in params], grads, self._buffers(params, "exp_avg"),
              self._buffers(params, "exp_avg_sq"), [], self._step_counts(params), fused=True,
              lr=group["lr"], beta1=beta1, beta2=beta2, eps=group["eps"],
              weight_decay=group["weight_decay"], amsgrad=False, maximize=False)

    def _start_muon(self, work):
        """Orthogonalize -> (the new momenta of each group, [(stack, orthogonalized blocks, handle
        of their gathering)])."""
        # 1) Nesterov momentum; blocks of one shape are stacked, across groups
        stacks = defaultdict(list)
        momenta = []
        for group, params in work:
            momentum, updates = self._nesterov(group, params)
            momenta.append(momentum)
            for p, update in zip(params, updates, strict=True):
                rows = p.size(-2) // group["splits"]
                blocks = update.reshape(-1, rows, p.size(-1))                   # (n, rows, cols)
                stacks[blocks.shape[1:]].append((p, blocks))
        # 2) one batched call per shape; gathering one overlaps with the matmuls of the next
        started = []
        for stack in stacks.values():
            X = torch.cat([blocks for _, blocks in stack])
            started.append((stack, *self._orthogonalize(X)))
        return momenta, started

    def _finish_muon(self, work, momenta, started):
        """Decay and step."""
        updates = {}
        for stack, X, gathering in started:
            if gathering is not None:
                gathering.wait()
            updates.update(unstack(X, stack))
        for (group, params), momentum in zip(work, momenta, strict=True):
            torch._foreach_copy_(self._buffers(params, "momentum_buffer"), momentum)
            decay = group["lr"] * group["weight_decay"]
            if decay:
                torch._foreach_mul_(params, 1 - decay)
            torch._foreach_add_(params, [updates[p] for p in params], alpha=-group["lr"])

    def _muon_sharded(self, group, params):
        """Update sharded matrices of one shape."""
        rows, cols = params[0].shape
        exchange = Exchange(params[0], len(params))
        momenta, updates = self._nesterov(group, params)
        torch._foreach_copy_(self._buffers(params, "momentum_buffer"), momenta)
        matrices = exchange.gather(updates)                                 # (own, rows, cols)
        blocks = matrices.view(-1, rows // group["splits"], cols)
        X, _ = self._orthogonalize(blocks, alone=True)
        updates = exchange.scatter(unstack(X, [(matrices, blocks)])[matrices])
        shards = [local(p) for p in params]
        torch._foreach_mul_(shards, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(shards, updates, alpha=-group["lr"])

    def _nesterov(self, group, params):
        """-> (the new momenta, Nesterov's momenta in place of the gradients)."""
        grads = [local(p.grad) for p in params]
        before = []
        for p in params:  # a step that is not taken leaves no state
            state = self.state[p] if p in self.state else {"momentum_buffer": torch.zeros_like(p)}
            before.append(local(state["momentum_buffer"]))
        momenta = torch._foreach_lerp(before, grads, 1 - group["momentum"])
        torch._foreach_lerp_(grads, momenta, group["momentum"])
        return momenta, grads

    def _orthogonalize(self, X, alone=False):
        """X (n, rows, cols) -> (orthogonalized, perhaps padded at the end; a handle to wait for, or
        None). Each rank computes its share, or `alone` all of X."""
        if X.is_cuda:
            X = low_precision(X, compute_dtype(X.device))
        world_size = 1
        if not alone and dist.is_available() and dist.is_initialized():
            world_size = dist.get_world_size()
        if world_size == 1:
            return orthogonalize(X, self.coefficients), None
        share = -(-len(X) // world_size)
        mine = X[dist.get_rank() * share:][:share]
        missing = share - len(mine)
        mine = F.pad(mine, (0, 0, 0, 0, 0, missing))  # zeros stay zeros
        mine = orthogonalize(mine, self.coefficients).contiguous()
        gathered = X.new_empty(world_size * share, *X.shape[1:])
        # torch 2.13 renames it, and warns about the old name at the first call
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        return gathered, gather(gathered, mine, async_op=True)


def sharded(work: list[tuple[dict, list]]) -> bool:
    """Whether these parameters are shards."""
    return bool(work) and is_shard(work[0][1][0])


def of_one_shape(params: Iterable[torch.Tensor]) -> list[list[torch.Tensor]]:
    """Parameters in lists of equal shape."""
    lists: dict[torch.Size, list[torch.Tensor]] = {}
    for p in params:
        lists.setdefault(p.shape, []).append(p)
    return list(lists.values())


def unstack(X: torch.Tensor, stack: list) -> dict:
    """Orthogonalized blocks (n, rows, cols) -> {parameter: its update}, scaled by
    sqrt(max(1, rows / cols)).

    stack: [(parameter, its blocks)], in the order of X.
    """
    rows, cols = X.shape[1:]
    # the parameters' dtype and contiguous memory: the fast path of _foreach
    X = X.to(stack[0][0].dtype, memory_format=torch.contiguous_format).contiguous()
    if rows > cols:
        X = X * math.sqrt(rows / cols)
    updates = {}
    first = 0
    for p, blocks in stack:
        updates[p] = X[first:first + len(blocks)].view_as(p)
        first += len(blocks)
    return updates


def check_splits(group: dict) -> None:
    """Raises ValueError unless the parameters are matrices of `splits` equal blocks of rows."""
    for p in group["params"]:
        if p.ndim < 2 or p.size(-2) % group["splits"]:
            raise ValueError(
                f"Muon cannot split {tuple(p.shape)} into {group['splits']} blocks of rows")
