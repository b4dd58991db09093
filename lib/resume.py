"""Resuming: find the checkpoint that --resume and --run_name select, merge its settings with the
flags, and restore its training state."""

import copy
import math
import os
import shlex
import sys
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from lib import checkpoint, nodes
from lib.cli import BadInput, RankError, launched, note, resolve
from lib.devices import Processes, is_shard, local
from lib.existing_runs import check_name, check_ours, has_foreign_config, interrupted, restarted
from lib.hooks import COMMANDS
from lib.parallel import load_weights, shard_state
from lib.streams import CorpusLike, StreamLike

# flags that select the training text
TEXT_FLAGS = {"data", "curriculum", "replay", "replay_data", "val_share", "val_data", "strict"}
# settings of a single start, not of the run
START_FLAGS = {"run_name", "log_dir", "resume", "tensorboard", "tensorboard_host", "tracker"}
# weights, learning rates and settings that the run started from
BEGINNING_FLAGS = ("init_from", "checkpoint", "model", "lr_scale", "config")
# changes after which validation losses no longer compare
REMEASURING = ("--data ", "--val_", "--block_size", "other training data")
TENSORS = ("model", "optimizer")  # entries of a checkpoint with tensors
MOST = 2**62  # largest number in a checkpoint


@dataclass(frozen=True)
class Position:
    """Where training starts or continues."""

    step: int = 0
    skipped: int = 0            # non-finite steps so far
    consecutive_skips: int = 0  # non-finite steps in a row up to here
    timed: tuple = (0, 0.0)     # tokens and seconds of timed steps, see lib/timer.py
    best: Any = None            # [validation loss, step] of the best checkpoint, if there is one
    loss_scale: Any = None      # in fp16, see lib/precision.py


