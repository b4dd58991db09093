"""How long a run is: steps, tokens, epochs, FLOPs, hours, dollars.

Tokens per parameter count all parameters, embeddings included, as Hoffmann et al. 2022 do
(Chinchilla, https://arxiv.org/abs/2203.15556, appendix F), whose rule of thumb is 20. Kaplan et al.
2020 (https://arxiv.org/abs/2001.08361, section 1.3) leave embeddings out, which is much of why the
two disagree (Pearce & Song 2024, https://arxiv.org/abs/2406.12907). Tied matrices count once.
"""

import math
import time

import torch

from lib.cli import BadInput
from lib.devices import compute_dtype, memory_bytes
from lib.moe import ExpertConfig

MOST_STEPS = 2**31
UNMEASURED = MOST_STEPS  # steps of a run of --minutes until its speed is known: no run has as many
FIT_SHARE = 0.25  # of --minutes in which the number of steps follows the measured speed; then it stands
LENGTHS = ("epochs", "max_steps", "minutes", "tokens_per_param"
           )  # the flags that set the length, of which a run has one
RATIOS = (8, 12, 20, 40)  # tokens per parameter in the table of --plan
# up to so many, repeated text is worth nearly as much as new one (Muennighoff et al. 2023,
# https://arxiv.org/abs/2305.16264)
MANY_EPOCHS = 4
DAY = 86_400   # seconds
SLOWEST = 1e9  # FLOP/s that any machine makes


def length_flag(cfg):
    """The one of LENGTHS that sets the length."""
    return next((name for name in LENGTHS if name != "epochs" and getattr(cfg, name)), "epochs")


def batch_size(step, cfg):
    """Tokens of update `step`: half of --total_batch_size within the first --batch_warmup tokens.
    Small steps learn more per token at first, and the batch from which on they do not grows with
    training (McCandlish et al. 2018, https://arxiv.org/abs/1812.06162)."""
    return cfg.total_batch_size // 2 if step < _halved(cfg) else cfg.total_batch_size


def _halved(cfg):
    """How many steps of half the batch a run begins with."""
    return cfg.batch_warmup // max(cfg.total_batch_size // 2, 1)


