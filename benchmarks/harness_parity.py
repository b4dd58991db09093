"""A checkpoint that can be exported under lm-evaluation-harness twice: our adapter, and the
harness's own on the same weights.

    python benchmarks/harness_parity.py --checkpoint log/<run>/ckpt_<step>.pt --data_dir DIR

The weights are handed to transformers by lib/huggingface.py. Prints seconds, each task's metric,
and how far apart the log-likelihoods are (median, maximum), in nats.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from lib import huggingface
from lib.devices import Processes
from lib.evals import harness
from train_gpt2 import load_checkpoint


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--tasks", default="hellaswag,arc_easy,piqa,lambada_openai")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--batch_size", default=64, type=int, help="of the harness's adapter")
    args = parser.parse_args()
    from lm_eval.models.huggingface import HFLM

    manager, names = harness.find_tasks(args.tasks)
    with Processes("auto") as processes, tempfile.TemporaryDirectory() as folder:
        model, tokenizer, _ = load_checkpoint(args.checkpoint, processes.device)
        huggingface.write(model, tokenizer, folder)
        theirs = HFLM(pretrained=folder, device=str(processes.device), batch_size=args.batch_size,
                      dtype="float32")
        rows = [("the harness's adapter, fp32", theirs)]
        rows += [(f"ours, {dtype}", harness.adapter(model, tokenizer, processes, dtype=dtype))
                 for dtype in ("float32", "auto")]
        want = None
        for name, lm in rows:
            tasks = harness.load_tasks(manager, names, args.data_dir)
            started = time.perf_counter()
            results = harness.run_tasks(lm, tasks, args.limit)["results"]
            seconds = time.perf_counter() - started
            nats = [request.resps[0][0] for task in tasks for request in task.instances]
            want = want or nats
            apart = sorted(abs(a - b) for a, b in zip(nats, want, strict=True))
            scores = ", ".join(f"{task} {results[task][key]:.4f}"
                               for task, key in harness.headlines({"results": results}).items())
            print(
                f"| {name} | {seconds:.1f} s | {scores} | {statistics.median(apart):.6f} | {apart[-1]:.6f} |",
                flush=True)


if __name__ == "__main__":
    main()