@dataclass
class Resume:
    """A checkpoint to continue from."""

    path: Path
    state: dict
    seen: set[int]  # steps of the checkpoints in the run folder, before this one was read
    changed: list[str] = field(default_factory=list)  # differences from the checkpoint, as text
    other_text: bool = False  # see compare_text

    def outline(self) -> "Resume":
        """A copy for other nodes: its tensors, on the meta device, wait for `share`."""
        with checkpoint.ours(self.path):
            return replace(self, state=self._with_tensors(lambda tensor: tensor.to("meta")))

    def share(self, processes: Processes) -> None:
        """With several nodes, send rank 0's tensors to the other ranks, which all call this."""
        if processes.several_nodes:
            self.state = self._with_tensors(processes.broadcast)

    def _with_tensors(self, change):
        parts = {name: checkpoint.map_tensors(change, self.state[name]) for name in TENSORS}
        return self.state | parts

    def adopt(self, cfg: Any, model_cfg: Any, explicit: set[str]) -> tuple[Any, Any]:
        """-> (cfg, model_cfg) with the checkpoint's settings, except explicit ones.

        Also checks the checkpoint's training state. Raises BadInput if an explicit setting does not
        fit the weights, or a setting of the checkpoint is out of bounds. Other differences are
        noted in `changed`.
        """
        names = {setting.name for setting in fields(cfg)}
        if "checkpoint" in self.state["train_config"] and "checkpoint" not in names:
            raise BadInput("is of a post-training run: continue it with posttrain.py, or start "
                           "another --run_name without --resume")
        self._upgrade()
        self._check_beginning(cfg, explicit)
        before = self.state["train_config"]
        explicit = explicit - set(BEGINNING_FLAGS)
        fixed = {"optimizer", "follow"}  # the latter decides the order of the text
        cfg, changed, misfits = merge(cfg, before, explicit, names - fixed)
        before = self.state["model_config"]
        model_cfg, also_changed, more_misfits = merge(model_cfg, before, explicit,
                                                      may_change(before))
        self.changed += changed + also_changed
        misfits += more_misfits
        if misfits:
            raise BadInput(f"does not fit these flags: {', '.join(misfits)}; leave them out, "
                           "or start another --run_name without --resume")
        self._check_state()
        self._check_curriculum(cfg)
        return cfg, model_cfg

    def _upgrade(self):
        """Convert the state of older versions to the current format."""
        before = self.state["train_config"]
        if isinstance(before["data"], str):  # a single folder
            before["data"] = [before["data"]]
        if "batch_warmup" not in before and "timed" in self.state:  # steps, not tokens, were timed
            steps, seconds = self.state["timed"]
            self.state["timed"] = (steps * before["total_batch_size"], seconds)

    def _check_beginning(self, cfg, explicit):
        """Raises BadInput if flags name other initial weights or rates than this run's."""
        for name in BEGINNING_FLAGS:
            if name not in explicit:
                continue
            own = getattr(cfg, name)
            was = self.state["train_config"].get(name)
            same_file = isinstance(was, str) and checkpoint.leads_to(own, was)
            if own == was or same_file:
                continue
            how = f"with --{name} {was}, not" if was is not None else "without"
            raise BadInput(f"is of a run that started {how} --{name} {own}: leave it out, or give "
                           "another --run_name")

    def _check_state(self):
        """Raises TypeError if a part of the training state has a wrong type or is out of bounds."""
        state = self.state
        counts = [state["step"], state["max_steps"], state.get("skipped", 0),
                  state.get("consecutive_skips", 0), *leaves(state["loader"])]
        measured = [*state.get("timed", ()), *(state.get("best") or ()), state.get("hours", 0),
                    state.get("dollars") or 0, *state.get("loss_scale", {}).values()]
        fine = (isinstance(state["optimizer"], dict) and isinstance(state["tokenizer"], str)
                and all(isinstance(n, int) and 0 <= n < MOST for n in counts)
                and all(isinstance(n, (int, float)) and 0 <= n < MOST for n in measured))
        if not fine:
            raise TypeError("not a training state")

    def _check_curriculum(self, cfg):
        """Raises BadInput if a curriculum is added that would already have ended."""
        begun = self.state["train_config"].get("curriculum")
        step = self.state["step"]
        if cfg.curriculum and not begun and 0 < (cfg.curriculum_steps or 0) <= step:
            raise BadInput(f"is at step {step}, but --curriculum_steps {cfg.curriculum_steps} "
                           "count from the first step of the run: give more, or leave "
                           "--curriculum out")

    def compare_text(self, cfg: Any, corpus: CorpusLike, explicit: set[str]) -> None:
        """Note whether the training data differs from what the checkpoint was trained on.

        Raises BadInput if it does and no explicit flag selects the text.
        """
        known = (corpus.identity, corpus.former_identity)
        self.other_text = self.state.get("data", corpus.identity) not in known
        if not self.other_text:
            return
        if not explicit & TEXT_FLAGS:
            folders = shlex.join(cfg.data)
            raise BadInput(f"{folders} no longer contains the text that {self.path} was trained "
                           f"on: restore it, or give --data {folders} to train on the new text "
                           "from its start")
        self.changed.append("other training data, read from its beginning")

    def restore(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, stream: StreamLike,
                tokenizer: str) -> Position:
        """Load weights, optimizer state and data position.

        tokenizer: spec of the data's tokenizer. Raises BadInput. Writes no files.
        """
        state = self.state
        if state["tokenizer"] != tokenizer:
            raise BadInput(f"{self.path} was trained with another tokenizer than the data's: "
                           "give --data with its own tokenizer")
        checkpoint.check_finite(state["model"], self.path)
        loss_scale = state.get("loss_scale", {})
        updates = state["step"] - state.get("skipped", 0) - loss_scale.get("adjustments", 0)
        try:
            load_weights(model, state["model"])
            load_optimizer(optimizer, state["optimizer"], updates)
        except (ValueError, KeyError, RuntimeError, TypeError, AttributeError, IndexError) as error:
            raise BadInput(f"the weights or the optimizer state of {self.path} do not fit "
                           f"({str(error).splitlines()[0][:100]}): name another checkpoint, "
                           "or start another --run_name without --resume") from error
        if not self.other_text:  # a position is meaningless in other files
            try:
                stream.where(state["loader"])  # raises if there is no such position
                stream.load_state_dict(state["loader"])
            except (KeyError, IndexError, ValueError, TypeError) as error:
                raise BadInput(f"the data position of {self.path} is outside this data: "
                               "name another checkpoint") from error
        stream.resume_at(state["step"])
        position = Position(state["step"], state.get("skipped", 0),
                            state.get("consecutive_skips", 0), state.get("timed", (0, 0.0)),
                            self.best(), loss_scale)
        # the tensors are mapped from the file: if --keep deletes it, its disk space is only freed
        # once they are gone
        state.clear()
        return position

    def best(self) -> list | None:
        """[best validation loss so far, its step]; None if that checkpoint is in another folder or
        the validation data has changed."""
        best = self.state.get("best")
        if not best or best[1] not in self.seen:
            return None
        if any(line.startswith(REMEASURING) for line in self.changed):
            return None
        return best


