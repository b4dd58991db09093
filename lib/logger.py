"""What a run says: to the console, to log.txt and to TensorBoard."""

import contextlib
import logging
import os
import sys

from lib.cli import BadInput


class Logger:
    """Console, log.txt and TensorBoard of one run folder; `Logger.null()` stands in on other ranks.

    What TensorBoard has of first_step and later is forgotten: these steps run again.
    """

    def __init__(self, folder, max_steps, first_step):
        from torch.utils.tensorboard import SummaryWriter  # takes seconds to import: only rank 0 pays
        from tqdm import tqdm

        self.file = open(folder / "log.txt", "a", buffering=1)  # noqa: SIM115 (open as long as the run)
        again = any(folder.glob("events*"))
        self.writer = SummaryWriter(folder, flush_secs=10, purge_step=first_step if again else None)
        self.bar = tqdm(total=max_steps, initial=first_step, unit="step", dynamic_ncols=True) if sys.stdout.isatty() else None

    @staticmethod
    def null():
        class Null:
            def __getattr__(self, name):
                return lambda *args, **kwargs: None
        return Null()

    def say(self, text):
        with self._console():
            print(f"{text}\n", end="", flush=True) if self.bar is None else self.bar.write(text)

    def progress(self, step, text):
        """The line of one step: a bar on a terminal, a plain line elsewhere."""
        if self.bar is None:
            self.say(f"step {step} | {text}")
        else:
            with self._console():
                self.bar.set_postfix_str(text, refresh=False)
                self.bar.update(step + 1 - self.bar.n)

    @contextlib.contextmanager
    def _console(self):
        """A run outlives its console: after Ctrl-C to `| tee` too, or with the connection gone, it must still be saved."""
        try:
            yield
        except OSError:
            self.bar, nowhere = None, os.open(os.devnull, os.O_WRONLY)
            for stream in (1, 2):
                os.dup2(nowhere, stream)

    def record(self, step, kind, value):
        """A line of log.txt: `step kind value`, kind being train, val, hella or eval/<task>."""
        self.file.write(f"{step} {kind} {value:.6f}\n")

    def scalars(self, step, values):
        from tensorboard.compat.proto.summary_pb2 import Summary

        # in one record: add_scalar one by one would keep the GPU waiting for a millisecond or two a step
        self.writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=tag, simple_value=v) for tag, v in values.items()]), step)

    def text(self, step, tag, text):
        self.writer.add_text(tag, text, step)

    def flush(self):
        """What was logged so far survives this process: called before a checkpoint, from which later steps run again."""
        self.writer.flush()
        os.fsync(self.file.fileno())

    def hyperparameters(self, step, values):
        """All settings, as a table under TEXT and, in this same run, under HPARAMS."""
        from torch.utils.tensorboard.summary import hparams

        plain = {k: v if isinstance(v, (bool, int, float)) else str(v) for k, v in values.items()}
        self.text(step, "hyperparameters", "\n".join(["|flag|value|", "|-|-|"] + [f"|{k}|{v}|" for k, v in values.items()]))
        for summary in hparams(plain, {"val/loss": 0.0, "eval/hellaswag": 0.0}):
            self.writer.file_writer.add_summary(summary)

    def close(self):
        if self.bar is not None:
            with self._console():
                self.bar.close()
        self.writer.close()
        self.file.close()


def serve_tensorboard(log_dir, port):
    """Serve TensorBoard from a thread of this process, so that it ends with the run. Raises BadInput if the port is taken."""
    from tensorboard import program

    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    board = program.TensorBoard()
    board.configure(argv=["tensorboard", "--logdir", log_dir, "--port", str(port), "--bind_all"])
    try:
        return board.launch()
    except program.TensorBoardServerException as error:
        raise BadInput(f"TensorBoard cannot use port {port}: give another --tensorboard port, or end what uses it") from error
