"""Hugging Face: GPT-2 weights of transformers' classes in our layout, and its hub without a network."""

import http.client
import os
import ssl
import sys
import urllib.error
import urllib.request

from lib.cli import BadInput

CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # transformers' Conv1D holds the transpose of a Linear's weight


def read_gpt2(name):
    """A Hugging Face GPT-2 -> (dict of GPTConfig fields, state dict of GPT).

    name: "gpt2", ..., "gpt2-xl", or a folder that save_pretrained made.
    Raises BadInput if it cannot be loaded, or is not GPT-2 as OpenAI published it.
    """
    try:
        from transformers import GPT2LMHeadModel
    except ImportError as error:
        raise BadInput("loading a Hugging Face model needs transformers: pip install -r requirements-dev.txt") from error
    if not os.path.isdir(name):
        cache_only_without_network()
    try:
        hf, report = GPT2LMHeadModel.from_pretrained(name, output_loading_info=True)
    except Exception as error:  # whatever the hub and the readers of its formats raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BadInput(f"cannot load the Hugging Face GPT-2 {name}: {reason}") from error
    c = hf.config
    # transformers only warns of another architecture's weights, and its variants compute something else
    classic = dict(activation_function="gelu_new", layer_norm_epsilon=1e-5, tie_word_embeddings=True, scale_attn_weights=True,
                   scale_attn_by_inverse_layer_idx=False, add_cross_attention=False, n_inner=c.n_inner and 4 * c.n_embd)
    odd = sorted(report["missing_keys"]) or [key for key, value in classic.items() if getattr(c, key) != value]
    if odd:
        raise BadInput(f"{name} is not a GPT-2 as OpenAI's: see its {', '.join(odd[:4])}")
    # no padding: its rows would be untrained weights, and take part in the softmax of the loss
    config = dict(block_size=c.n_positions, n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd, vocab_size=c.vocab_size,
                  vocab_multiple=1)
    return config, {key: value.t() if key.endswith(CONV1D) else value for key, value in hf.state_dict().items()}


def cache_only_without_network(seconds=4.0):
    """Where the hub cannot be reached, let its libraries use their cache alone: they would try again for half a minute."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return
    try:
        urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=seconds).close()
    except urllib.error.HTTPError:
        pass  # it answers
    except (OSError, http.client.HTTPException, ValueError) as error:
        if isinstance(getattr(error, "reason", error), ssl.SSLError):  # it answers: the libraries bring their own certificates
            return
        os.environ["HF_HUB_OFFLINE"] = "1"  # for a library that is not imported yet
        constants.HF_HUB_OFFLINE = True
        if "datasets" in sys.modules:
            sys.modules["datasets"].config.HF_HUB_OFFLINE = True