def may_change(before: dict, block_size: int | None = None) -> set[str]:
    """Names of the GPTConfig settings that may change without changing the weights.

    before: the settings they were trained with. block_size: tokens of context to which learned
    positions may be cut; None: they are not cut.
    """
    free = {"dropout", "init", "router_z_loss"}
    if before["pos"] == "rope" or (block_size or math.inf) <= before["block_size"]:
        free.add("block_size")
    if before.get("balance") == "loss":
        # but not from bias to loss: trained biases would keep selecting experts, never updated
        free.add("balance")
    return free


def merge(config: Any, before: dict, explicit: set[str],
          free: set[str]) -> tuple[Any, list[str], list[str]]:
    """-> (config with the settings of `before`, except explicit ones, changed, misfits).

    changed, misfits: text about explicit settings that differ from `before` and are in `free`, or
    are not. Raises BadInput for values out of bounds.
    """
    earlier = {}
    changed: list[str] = []
    misfits: list[str] = []
    for setting in fields(config):
        if setting.name in START_FLAGS:
            continue
        # a setting newer than the checkpoint was off, regardless of today's preset
        was = before.get(setting.name, setting.default)
        was = tuple(was) if isinstance(was, list) else was
        own = getattr(config, setting.name)
        if setting.name not in explicit:
            earlier[setting.name] = was
        elif own != was:
            differing = changed if setting.name in free else misfits
            differing.append(difference(setting.name, was, own))
    return resolve(config, earlier), changed, misfits


def difference(name: str, was: Any, own: Any) -> str:
    """A changed setting as text, without commands, which may contain secrets."""
    if name in COMMANDS:
        return f"--{name} changed"
    return f"--{name} {as_text(was)} -> {as_text(own)}"


def as_text(value: Any) -> str:
    return " ".join(value) if isinstance(value, tuple) else str(value)


def leaves(state: Any) -> list:
    """The values in nested dicts and lists, in order."""
    if isinstance(state, dict):
        state = list(state.values())
    if not isinstance(state, (list, tuple)):
        return [state]
    found = []
    for part in state:
        found += leaves(part)
    return found


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict, updates: int) -> None:
    """Load an optimizer's state after `updates` steps, but keep its own settings (weight decay,
    betas, ...). Raises ValueError if the state does not fit."""
    groups = optimizer.param_groups
    if len(state["param_groups"]) != len(groups):
        raise ValueError("it has other parameter groups: an older version wrote it")
    if is_shard(groups[0]["params"][0]):
        state = {"state": shard_state(state["state"], optimizer),
                 "param_groups": copy.deepcopy(state["param_groups"])}
    elif groups[0]["params"][0].is_cuda:
        # load_state_dict copies the tensors to the GPU; the host may lack room for copies
        state = {**state, "param_groups": copy.deepcopy(state["param_groups"])}
    else:
        state = copy.deepcopy(state)  # else the tensors would stay mapped from the file
    # before loading: a fused AdamW wants its step counts on the GPU
    for saved, group in zip(state["param_groups"], groups, strict=True):
        own = {name: value for name, value in group.items() if name not in ("params", "lr")}
        saved.update(own)
    optimizer.load_state_dict(state)
    for group in optimizer.param_groups:
        check_moments(optimizer, group, updates)


def check_moments(optimizer: torch.optim.Optimizer, group: dict, updates: int) -> None:
    """Raises ValueError unless the loaded state of a group's parameters has the form that it has
    after `updates` steps."""
    expected = {}  # by shape
    for p in group["params"]:
        if p.shape not in expected:
            expected[p.shape] = kinds(state_after_step(optimizer, group, p)) if updates else {}
        if kinds(optimizer.state.get(p, {})) != expected[p.shape]:
            raise ValueError(f"the optimizer state of a parameter of shape {tuple(p.shape)}")


def state_after_step(optimizer: Any, group: dict, p: torch.Tensor) -> dict:
    """The optimizer's state for a parameter like `p`, found by taking a step."""
    like = torch.nn.Parameter(torch.zeros_like(p))
    like.grad = torch.zeros_like(p)
    other = type(optimizer)([group | {"params": [like]}])
    other.step()
    return other.state[like]


def kinds(state: dict) -> dict:
    """The properties that two states of a parameter must share: names, shapes, finite values, and
    step counts that are not negative."""
    found: dict[str, Any] = {}
    for name, value in state.items():
        found[name] = None
        if isinstance(value, torch.Tensor):
            value = local(value)
            is_count = value.dim() == 0
            valid = bool(value.isfinite().all()) and not (is_count and value.item() < 0)
            found[name] = (value.shape, valid)
    return found


