"""A GPT with modern parts, each a field of its configuration. Needs torch and transformers only.

Shapes in comments: B sequences, T tokens, C = n_embd, H heads of D = C / H, V ids.
"""

from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple

EPS = 1e-5  # of all norms
CACHE = "cache" if hasattr(CausalLMOutputWithPast, "cache") else "past_key_values"  # was renamed


class ModernGPTConfig(PreTrainedConfig):
    model_type = "modern_gpt"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {"hidden_size": "n_embd", "num_attention_heads": "n_head",
                     "max_position_embeddings": "block_size"}
    num_hidden_layers = property(lambda self: len(self.layer_types))  # of the cache
    vocab_size: int = 50_257
    block_size: int = 1024            # context length, tokens
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    intermediate_size: int = 3072     # hidden units of the MLP, or of each expert
    mlp: str = "gelu"                 # gelu, relu2 or swiglu
    norm: str = "layernorm"           # layernorm or rmsnorm
    pos: str = "learned"              # learned or rope
    bias: bool = True                 # in linear layers and LayerNorm
    emb_norm: bool = False            # norm right after the embeddings
    qk_norm: bool = False             # norm on each head's queries and keys
    token_shift: bool = False         # add the previous token to each attention layer's input
    value_residual: bool = False      # mix the first layer's values into the others'
    residual_scalars: bool = False    # weigh residual stream and embedding in each block's input
    bigram: int = 0                   # rows of a table for pairs of tokens; 0: none
    bigram_dim: int = 0               # width of its vectors; 0: n_embd
    softcap: float = 0.0              # bound on the logits; 0: none
    dropout: float = 0.0
    tie_word_embeddings: bool = True
    n_experts: int = 0                # 0: a dense MLP
    n_active: int = 2                 # experts per token
    n_shared: int = 0                 # experts that process every token
    router: str = "sigmoid"           # sigmoid or softmax
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs):
        # hybrid: the layer's cache also holds the state of a convolution, here TokenShift's
        kwargs.pop("layer_types", None)
        layer_type = "hybrid" if self.token_shift else "full_attention"
        self.layer_types = [layer_type] * self.n_layer
        if self.bigram:
            self.layer_types.append("conv")  # one more layer of the cache, for the previous id
        super().__post_init__(**kwargs)


class RMSNorm(nn.RMSNorm):
    """Zhang & Sennrich 2019, https://arxiv.org/abs/1910.07467, in fp32."""

    def forward(self, x):
        y = F.rms_norm(x.float(), self.normalized_shape, self.weight.float(), self.eps)
        return y.type_as(x)


def make_norm(config, size):
    if config.norm == "rmsnorm":
        return RMSNorm(size, eps=EPS)
    return nn.LayerNorm(size, eps=EPS, bias=config.bias)


def positions_of(attention_mask, past, x):
    """The position in its text of each token of x (B, T, C), int64 (B or 1, T), after `past` tokens
    in the cache. attention_mask: (B, past + T), 0 for padding on either side, or None."""
    if attention_mask is None or attention_mask.dim() != 2:
        return (torch.arange(x.size(1), device=x.device) + past)[None]
    positions = attention_mask.long().cumsum(dim=-1) - 1
    return positions.clamp(min=0)[:, -x.size(1):].to(x.device)


def rotary_tables(positions, head_dim):
    """RoPE (Su et al. 2021, https://arxiv.org/abs/2104.09864): cosines and sines, fp32
    (B, T, 1, D/2) each. In bf16, positions 1000 and 1001 would be the same."""
    pairs = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device)
    angles = positions[..., None].float() * 10_000.0 ** (-pairs / head_dim)
    return angles.cos()[:, :, None], angles.sin()[:, :, None]


def rotate(x, rotary):
    """Queries or keys (B, T, H, D) at their positions. Dimension i is paired with i + D/2."""
    if rotary is None:  # learned positions
        return x
    cos, sin = rotary
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).type_as(x)


