"""Where a run begins: what --resume and --run_name name, and which settings and state it takes from a
checkpoint."""

import copy
import math
import os
import shlex
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch

from lib import checkpoint
from lib.cli import BadInput, check, note
from lib.run_folder import check_name, check_ours, has_foreign_config, interrupted, restarted

OF_THE_TEXT = {"data", "curriculum", "replay", "replay_data", "val_share", "val_data",
               "strict"}  # flags that choose it
OF_A_START = ("run_name", "log_dir", "resume", "tensorboard")  # settings of one start, not of a run
OF_THE_BEGINNING = ("init_from", "checkpoint", "model", "lr_scale"
                    )  # the weights and rates it began with


@dataclass
class Resume:
    """A checkpoint to continue from; `changed` collects, as text, what is not as it was."""

    path: Path
    state: dict
    seen: set  # steps of the checkpoints in the run folder, before this one was read
    changed: list = field(default_factory=list)
    other_text: bool = False  # see compare_text

    def adopt(self, cfg, model_cfg, explicit):
        """Take every setting that was not given on the command line from the checkpoint,
        and check the checkpoint's training state.

        Raises BadInput if a setting that was given does not fit the weights, or one of the
        checkpoint's its bounds; notes the others that differ.
        """
        if "checkpoint" in self.state["train_config"] and not hasattr(cfg, "checkpoint"):
            raise BadInput(
                "is of a post-training run: go on with posttrain.py, or begin another --run_name without --resume"
            )
        folders = self.state["train_config"]["data"]  # older versions knew one
        self.state["train_config"]["data"] = (folders,) if isinstance(folders,
                                                                       str) else tuple(folders)
        if "batch_warmup" not in self.state[
                "train_config"] and "timed" in self.state:  # older versions timed steps, not tokens
            steps, seconds = self.state["timed"]
            self.state["timed"] = steps * self.state["train_config"]["total_batch_size"], seconds
        self._check_beginning(cfg, explicit)
        free = {field.name for field in fields(cfg)} - {"optimizer"}
        changed, misfits = take_settings(cfg, self.state["train_config"], explicit, free)
        free = may_change(self.state["model_config"])
        of_model = take_settings(model_cfg, self.state["model_config"], explicit, free)
        self.changed += changed + of_model[0]
        misfits += of_model[1]
        if misfits:
            raise BadInput(f"does not fit these flags: {', '.join(misfits)}; "
                           "give them as it was made, or begin another --run_name without --resume")
        numbers = [self.state["step"], self.state["max_steps"], self.state.get("skipped", 0),
                   self.state.get("consecutive_skips", 0), *numbers_of(self.state["loader"])]
        if not all(
                isinstance(n, int) and 0 <= n < 2**62
                for n in numbers) or not (isinstance(self.state["optimizer"], dict) and isinstance(
                    self.state["tokenizer"], str)) or not all(
                        isinstance(n, (int, float)) and 0 <= n < 2**62
                        for n in (*self.state.get("timed", ()), *(self.state.get("best") or ()))):
            raise TypeError("no training state")
        begun = self.state["train_config"].get("curriculum")
        if cfg.curriculum and not begun and 0 < (cfg.curriculum_steps or 0) <= self.state["step"]:
            raise BadInput(f"is at step {self.state['step']}, and --curriculum_steps {cfg.curriculum_steps} "
                           "count from the run's first: give more of them, or leave --curriculum out")

    def compare_text(self, cfg, corpus, explicit):
        """Note whether the training data holds other text than the checkpoint was trained on.

        Raises BadInput if it does and no flag that chooses the text was given.
        """
        known = (corpus.identity, corpus.former_identity)
        self.other_text = self.state.get("data", corpus.identity) not in known
        if not self.other_text:
            return
        if not explicit & OF_THE_TEXT:
            folders = shlex.join(cfg.data)
            raise BadInput(f"{folders} no longer holds the text that {self.path} was trained on: put it back, "
                           f"or give --data {folders} to train on the new text, from its beginning")
        self.changed.append("other training data, read from its beginning")

    def _check_beginning(self, cfg, explicit):
        """Raises BadInput if flags name another beginning than this run's."""
        for name in OF_THE_BEGINNING:
            if name not in explicit:
                continue
            own = getattr(cfg, name)
            was = self.state["train_config"].get(name)
            if own != was and not (isinstance(was, str) and checkpoint.leads_to(own, was)):
                how = "without" if was is None else f"with --{name} {was}, not"
                raise BadInput(f"is of a run that began {how} --{name} {own}: "
                               "leave that out, or give another --run_name")
            setattr(cfg, name, was)

    def restore(self, model, optimizer, stream, tokenizer):
        """Load weights, optimizer and position -> dict step, skipped, consecutive_skips, timed,
        best. Raises BadInput, with nothing written yet.

        tokenizer: the spec of the data's.
        """
        state = self.state
        if state["tokenizer"] != tokenizer:
            raise BadInput(f"{self.path} was made with another tokenizer than the data: its ids mean other text; "
                           "give --data of its own tokenizer")
        checkpoint.check_finite(state["model"], self.path)
        try:
            model.load_state_dict(state["model"])
            load_optimizer(optimizer, state["optimizer"],
                           updates=state["step"] - state.get("skipped", 0))
        except (ValueError, KeyError, RuntimeError, TypeError, AttributeError, IndexError) as error:
            raise BadInput(f"the weights or the optimizer state of {self.path} do not fit "
                           f"({str(error).splitlines()[0][:100]}): name another checkpoint, "
                           "or begin another --run_name without --resume") from error
        if not self.other_text:  # a position means nothing in other files
            try:
                stream.where(state["loader"])  # which looks it up
                stream.load_state_dict(state["loader"])
            except (KeyError, IndexError, ValueError, TypeError) as error:
                raise BadInput(
                    f"{self.path} stands at a place that the data does not have: name another checkpoint"
                ) from error
        stream.resume_at(state["step"])
        position = {"step": state["step"], "skipped": state.get("skipped", 0),
                    "consecutive_skips": state.get("consecutive_skips", 0),
                    "timed": state.get("timed", (0, 0.0)), "best": self._best()}
        state.clear(
        )  # its tensors are mapped from the file, which --keep may delete: free the disk space then
        return position

    def _best(self):
        """The best validation loss so far, and its step; None if its checkpoint is in another
        folder, or it is of other data."""
        best = self.state.get("best")
        remeasured = any(
            line.startswith(("--data ", "--val_", "--block_size", "other training data"))
            for line in self.changed)
        return best if best and best[1] in self.seen and not remeasured else None


