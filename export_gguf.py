"""Export a checkpoint to a GGUF file for llama.cpp, Ollama and LM Studio: weights, tokenizer, chat
template; and beside it a Modelfile for Ollama and a model card.

    python export_gguf.py --checkpoint log/<run> --out chat.gguf
    python export_gguf.py --checkpoint PATH --out chat.gguf --dtype q8_0
    ollama create chat -f chat.Modelfile && ollama run chat

llama.cpp computes the same. Its architecture depends on the flags used in training:
    gpt2         --norm layernorm --pos learned --mlp gelu --no-emb_norm
    starcoder2   --norm layernorm --pos rope    --mlp gelu
    nemotron     --norm layernorm --pos rope    --mlp relu2
    stablelm     --norm layernorm --pos rope    --mlp swiglu --no-bias [--qk_norm]
    llama        --norm rmsnorm   --pos rope    --mlp swiglu
    qwen3        --norm rmsnorm   --pos rope    --mlp swiglu --no-bias --qk_norm
    arcee        --norm rmsnorm   --pos rope    --mlp relu2  --no-bias
    glm4moe      --norm rmsnorm   --pos rope    --mlp swiglu --no-bias --n_experts N
                 [--n_shared N] [--qk_norm]
    llama        as glm4moe with --router softmax --balance loss, without --n_shared and --qk_norm
    qwen3moe     as glm4moe with --router softmax --balance loss --qk_norm, without --n_shared
Other combinations are rejected. With --pos rope, --emb_norm is supported, too: it is applied to the
embedding table. llama.cpp has no counterpart of --token_shift, --value_residual,
--residual_scalars, --bigram and --softcap, which the presets speedrun and tiny use.

The tokenizer may be GPT-2's, r50k_base, p50k_base, p50k_edit, cl100k_base, or one made by
tokenizer.py train or fineweb.py --tokenizer bpe:N. llama.cpp only approximates o200k_base.
"""

import lib.startup  # noqa: F401 (before torch)

# isort: split

import shlex
from dataclasses import dataclass
from pathlib import Path

from lib import checkpoint, llamacpp
from lib.cli import BadInput, flag, parse, path_flag, run
from lib.evals import harness
from lib.model_card import in_llamacpp, model_card
from train_gpt2 import load_checkpoint


@dataclass(frozen=True)
class Config(checkpoint.ModelConfig):
    out: str | None = path_flag(None, "new .gguf file")
    dtype: str = flag(
        "f16", "type of the matrices; q8_0: 8 bits", choices=lambda: llamacpp.FILE_TYPES)


def main(argv: list[str]) -> None:
    (cfg,), _ = parse((Config,), argv, __doc__)
    name = checkpoint.named(cfg)
    if cfg.out is None or not cfg.out.endswith(".gguf"):
        raise BadInput("name --out, the .gguf file to write")
    llamacpp.library()  # before the checkpoint is read
    name = checkpoint.pick(name)
    model, tokenizer, state = load_checkpoint(name)
    tokenizer.require_text("an export, which includes the tokenizer,")
    checkpoint.check_finite(model.state_dict(), name)
    template = state.get("chat_template")
    architecture = llamacpp.find_architecture(model.config).name
    loading = in_llamacpp(architecture, Path(cfg.out).stem, bool(template))
    card = model_card(model, tokenizer, state, name, loading,
                      harness.found_evaluations(name, state.get("step")))
    modelfile, readme = llamacpp.write(model, tokenizer, cfg.out, cfg.dtype, card, template)
    size = Path(cfg.out).stat().st_size
    print(f"{cfg.out}: {architecture}, {cfg.dtype}, {size / 1e9:.2f} GB")
    model_name = shlex.quote(modelfile.stem)
    print(f"for Ollama: ollama create {model_name} -f {shlex.quote(str(modelfile))}")
    print(f"upload it: hf upload {model_name} {shlex.quote(cfg.out)} && "
          f"hf upload {model_name} {shlex.quote(str(readme))} README.md")


if __name__ == "__main__":
    run(main)