class TokenShift(nn.Module):
    """x_t + w * x_{t-1} with a learned weight per channel (after Primer, So et al. 2021,
    https://arxiv.org/abs/2109.08668). The first token of a text has no previous one."""

    def __init__(self, config, layer_idx):
        super().__init__()
        self.layer_idx = layer_idx
        self.weight = nn.Parameter(torch.zeros(config.n_embd))

    def forward(self, x, positions, past_key_values):
        seen = x
        if past_key_values is not None:  # keeps the last token, and returns it before the new ones
            seen = past_key_values.update_conv_state(x.mT, self.layer_idx, conv_kernel_size=1).mT
        previous = F.pad(seen, (0, 0, 1, 0))[:, -x.size(1) - 1:-1]
        return x + self.weight * previous.masked_fill(positions[..., None] == 0, 0.0)


class Bigrams(nn.Embedding):
    """A vector for each token and the one before it, hashed to a row: int64 (B, T) -> (B, T, D)."""

    def forward(self, input_ids, positions, past_key_values):
        if input_ids is None:
            raise ValueError("a model with bigrams needs input_ids, not only inputs_embeds")
        seen = input_ids.long()[:, None] + 1  # 0 is left for the start of a text
        if past_key_values is not None:
            seen = past_key_values.update_conv_state(seen, -1, conv_kernel_size=1)
        previous = F.pad(seen[:, 0], (1, 0))[:, -input_ids.size(1) - 1:-1]
        previous = previous.masked_fill(positions == 0, 0)
        return super().forward((previous * 2_654_435_761 + input_ids) % self.num_embeddings)


class Mix(nn.Module):
    """A learned weighted sum of two tensors; with one weight w, x + w * y."""

    def __init__(self, *weights):
        super().__init__()
        self.mix = nn.Parameter(torch.tensor(weights))

    def forward(self, x, y):
        if len(self.mix) == 2:
            x = self.mix[0] * x
        return x + self.mix[-1] * y


class Attention(nn.Module):
    is_causal = True

    def __init__(self, config, layer_idx):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.n_embd // config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        # Henry et al. 2020, https://arxiv.org/abs/2010.04245
        self.q_norm = make_norm(config, self.head_dim) if config.qk_norm else nn.Identity()
        self.k_norm = make_norm(config, self.head_dim) if config.qk_norm else nn.Identity()
        # value residual: Zhou et al. 2024, https://arxiv.org/abs/2410.17897
        self.mix_values = Mix(0.5, 0.5) if config.value_residual and layer_idx > 0 else None

    def forward(self, x, v_first, rotary, mask, past_key_values, **kwargs):
        """x: (B, T, C). v_first: the first layer's values, None in that layer."""
        B, T, C = x.shape
        q, k, v = self.c_attn(x).view(B, T, 3, -1, self.head_dim).unbind(2)     # (B, T, H, D) each
        q = rotate(self.q_norm(q), rotary).transpose(1, 2)
        k = rotate(self.k_norm(k), rotary).transpose(1, 2)
        if v_first is None:
            v_first = v
        if self.mix_values is not None:
            v = self.mix_values(v, v_first)
        v = v.transpose(1, 2)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]  # for "eager", too
        attention = ALL_ATTENTION_FUNCTIONS.get(self.config._attn_implementation, sdpa)
        dropout = self.config.dropout if self.training else 0.0
        scale = self.head_dim**-0.5
        y, _ = attention(self, q, k, v, mask, scaling=scale, dropout=dropout, **kwargs)
        return self.c_proj(y.reshape(B, T, C)), v_first


def swiglu(h):
    gate, value = h.chunk(2, dim=-1)
    return F.silu(gate) * value  # Shazeer 2020, https://arxiv.org/abs/2002.05202


ACTIVATIONS = {"gelu": partial(F.gelu, approximate="tanh"), "swiglu": swiglu,
               "relu2": lambda h: F.relu(h).square()}  # https://arxiv.org/abs/2109.08668