def may_change(before, block_size=None):
    """Names of a GPTConfig's settings that weights do not depend on.

    before: the settings that the weights were trained with. block_size: the context, in tokens,
    that learned positions are to be cut to; None if they must stay as they are.
    """
    free = {"dropout", "init", "router_z_loss"}
    if before["pos"] == "rope" or (block_size or math.inf) <= before["block_size"]:
        free.add("block_size")
    if before.get("balance") == "loss":
        # biases, once nudged, pick experts as weights do; with the loss nothing moves them
        free.add("balance")
    return free


def take_settings(config, before, explicit, free):
    """Take every setting that is not in `explicit` from `before`, a dict.

    -> (list of text about those given that differ and are in `free`, the same of the others).
    Raises BadInput for what is out of bounds.
    """
    changed, misfits = [], []
    defaults = {setting.name: setting.default for setting in fields(config)}
    for name, default in defaults.items():
        if name in OF_A_START:
            continue
        was = before.get(name,
                         default)  # one younger than `before` was off, whatever its preset says
        was = tuple(was) if isinstance(was, list) else was
        own = getattr(config, name)
        if name not in explicit:
            setattr(config, name, was)
        elif own != was:
            differing = changed if name in free else misfits
            differing.append(f"--{name} {words(was)} -> {words(own)}")
    check(config)
    return changed, misfits


def words(value):
    """A setting as text."""
    return " ".join(value) if isinstance(value, tuple) else value