def find_resume(cfg: Any, explicit: set[str]) -> tuple[Resume | None, dict]:
    """--resume and --run_name -> (a Resume or None, log_dir and run_name of the run as a dict).

    With several nodes, rank 0's run folder counts, and the other nodes need none. Raises BadInput
    on a node that has a newer checkpoint, or other flags.
    """
    if not nodes.several():
        return _find(cfg, explicit)

    def outline(found):
        resume, folder, flags = found
        return resume and resume.outline(), folder, flags

    def find():
        return *_find(cfg, explicit), sys.argv[1:]

    resume, folder, flags = nodes.from_rank_0("checkpoint", find, outline)
    env = launched()
    assert env
    if env["rank"] > 0 and env["local_rank"] == 0:  # one line per node
        if flags != sys.argv[1:]:
            raise RankError("rank 0, on another node, has other flags: start the same command on "
                            "every node")
        check_moved(folder, resume.seen if resume else set())
    return resume, folder


def check_moved(folder: dict, seen: set[int]) -> None:
    """Raises RankError if this node, not rank 0's, has the run that is to continue.

    folder: log_dir and run_name. seen: steps of rank 0's checkpoints.
    """
    log_dir = folder["log_dir"]
    name = folder["run_name"]
    if name is None:
        begun = restarted(log_dir)
        if begun:
            raise RankError(f"rank 0 has moved to another node and would not continue {begun}, "
                            f"which is on this one: give --run_name {begun.name}, and torchrun "
                            "--node_rank with --master_addr, which keep rank 0 on its node")
        return
    own = checkpoint.found(Path(log_dir, name))
    if own and own[0][0] > max(seen, default=-1):
        raise RankError(f"this node has {own[0][1]}, rank 0's node does not: copy that folder to "
                        "rank 0's node, or move it away here; --node_rank with --master_addr "
                        "keeps rank 0 on its node")


def _find(cfg, explicit):
    """`find_resume` on rank 0.

    The run's own checkpoints take precedence over the one it started from, so that running the
    same command again continues.
    """
    log_dir, name = cfg.log_dir, cfg.run_name
    if name is not None:
        check_name(name)
    start = home = None
    if cfg.resume not in (None, "auto"):
        start = Path(cfg.resume)
        if checkpoint.is_weights(start):
            raise BadInput(f"--resume {start} holds weights without an optimizer: resume from a "
                           "ckpt_<step>.pt, or begin a new run with --init_from (posttrain.py: "
                           "--checkpoint)")
        home = (start if os.path.isdir(start) else start.parent).absolute()
        if name is None and "log_dir" not in explicit and is_run(home):
            log_dir, name = str(home.parent), home.name
    by_torchrun = restarted(log_dir)
    if name is None and by_torchrun:
        name = by_torchrun.name
    if name is None and cfg.resume == "auto":
        last = interrupted(log_dir)
        name = last.name if last else None
    elif name is None and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        note(f"torchrun has restarted its processes, but {log_dir} has no run that it began: "
             "starting a new run")
    found = {"log_dir": log_dir, "run_name": name}

    seen = set()
    if name:
        own = Path(log_dir, name).absolute()
        check_ours(own)
        seen = {step for step, _ in checkpoint.found(own)}
        goes_back = home is not None and own.resolve() == home.resolve()
        if seen and (not goes_back or by_torchrun == Path(log_dir, name)):
            if start:
                note(f"{name} started from --resume {start}; it continues from its own "
                     "checkpoints")
            return newest_in(own, seen), found
    if start is None:
        return None, found
    if not os.path.isdir(start):
        return Resume(start, checkpoint.read(start), seen), found
    if not checkpoint.found(start):
        raise BadInput(f"--resume {start}: this folder has no ckpt_<step>.pt; name another")
    return newest_in(start, seen), found


def newest_in(folder: Path, seen: set[int]) -> Resume:
    """The newest complete checkpoint in a folder with checkpoints. Raises BadInput if all are
    incomplete."""
    newest = checkpoint.newest(folder, note)
    assert newest is not None, f"no checkpoint in {folder}"
    path, state = newest
    return Resume(path, state, seen)


def is_run(folder: Path) -> bool:
    """Whether a folder is a run folder: other programs write a config.json, too."""
    return os.path.exists(folder / "config.json") and not has_foreign_config(folder)