FUSED = {"gelu": 1, "relu2": 1, "swiglu": 2}  # matrices in c_fc


class MLP(nn.Module):
    def __init__(self, config, width):
        super().__init__()
        self.act = config.mlp
        self.c_fc = nn.Linear(config.n_embd, FUSED[config.mlp] * width, bias=config.bias)
        self.c_proj = nn.Linear(width, config.n_embd, bias=config.bias)

    def forward(self, x):
        return self.c_proj(ACTIVATIONS[self.act](self.c_fc(x)))


class Block(GradientCheckpointingLayer):
    def __init__(self, config, layer_idx):
        super().__init__()
        weights = (1.0, 0.0) if config.residual_scalars else (0.05,)
        mixes = config.residual_scalars or config.bigram
        self.mix_residual = Mix(*weights) if mixes else None
        self.ln_1 = make_norm(config, config.n_embd)
        self.token_shift = TokenShift(config, layer_idx) if config.token_shift else None
        self.attn = Attention(config, layer_idx)
        self.ln_2 = make_norm(config, config.n_embd)
        self.mlp = MoE(config) if config.n_experts else MLP(config, config.intermediate_size)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x, x0, v_first, positions, rotary, mask, past_key_values=None, **kwargs):
        if self.mix_residual is not None:
            x = self.mix_residual(x, x0)
        y = self.ln_1(x)
        if self.token_shift is not None:
            y = self.token_shift(y, positions, past_key_values)
        y, v_first = self.attn(y, v_first, rotary, mask, past_key_values, **kwargs)
        x = x + self.drop(y)
        return x + self.drop(self.mlp(self.ln_2(x))), v_first


class Transformer(nn.Module):
    """Everything but the output head: int64 (B, T) -> hidden states (B, T, C)."""

    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, C)
        self.wpe = nn.Embedding(config.block_size, C) if config.pos == "learned" else None
        width = config.bigram_dim or C
        self.bigram = Bigrams(config.bigram, width) if config.bigram else None
        self.emb_norm = make_norm(config, C) if config.emb_norm else nn.Identity()
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config, layer_idx) for layer_idx in range(config.n_layer))
        self.ln_f = make_norm(config, C)

    def forward(self, input_ids=None, attention_mask=None, position_ids=None,
                past_key_values=None, inputs_embeds=None, use_cache=None,
                output_hidden_states=False, **kwargs):
        config = self.config
        x = self.wte(input_ids) if inputs_embeds is None else inputs_embeds             # (B, T, C)
        use_cache = config.use_cache if use_cache is None else use_cache
        if use_cache and past_key_values is None and not self.training:
            past_key_values = DynamicCache(config=config)
        if isinstance(attention_mask, dict):  # made by `generate` for a static cache
            attention_mask = attention_mask["full_attention"]
        if position_ids is None:
            past = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = positions_of(attention_mask, past, x)
        mask = create_causal_mask(config, x, attention_mask, past_key_values, position_ids)
        rotary = None
        if config.pos == "rope":
            rotary = rotary_tables(position_ids, config.n_embd // config.n_head)
        else:
            x = x + self.wpe(position_ids)
        x = x0 = self.drop(self.emb_norm(x))
        if self.bigram is not None:
            x0 = self.bigram(input_ids, position_ids, past_key_values)
            x0 = F.pad(x0, (0, x.size(-1) - x0.size(-1)))
        v_first = None
        hidden_states = [x]
        for block in self.h:
            # positional, as reentrant gradient checkpointing needs
            x, v_first = block(x, x0, v_first, position_ids, rotary, mask,
                               past_key_values=past_key_values, **kwargs)
            hidden_states.append(x)
        hidden_states[-1] = x = self.ln_f(x)
        hidden_states = tuple(hidden_states) if output_hidden_states else None
        return BaseModelOutputWithPast(x, past_key_values, hidden_states)


class ModernGPTForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = ModernGPTConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]
    _skip_keys_device_placement = ["past_key_values"]
    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}
    _keep_in_fp32_modules_strict = ["mlp.bias", "mlp.router"]  # of a MoE
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True
    _can_compile_fullgraph = True

    def __init__(self, config):
        super().__init__(config)
        self.transformer = Transformer(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.softcap:  # or trl would compute a loss from hidden states, without the cap
            self.base_model_prefix = ""
        self.post_init()

    def get_input_embeddings(self):
        return self.transformer.wte

    def set_input_embeddings(self, embeddings):
        self.transformer.wte = embeddings

    @can_return_tuple
    def forward(self, input_ids=None, attention_mask=None, position_ids=None,
                past_key_values=None, inputs_embeds=None, use_cache=None,
                output_hidden_states=False, labels=None, logits_to_keep=0, cache=None, **kwargs):
        """labels: int64 (B, T), shifted inside; -100 is ignored. logits_to_keep: the last n
        positions, or an index of positions; 0: all. Logits are fp32 (B, T, V)."""
        past_key_values = cache if cache is not None else past_key_values
        outputs = self.transformer(input_ids, attention_mask, position_ids, past_key_values,
                                   inputs_embeds, use_cache, output_hidden_states, **kwargs)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs[0][:, kept]).float()
        if self.config.softcap:  # bounds logits z: cap z / sqrt(z^2 + cap^2)
            logits = logits * (logits.square() / self.config.softcap**2 + 1).rsqrt()
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss, logits, outputs.get(CACHE), outputs.hidden_states)