def numbers_of(state):
    """What stands in nested dicts and lists, in order."""
    parts = state.values() if isinstance(
        state, dict) else state if isinstance(state, (list, tuple)) else None
    return [state] if parts is None else [number for part in parts for number in numbers_of(part)]


def load_optimizer(optimizer, state, updates):
    """Load an optimizer's state after so many updates; its own settings (weight decay, betas, ...)
    stay. Raises ValueError if it does not fit."""
    settings = [{k: v
                 for k, v in group.items()
                 if k not in ("params", "lr")}
                for group in optimizer.param_groups]
    if len(state["param_groups"]) != len(settings):
        raise ValueError("its parameter groups are others: an older version wrote it")
    # on a CPU, the tensors would stay in the checkpoint's file, memory-mapped; a GPU gets copies
    # anyway, and the host may lack the room for one per process
    on_gpu = optimizer.param_groups[0]["params"][0].is_cuda
    state = {**state, "param_groups": copy.deepcopy(state["param_groups"])
             } if on_gpu else copy.deepcopy(state)
    # before loading: a fused AdamW wants its step counts on the GPU
    for group, own in zip(state["param_groups"], settings, strict=True):
        group.update(own)
    optimizer.load_state_dict(state)
    for group in optimizer.param_groups:
        wanted = {p.shape: p for p in group["params"]}
        wanted = {
            shape: _state_of(optimizer, group, p) if updates else {} for shape, p in wanted.items()
        }
        for p in group["params"]:
            have, want = optimizer.state.get(p, {}), wanted[p.shape]
            if {name: _kind(value) for name, value in have.items()
                } != {name: _kind(value) for name, value in want.items()}:
                raise ValueError(f"the optimizer state of a parameter of shape {tuple(p.shape)}")


def _state_of(optimizer, group, p):
    """What an optimizer keeps of a parameter like `p`, found out by a step: no other place than the
    optimizer knows."""
    like = torch.nn.Parameter(torch.zeros_like(p))
    like.grad = torch.zeros_like(p)
    other = type(optimizer)([group | {"params": [like]}])
    other.step()
    return other.state[like]


def _kind(value):
    """What two values of an optimizer's state must have in common: the shape, to be finite; a
    single number, a count of steps, not to be negative."""
    return ((value.shape, bool(value.isfinite().all()), value.dim() > 0 or value.item() >= 0)
            if isinstance(value, torch.Tensor) else None)


def find_resume(cfg, explicit):
    """--resume and --run_name -> Resume or None. May set cfg.log_dir and cfg.run_name.

    A run's own checkpoints come before the one it began with: the same command, given again,
    continues.
    """
    if cfg.run_name is not None:
        check_name(cfg.run_name)
    start = None if cfg.resume in (None, "auto") else Path(cfg.resume)
    home = start and (start if os.path.isdir(start) else start.parent).absolute()
    in_a_run = start and os.path.exists(home / "config.json") and not has_foreign_config(home)
    if cfg.run_name is None and in_a_run and "log_dir" not in explicit:
        cfg.log_dir, cfg.run_name = str(home.parent), home.name
    begun = restarted(cfg.log_dir)
    if cfg.run_name is None and begun:
        cfg.run_name = begun.name
    if cfg.run_name is None and cfg.resume == "auto" and (begun := interrupted(cfg.log_dir)):
        cfg.run_name = begun.name
    own = cfg.run_name and (Path(cfg.log_dir) / cfg.run_name).absolute()
    if own:
        check_ours(own)
    seen = {step for step, _ in checkpoint.found(own)} if own else set()
    if seen and (home is None or own.resolve() != home.resolve()
                 or begun == Path(cfg.log_dir) / cfg.run_name):
        if start:
            note(
                f"--resume {start} is where {cfg.run_name} may begin; it has checkpoints of its own and goes on from these"
            )
        return Resume(*checkpoint.newest(own, note), seen)
    if start is None:
        return None
    if os.path.isdir(start):
        if not checkpoint.found(start):
            raise BadInput(f"--resume {start}: this folder holds no ckpt_<step>.pt; name another")
        return Resume(*checkpoint.newest(start, note), seen)
    return Resume(start, checkpoint.read(start), seen)
