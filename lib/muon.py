"""Muon for hidden matrices and AdamW for all other parameters, as one torch optimizer.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) replaces a weight matrix's
momentum by the nearest semi-orthogonal matrix, so that a step is equally long in all directions.
That matrix comes from a few matmuls: each iteration applies an odd polynomial to the singular
values, by default those of Polar Express (Amsel et al. 2025, https://arxiv.org/abs/2505.16932).
Embeddings, head and vectors stay with AdamW (Loshchilov & Hutter 2019,
https://arxiv.org/abs/1711.05101).
"""

import math
from collections import defaultdict

import torch
import torch.distributed as dist
from torch.optim.adamw import adamw

# Polar Express (the paper's algorithm 1): minimax a x + b x^3 + c x^5, one after the other, for
# singular values in [1e-3, 1]; five bring them to 0.87 to 1.13. The 1.01 leaves room for rounding:
# beyond the interval they diverge.
POLAR_EXPRESS = tuple((a / 1.01, b / 1.01**3, c / 1.01**5) for a, b, c in (
    (8.287212018145626, -23.59588651909882, 17.30038731253092),
    (4.107059111542198, -2.947849916737908, 0.5448431082926598),
    (3.948690853482296, -2.9089021159629485, 0.5518191394370133),
    (3.3184196573706, -2.4884880243148744, 0.5100489401237202),
    (2.300652019954818, -1.668903984574751, 0.41880731195256765)))
# Jordan's: one polynomial five times, values end within 0.7 to 1.2
NEWTON_SCHULZ = ((3.4445, -4.7750, 2.0315),) * 5

DEFAULTS = {"muon": dict(momentum=0.95, weight_decay=0.0, splits=1),
            "adamw": dict(betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0)}


def orthogonalize(X, coefficients=POLAR_EXPRESS):
    """Matrices (n, rows, cols), each U S V^T -> U S' V^T with S' close to 1, in X's dtype."""
    tall = X.size(-2) > X.size(-1)
    X = X.mT if tall else X  # a view, no copy: the Gram matrix is the small one
    X = X / X.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)  # now no singular value is above 1
    for a, b, c in coefficients:
        A = torch.bmm(X, X.mT)
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)  # b A + c A^2
        X = torch.baddbmm(X, B, X, beta=a)  # a X + B X
    return X.mT if tall else X


class Muon(torch.optim.Optimizer):
    """An optimizer whose parameter groups name their kind.

    kind="muon": matrices (rows, cols), or batches of them (experts, rows, cols); lr, momentum,
        weight_decay, splits. A fused weight is orthogonalized in `splits` blocks of rows: 3 for
        q, k, v; 2 for gate and value. A block's step is lr * sqrt(max(1, rows / cols)) times its
        orthogonalized Nesterov momentum.
    kind="adamw": parameters of any shape; lr, betas, eps, weight_decay.

    Weight decay is decoupled: p *= 1 - lr * weight_decay. Parameters without a gradient are left
    alone.

    Under torch.distributed, gradients must be equal on all ranks (DDP): each rank orthogonalizes
    its share of the matrices, then all gather. Momentum is whole on every rank, so a state fits any
    number of processes. The iteration runs in bf16 on GPUs that have it (sm_80), else in the
    parameters' dtype.
    """

    def __init__(self, param_groups, coefficients=POLAR_EXPRESS):
        super().__init__([DEFAULTS[group["kind"]] | group for group in param_groups], {})
        for group in self.param_groups:
            for p in group["params"] if group["kind"] == "muon" else ():
                if p.ndim < 2 or p.size(-2) % group["splits"]:
                    raise ValueError(
                        f"Muon cannot split {tuple(p.shape)} into {group['splits']} blocks of rows")
        self.coefficients = coefficients

    @torch.no_grad()
    def step(self, closure=None):
        """Update every parameter that has a gradient, with no device sync; gradients stay as they
        are."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work = {"muon": [], "adamw": []}
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                work[group["kind"]].append((group, params, [p.grad for p in params]))
        self._muon(work["muon"])
        for group, params, grads in work["adamw"]:
            self._adamw(group, params, grads)
        return loss

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        for p, state in self.state.items():
            if "step" in state:  # torch does not move it; the fused kernel needs it on p's device
                state["step"] = state["step"].to(p.device)

    def _buffers(self, params, name):
        """The tensors `name` of these parameters' state, zeros at first."""
        for p in params:
            if name in self.state[p]:
                continue
            if name == "step":
                self.state[p][name] = torch.zeros((), device=p.device)
            else:
                self.state[p][name] = torch.zeros_like(p)
        return [self.state[p][name] for p in params]

    def _adamw(self, group, params, grads):
        averages = self._buffers(params, "exp_avg")
        squares = self._buffers(params, "exp_avg_sq")
        steps = self._buffers(params, "step")
        beta1, beta2 = group["betas"]
        adamw(params, grads, averages, squares, [], steps, fused=True, lr=group["lr"], beta1=beta1,
              beta2=beta2, eps=group["eps"], weight_decay=group["weight_decay"], amsgrad=False,
              maximize=False)

    def _muon(self, work):
        # 1) Nesterov momentum; blocks of one shape are stacked, whatever their group
        stacks = defaultdict(list)
        for group, params, grads in work:
            momenta = self._buffers(params, "momentum_buffer")
            torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
            nesterov = torch._foreach_lerp(grads, momenta, group["momentum"])
            for p, update in zip(params, nesterov, strict=True):
                rows = p.size(-2) // group["splits"]
                blocks = update.reshape(-1, rows, p.size(-1))  # (n, rows, cols)
                stacks[blocks.shape[1:]].append((p, blocks))
        # 2) one batched call for each shape; gathering one overlaps with the matmuls of the next
        shared = []
        for stack in stacks.values():
            blocks = torch.cat([blocks for _, blocks in stack])
            shared.append(self._share(blocks))
        updates = {}
        for ((rows, cols), stack), (X, gathering) in zip(stacks.items(), shared, strict=True):
            if gathering is not None:
                gathering.wait()
            # one dtype: the fast path of _foreach
            X = X.to(stack[0][0].dtype, memory_format=torch.contiguous_format).contiguous()
            if rows > cols:
                X = X * math.sqrt(rows / cols)
            sizes = [len(blocks) for _, blocks in stack]
            for (p, _), part in zip(stack, X[:sum(sizes)].split(sizes), strict=True):
                updates[p] = part.view_as(p)
        # 3) decay and step
        for group, params, _ in work:
            steps = [updates[p] for p in params]
            decay = group["lr"] * group["weight_decay"]
            if decay:
                torch._foreach_mul_(params, 1 - decay)
            torch._foreach_add_(params, steps, alpha=-group["lr"])

    def _share(self, X):
        """Orthogonalize this rank's share of X, (n, rows, cols).

        Returns all ranks' results, at least n matrices, and the handle to wait for, or None.
        """
        if X.is_cuda and torch.cuda.get_device_capability(X.device) >= (8, 0):
            X = X.bfloat16()
        world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        if world == 1:
            return orthogonalize(X, self.coefficients), None
        share = -(-len(X) // world)  # padded with zeros, which stay zeros
        mine = X[dist.get_rank() * share:][:share]
        mine = torch.nn.functional.pad(mine, (0, 0, 0, 0, 0, share - len(mine)))
        whole = X.new_empty(world * share, *X.shape[1:])
        mine = orthogonalize(mine, self.coefficients).contiguous()
        # torch 2.13 renames it, and warns of the old name at the first call
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        return whole, gather(whole, mine, async_op=True)