# --------------------------------------------------------------------------------------------------
# Mixture of Experts


class ExpertLinear(nn.Module):
    """The matrices of all experts, (E, out, in)."""

    def __init__(self, n_experts, n_in, n_out):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_experts, n_out, n_in))

    def forward(self, x, expert):
        return F.linear(x, self.weight[expert])


class MoE(nn.Module):
    """The sum of each token's n_active experts, weighted by their normalized scores, plus the
    shared experts. No token is dropped.

    `bias` only affects which experts are picked (Wang et al. 2024,
    https://arxiv.org/abs/2408.15664). It keeps the value that pretraining gave it.
    """

    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        E = config.n_experts
        width = config.intermediate_size
        self.n_active = config.n_active
        self.softmax = config.router == "softmax"
        self.act = config.mlp
        self.router = nn.Linear(C, E, bias=False)
        self.c_fc = ExpertLinear(E, C, FUSED[config.mlp] * width)
        self.c_proj = ExpertLinear(E, width, C)
        self.shared = MLP(config, config.n_shared * width) if config.n_shared else None
        self.register_buffer("bias", torch.zeros(E))

    def forward(self, x):
        tokens = x.flatten(0, 1)                                                        # (B T, C)
        gates, picked = self.route(tokens)                                              # (B T, K)
        y = torch.zeros_like(tokens)
        for expert in range(len(self.bias)):
            rows, picks = (picked == expert).nonzero(as_tuple=True)
            hidden = ACTIVATIONS[self.act](self.c_fc(tokens[rows], expert))
            out = self.c_proj(hidden, expert) * gates[rows, picks, None]
            y = y.index_add(0, rows, out.type_as(y))
        y = y.view_as(x)
        if self.shared is not None:
            y = y + self.shared(x)
        return y

    def route(self, x):
        """Tokens (n, C) -> gates, which add up to 1 per token, and experts, (n, K) each; in fp32.
        """
        with torch.autocast(x.device.type, enabled=False):
            logits = self.router(x.type_as(self.router.weight)).float()
            scores = logits.softmax(dim=-1) if self.softmax else logits.sigmoid()
            picked = (scores + self.bias).topk(self.n_active).indices
            gates = scores.gather(-1, picked)
            return gates / gates.sum(dim=-1, keepdim=True).clamp_min(1e-20), picked
