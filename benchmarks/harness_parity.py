"""An exportable checkpoint under lm-evaluation-harness twice: with our adapter, and with the
harness's own on the same weights.

    python benchmarks/harness_parity.py --checkpoint log/<run> --data_dir DIR

lib/huggingface.py converts the weights for transformers. Prints seconds, the metric of each task,
and the differences of log-likelihoods (median, maximum) in nats.
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
        huggingface.register_custom()
        rows = {"the harness's adapter, fp32": HFLM(
            pretrained=folder, device=str(processes.device), batch_size=args.batch_size,
            dtype="float32")}
        for dtype in ("fp32", "auto"):
            model, *_ = load_checkpoint(args.checkpoint, processes.device, dtype)
            rows[f"ours, {dtype}"] = harness.adapter(model, tokenizer, processes)
        expected = None  # those of the first row
        for name, lm in rows.items():
            tasks = harness.load_tasks(manager, names, args.data_dir)
            started = time.perf_counter()
            results = harness.run_tasks(lm, tasks, args.limit)
            seconds = time.perf_counter() - started
            nats = [request.resps[0][0] for task in tasks for request in task.instances]
            expected = expected or nats
            apart = sorted(abs(a - b) for a, b in zip(nats, expected, strict=True))
            scores = [f"{task} {results['results'][task][key]:.4f}"
                      for task, key in harness.headlines(results).items()]
            print(f"| {name} | {seconds:.1f} s | {', '.join(scores)} | "
                  f"{statistics.median(apart):.6f} | {apart[-1]:.6f} |", flush=True)


if __name__ == "__main__":
    main()