def tokens_of(steps, cfg):
    """Tokens in the first `steps` updates."""
    return steps * cfg.total_batch_size - min(steps, _halved(cfg)) * (cfg.total_batch_size // 2)


def _in_batches(steps, cfg):
    """The tokens of the first `steps` updates, as text; None: of a run of unknown length."""
    halved, half = _halved(cfg), cfg.total_batch_size // 2
    if not halved:
        return f"steps of {cfg.total_batch_size:,} tokens"
    if steps is not None and steps <= halved:
        return f"steps of {half:,} tokens, half of --total_batch_size"
    return f"steps of {cfg.total_batch_size:,} tokens, of {half:,} in the first {halved:,}"


def steps_in(tokens, cfg):
    """Whole updates that so many tokens are enough for: the inverse of `tokens_of`."""
    halved, half = _halved(cfg), cfg.total_batch_size // 2
    return int(tokens // half if tokens < halved * half else (tokens + halved * half)
               // cfg.total_batch_size)


def steps_of(cfg, train_tokens, parameters):
    """Optimizer steps of a run: --max_steps, or --tokens_per_param for each of so many parameters
    (None: not known), or --epochs passes over so many tokens; with --minutes UNMEASURED, until
    StepTimer has fitted it. Raises BadInput if there is not one."""
    if cfg.minutes:
        return UNMEASURED
    ratio = cfg.tokens_per_param
    if ratio and not parameters:
        raise BadInput(
            "--tokens_per_param needs the number of parameters: write vocab_size into the meta.json of --data"
        )
    tokens = ratio * parameters if ratio else cfg.epochs * train_tokens
    steps = cfg.max_steps or steps_in(min(tokens, MOST_STEPS * cfg.total_batch_size), cfg)
    if not 0 < steps < MOST_STEPS:
        what = (f"{ratio:g} tokens for each of {parameters:,} parameters" if ratio else
                f"{cfg.epochs:g} epochs of {train_tokens:,} tokens")
        many, first, second = ("too many", "lower", "raise") if steps else ("no", "raise", "lower")
        raise BadInput(f"{what} are {many} steps of {batch_size(steps, cfg):,}: "
                       f"{first} --{'tokens_per_param' if ratio else 'epochs'} or {second} --total_batch_size")
    return steps


def steps_left(cfg, explicit, resume):
    """The steps that the run of a Resume was to have; None without one, or if a flag now given sets
    another length."""
    of_data = {"data", "replay", "val_share", "val_data",
               "strict"}  # what an epoch holds; all but the first are posttrain.py's
    lengths = {*of_data, "total_batch_size", "batch_warmup", *LENGTHS} & explicit
    same = ("minutes", "total_batch_size", "batch_warmup")
    fitted = resume and cfg.minutes and all(
        getattr(cfg, name) == resume.state["train_config"].get(name, 0) for name in same)
    return resume.state["max_steps"] if resume and (fitted or not lengths) else None


def settle(cfg, c, explicit, corpus, parameters, world_size, resume=None):
    """Set cfg.steps and check a run's settings against each other, its data and the number of
    processes. Raises BadInput."""
    cfg.steps = steps_left(cfg, explicit, resume) or steps_of(cfg, corpus.tokens["train"],
                                                              parameters)
    if resume and cfg.steps == UNMEASURED:
        timed = resume.state.get("timed", (0, 0.0))
        cfg.steps = StepTimer(cfg, timed).length(resume.state["step"])
    check_run(cfg, c, explicit, world_size)
    corpus.check_length(cfg)


def hours_and_dollars(seconds, price_per_hour):
    """So many seconds as text, with what they cost where the machine's price per hour is known
    (None: it is not)."""
    hours = seconds / 3600
    text = f"{hours:,.2f} hours" if hours >= 2 else f"{60 * hours:.1f} minutes"
    return text + (f", ${hours * price_per_hour:,.2f} at ${price_per_hour:g} per hour"
                   if price_per_hour else "")


def plan(cfg, models, measured):
    """The table of --plan: what RATIOS of tokens per parameter, and --tokens_per_param, take,
    for models by name (on the meta device).

    measured: the name of the model of which --tok_per_sec was measured. Its hours follow from that,
    the others' from the same FLOP/s; without a measurement there are none. Where it is as large as
    another, as a preset of a --size is, it has that one's rows.
    """
    size = {
        name: (model.parameter_counts(), model.flops_per_token()) for name, model in models.items()
    }
    if same := next((name for name in models if name != measured and size[name] == size[measured]),
                    None):
        models, measured = {name: model for name, model in models.items() if name != measured}, same
    speed = cfg.tok_per_sec and cfg.tok_per_sec * models[measured].flops_per_token()  # FLOP/s
    head = f"steps of {cfg.total_batch_size:,}"
    lines = [
        "tokens per parameter, all parameters counted (Hoffmann et al. 2022, whose rule of thumb is 20); "
        f"Kaplan et al. 2020 leave embeddings out; a vocabulary of {models[measured].config.vocab_size:,}"
        +
        (f"; the first {_halved(cfg):,} steps are of half as many tokens" if _halved(cfg) else ""),
        f"{'size':12} {'parameters':>14} {'not embedding':>14} {'ratio':>6} {'tokens':>16} {head:>17} {'FLOPs':>9}"
        + f" {'hours':>10}" * bool(speed) + f" {'dollars':>12}" * bool(speed and cfg.price_per_hour)
    ]
    for name, model in models.items():
        counts, flops = model.parameter_counts(), model.flops_per_token()
        for ratio in sorted({*RATIOS, cfg.tokens_per_param or RATIOS[0]}):
            tokens = ratio * counts["total"]
            line = (f"{name:12} {counts['total']:14,} {counts['total'] - counts['embedding']:14,} {ratio:6g} {tokens:16,.0f} "
                    f"{steps_in(tokens, cfg):17,} {tokens * flops:9.2e}")
            if speed:
                hours, mark = tokens * flops / speed / 3600, "" if name == measured else "~"
                line += f" {f'{mark}{hours:,.1f}':>10}"
                line += f" {f'{mark}{hours * cfg.price_per_hour:,.2f}':>12}" if cfg.price_per_hour else ""
            lines.append(line)
    given = (f"hours at the {cfg.tok_per_sec or 0:,.0f} tok/s given for {measured}; "
             "~: another size, at the same FLOP/s, not measured")
    needed = ("hours need a measurement: --tok_per_sec of this --preset and --size, as every line of a run shows it, and "
              "--price_per_hour for dollars")
    return "\n".join([*lines, given if speed else needed])


def check_run(cfg, c, explicit, world_size):
    """Check a run's settings against each other and the number of processes. Raises BadInput."""
    def need(condition, message):
        if not condition:
            raise BadInput(message)

    need(
        cfg.eval_tasks or not explicit & {"eval_tasks_every", "eval_tasks_dir", "eval_tasks_limit"},
        "--eval_tasks_every, --eval_tasks_dir and --eval_tasks_limit are for --eval_tasks: name some"
    )
    lengths = [name for name in LENGTHS if name in explicit]
    need(len(lengths) < 2, f"--{' and --'.join(lengths)} each set the length: give one of them")
    need(cfg.curriculum or "curriculum_mix" not in explicit,
         "--curriculum_mix is for a --curriculum: name its folder")
    need("tok_per_sec" not in explicit,
         "--tok_per_sec is for --plan: a run measures its own speed; leave it out")
    of_experts = sorted(explicit & ExpertConfig.__annotations__.keys() - {"n_experts"})
    need(
        c.n_experts or not of_experts,
        f"{', '.join(f'--{name}' for name in of_experts)}: for Mixture of Experts, give --n_experts above 0"
    )
    need("keep_best" not in explicit or not cfg.keep_best or cfg.eval_every != 0,
         "--keep_best needs validations: give --eval_every above 0")
    need(
        (cfg.warmup_steps or 0) < cfg.steps,
        f"--warmup_steps {cfg.warmup_steps} must be below the run's {cfg.steps} steps: give a smaller one"
    )
    B, T = batch_size(0, cfg), c.block_size
    halves, at_first = (2, ", which --batch_warmup halves,") if cfg.total_batch_size > B else (1,
                                                                                               "")
    need(world_size <= B // T,
         f"--total_batch_size {cfg.total_batch_size}{at_first} is {B // T} sequences of --block_size {T}, fewer than "
         f"{world_size} processes: raise it, or lower --nproc_per_node")
    fitting = -(-B // (T * world_size)) * T * world_size * halves
    need(B * halves == cfg.total_batch_size and B % (T * world_size) == 0,
         f"--total_batch_size {cfg.total_batch_size}{at_first} must be a multiple of {f'{halves} x ' * (halves - 1)}"
         f"--block_size {T} x {world_size} processes; {fitting} is")
    rows = B // T // world_size
    need(cfg.micro_batch == "auto" or rows % cfg.micro_batch == 0,
         f"--micro_batch {cfg.micro_batch} must divide the {rows} sequences per process and step "
         f"(--total_batch_size {cfg.total_batch_size}{at_first} / --block_size {T} / {world_size} processes)")


def check_memory(tensors, device):
    """Raises BadInput if `device` has not the memory for tensors like these: a model's weights,
    gradients and optimizer state."""
    needed, there = sum(t.numel() * t.element_size() for t in tensors), memory_bytes(device)
    if there and needed > there:
        raise BadInput(f"this model's weights, gradients and optimizer state need {needed / 1e9:,.0f} GB, and there are "
                       f"{there / 1e9:,.0f}: lower --n_embd, --n_layer or --block_size")


class StepTimer:
    """Fits cfg.steps, the length of the run, to --minutes of training steps; without --minutes,
    leaves it. timed: tokens, their seconds."""

    def __init__(self, cfg, timed):
        self.cfg, self.timed = cfg, tuple(timed)

    @property
    def stands(self):
        """Whether the length no longer follows the speed."""
        return not self.cfg.minutes or self.timed[1] >= FIT_SHARE * 60 * self.cfg.minutes

    def length(self, step):
        """The steps that --minutes allow, `step` at least; UNMEASURED if no step was timed."""
        tokens, seconds = self.timed
        if not seconds:
            return UNMEASURED
        left = (60 * self.cfg.minutes - seconds) * tokens / seconds
        return max(steps_in(tokens_of(step, self.cfg) + left, self.cfg), step)

    def fit(self, step, seconds):
        """`step` updates are behind, the last of which took `seconds` -> cfg.steps."""
        if self.cfg.minutes:
            tokens, total = self.timed
            self.timed = tokens + batch_size(step - 1, self.cfg), total + seconds
            if not self.stands or self.cfg.steps == UNMEASURED:
                self.cfg.steps = max(self.length(step), step + 1)
        return self.cfg.steps


def warnings(cfg, corpus):
    """What speaks against a run of cfg.steps: lines."""
    stage, (epochs, name), lines = cfg.curriculum_steps or 0, corpus.most_repeated(
        tokens_of(cfg.steps, cfg)), []
    if stage > cfg.steps:
        lines.append(f"warning: --curriculum_steps {stage:,} is longer than the {cfg.steps:,} steps that --minutes allow: "
                     "the run ends within the curriculum; shorten it, or give more minutes")
    if cfg.steps <= _halved(cfg):
        lines.append(f"warning: all {cfg.steps:,} steps are of half of --total_batch_size: the run "
                     f"ends within its --batch_warmup of {cfg.batch_warmup:,} tokens; lower it, or "
                     "train for longer")
    if epochs > MANY_EPOCHS:
        lines.append(f"warning: {epochs:,.1f} epochs of {name}, more than {MANY_EPOCHS}, "
                     "beyond which repeated text teaches less and less: get more text, or train less on this")
    return lines


def matmul_flops(device):
    """FLOP/s of this device's matrix multiplications, measured in 0.1 s: what no training step
    exceeds."""
    n = 4096 if device.type == "cuda" else 512
    a = torch.ones(n, n, device=device, dtype=compute_dtype(device))
    fastest = math.inf
    end = time.perf_counter() + 0.1
    while time.perf_counter() < end or fastest == math.inf:
        started = time.perf_counter()
        (a @ a)[0, 0].item()  # waits for the device
        fastest = min(fastest, time.perf_counter() - started)
    return 2 * n**3 / fastest


def days(cfg, model, processes, first):
    """A line, before the step `first`, if the steps from there on take days on this machine; else
    none."""
    flops = model.flops_per_token() * (tokens_of(cfg.steps, cfg) - tokens_of(first, cfg))
    if cfg.minutes or flops < DAY * SLOWEST or not processes.main:
        return []
    speed = matmul_flops(processes.device) * processes.world_size
    if flops < DAY * speed:
        return []
    return [f"warning: this run takes at least {flops / speed / DAY:,.0f} days on this machine, whose matmuls make "
            f"{speed / 1e9:,.0f} GFLOP/s: shorten it by --max_steps or --minutes, or choose a smaller model"]


def describe(cfg, model, corpus, processes, first=0):
    """What is about to happen from the step `first` on, in a few lines."""
    counts, flops, c, device = model.parameter_counts(), model.flops_per_token(
    ), model.config, processes.device
    rows, tokens, halved = batch_size(0, cfg) // c.block_size // processes.world_size, tokens_of(
        cfg.steps, cfg), _halved(cfg)
    name = torch.cuda.get_device_name(
        device) if device.type == "cuda" else f"{device.type}, {torch.get_num_threads()} threads"
    active = f", {counts['active']:,} of them active per token" if counts["active"] < counts[
        "total"] else ""
    epochs, repeated = corpus.most_repeated(tokens)
    length = (f"{cfg.minutes:g} minutes of {_in_batches(None, cfg)}" if cfg.minutes else
              f"{cfg.steps:,} {_in_batches(cfg.steps, cfg)} = {tokens:,} tokens ({epochs:.2f} epochs of {repeated}, "
              f"{tokens / counts['total']:,.4g} tokens per parameter), {tokens * flops:.2e} FLOPs")
    return "\n".join([
        f"model   {counts['total']:,} parameters{active}: embedding {counts['embedding']:,}, "
        f"{c.n_layer} layers of {counts['layer']:,}; vocabulary {c.vocab_size:,}, padded to {c.padded_vocab_size:,}; "
        f"{flops / 1e6:,.1f} MFLOPs per token",
        *([f"start   with the weights of {cfg.init_from}"] if cfg.init_from else []),
        *corpus.describe(cfg, c.block_size),
        f"length  {length}",
        *([] if cfg.minutes else warnings(cfg,
                                          corpus)),  # RunFolder tells those once its length stands
        f"batch   {cfg.sequences} sequences x {c.block_size} tokens x {rows // cfg.sequences} accumulation steps x "
        f"{processes.world_size} processes" +
        (f"; twice the accumulation from step {halved:,} on" if 0 < halved < cfg.steps else ""),
        f"device  {name}, {str(compute_dtype(device)).removeprefix('torch.')}, torch {torch.__version__}",
        *days(cfg, model, processes, first),
    ])
