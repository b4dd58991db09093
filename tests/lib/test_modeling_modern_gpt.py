"""lib/modeling_modern_gpt.py, loaded from an exported folder, against train_gpt2.py's GPT.

    python -m pytest tests/lib/test_modeling_modern_gpt.py
"""

import importlib.util
import itertools
import subprocess
import sys

import pytest
import torch
from helpers import ROOT, tiny
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, StaticCache

from lib import huggingface
from lib.moe import MoE
from train_gpt2 import GPT

SPEEDRUN = dict(
    mlp="relu2", norm="rmsnorm", pos="rope", emb_norm=True, qk_norm=True, bias=False,
    token_shift=True, value_residual=True, residual_scalars=True, softcap=5.0, block_size=48,
)
LEARNED = dict(token_shift=True, value_residual=True, block_size=48)
EXPERTS = SPEEDRUN | dict(n_experts=4, n_shared=1)
BIGRAMS = SPEEDRUN | dict(bigram=41, bigram_dim=12, residual_scalars=False)
PLAIN_BIGRAMS = dict(bigram=41, block_size=48)  # no cached layer but the ids' has a convolution
MODELS = dict(speedrun=SPEEDRUN, learned=LEARNED, experts=EXPERTS, bigrams=BIGRAMS,
              plain_bigrams=PLAIN_BIGRAMS)
EXACT = dict(rtol=0, atol=1e-4)
# Padding (id 0) does not occur in the prompts, from which `generate` would infer a mask.
GREEDY = dict(do_sample=False, max_new_tokens=20, eos_token_id=-1, pad_token_id=0)


def random_model(**toggles):
    """All weights random and large enough that every part matters."""
    torch.manual_seed(0)
    model = GPT(tiny(**toggles)).eval()
    for p in model.parameters():
        p.data.normal_(std=0.4)
    for module in model.modules():
        if isinstance(module, MoE):
            module.bias.normal_(std=0.2)
    return model


@pytest.fixture(scope="module", params=MODELS)
def exported(request, tokenizer, tmp_path_factory):
    """(our model, its exported folder)."""
    model = random_model(vocab_size=tokenizer.vocab_size, **MODELS[request.param])
    folder = tmp_path_factory.mktemp("exports") / request.param
    huggingface.write(model, tokenizer, folder)
    return model, folder


@pytest.fixture
def ours(exported):
    return exported[0]


@pytest.fixture
def load(exported):
    """Load the exported folder with its own code."""
    def load(**settings):
        settings = dict(dtype=torch.float32) | settings
        return AutoModelForCausalLM.from_pretrained(
            exported[1], trust_remote_code=True, **settings)
    return load


@pytest.fixture
def theirs(load):
    return load()


def prompts():
    """Three prompts of 5, 9 and 12 tokens."""
    idx = torch.randint(1, 61, (3, 12), generator=torch.Generator().manual_seed(0))
    return [idx[0, :5], idx[1, :9], idx[2]]


def padded(rows):
    """Prompts -> ids padded on the left, and their mask."""
    length = max(map(len, rows))
    idx = torch.zeros(len(rows), length, dtype=torch.long)
    mask = torch.zeros_like(idx)
    for i, row in enumerate(rows):
        idx[i, length - len(row):] = row
        mask[i, length - len(row):] = 1
    return idx, mask


@torch.no_grad()
def greedy(model, row, n):
    """The n ids that our model, without a cache, adds to a prompt."""
    ids = row[None]
    for _ in range(n):
        ids = torch.cat((ids, model(ids)[:, -1:].argmax(dim=-1)), dim=1)
    return ids[0, len(row):]


# --------------------------------------------------------------------------------------------------
# The forward pass


@torch.no_grad()
def test_every_combination_of_toggles_has_the_same_logits():
    toggles = dict(
        norm=("layernorm", "rmsnorm"), pos=("learned", "rope"), mlp=("gelu", "relu2", "swiglu"),
        bias=(False, True), tie_embeddings=(False, True), token_shift=(False, True),
    )
    extras = (
        {}, dict(emb_norm=True, softcap=3.0), dict(qk_norm=True, residual_scalars=True),
        dict(value_residual=True, dropout=0.1), dict(n_experts=4, n_active=3),
        dict(n_experts=4, n_shared=2, router="softmax", balance="loss", expert_width=24),
        dict(bigram=53, bigram_dim=20),
    )
    idx = torch.randint(61, (2, 16))
    for i, values in enumerate(itertools.product(*toggles.values())):
        model = random_model(**dict(zip(toggles, values)) | extras[i % len(extras)])
        hidden = model.transformer.h[0].mlp.c_proj.weight.size(-1)
        theirs = huggingface.custom(model.config, hidden)
        state = model.state_dict()
        for key in ("transformer.wte.weight", "lm_head.weight"):
            state[key] = state[key][:61]
        theirs.load_state_dict(state)
        logits = model(idx)
        assert logits.abs().max() > 0.5
        torch.testing.assert_close(theirs.eval()(idx).logits, logits, **EXACT)


@torch.no_grad()
@pytest.mark.parametrize("exported", ["speedrun"], indirect=True)
def test_the_folder_needs_nothing_of_this_project(exported, tmp_path):
    model, folder = exported
    idx = torch.stack([row[:5] for row in prompts()])
    torch.save((idx, model(idx)), tmp_path / "expected.pt")
    code = (
        "import importlib.util, sys, torch\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "folder, expected = sys.argv[1:]\n"
        "assert not any(map(importlib.util.find_spec, ('lib', 'train_gpt2')))\n"
        "model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)\n"
        "AutoTokenizer.from_pretrained(folder, trust_remote_code=True)\n"
        "idx, logits = torch.load(expected)\n"
        "torch.testing.assert_close(model(idx).logits, logits, rtol=0, atol=1e-4)\n"
    )
    command = [sys.executable, "-I", "-c", code, str(folder), str(tmp_path / "expected.pt")]
    env = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True,
                          check=False)
    assert done.returncode == 0, done.stderr


@torch.no_grad()
@pytest.mark.parametrize("attention", [
    "eager", "sdpa", pytest.param("flex_attention", marks=pytest.mark.slow)])
def test_kinds_of_attention(attention, load, ours):
    idx = torch.stack([row[:5] for row in prompts()])
    theirs = load(attn_implementation=attention)
    torch.testing.assert_close(theirs(idx).logits, ours(idx), **EXACT)


@torch.no_grad()
def test_padding_and_packing_do_not_change_a_text(theirs, ours):
    rows = prompts()
    idx, mask = padded(rows)
    left = theirs(idx, attention_mask=mask).logits
    right = theirs(idx.flip(1), attention_mask=mask.flip(1)).logits
    for i, row in enumerate(rows):
        torch.testing.assert_close(left[i, -len(row):], ours(row[None])[0], **EXACT)
        torch.testing.assert_close(right[i, :len(row)], ours(row.flip(0)[None])[0], **EXACT)
    packed = torch.cat(rows)[None]
    positions = torch.cat([torch.arange(len(row)) for row in rows])[None]
    logits = theirs(packed, position_ids=positions, use_cache=False).logits[0]
    for row, part in zip(rows, logits.split([len(row) for row in rows])):
        torch.testing.assert_close(part, ours(row[None])[0], **EXACT)


@torch.no_grad()
def test_bf16_and_rounded_weights(load, ours):
    """The biases that choose experts, and the router's products, stay in fp32."""
    idx = prompts()[2][None]
    theirs = load(dtype=torch.bfloat16)
    assert theirs.lm_head.weight.dtype == torch.bfloat16
    logits = ours(idx)
    if not ours.config.n_experts:  # other experts change logits a lot
        assert (theirs(idx).logits - logits).abs().max() < 0.1 * logits.abs().max()
    for name, tensor in theirs.named_buffers():
        assert tensor.dtype == torch.float32, name
    output = theirs.generate(idx, attention_mask=torch.ones_like(idx), **GREEDY)
    assert output.shape == (1, 32)


@torch.no_grad()
def test_compiled_and_with_all_outputs(theirs, ours):
    idx = prompts()[2][None]
    whole = not ours.config.n_experts  # a token's experts depend on the data
    compiled = torch.compile(theirs, backend="aot_eager", fullgraph=whole)
    torch.testing.assert_close(compiled(idx).logits, ours(idx), **EXACT)
    output = theirs(idx, output_hidden_states=True, logits_to_keep=1)
    torch.testing.assert_close(output.logits, ours(idx)[:, -1:], **EXACT)
    assert len(output.hidden_states) == 3
    embeddings = theirs.get_input_embeddings()(idx)
    if ours.config.bigram:
        with pytest.raises(ValueError, match="input_ids"):
            theirs(inputs_embeds=embeddings)
        return
    embedded = theirs(inputs_embeds=embeddings, return_dict=False)
    torch.testing.assert_close(embedded[0], ours(idx), **EXACT)


@torch.no_grad()
def test_a_device_map_places_blocks_apart(load, theirs, ours, tmp_path, request):
    """On one device: parts on the CPU, parts on the disk."""
    if ours.config.n_experts:
        reason = "accelerate leaves a MoE's buffer behind"
        request.applymarker(pytest.mark.xfail(raises=NotImplementedError, strict=True,
                                              reason=reason))
    idx = prompts()[2][None]
    places = {f"transformer.{name}": "cpu" for name, _ in theirs.transformer.named_children()}
    places |= {"transformer.h.1": "disk", "transformer.ln_f": "disk", "lm_head": "cpu"}
    places["transformer.h.0"] = places.pop("transformer.h")
    theirs = load(device_map=places, offload_folder=tmp_path / "offloaded")
    assert theirs.hf_device_map == places
    torch.testing.assert_close(theirs(idx).logits, ours(idx), **EXACT)
    output = theirs.generate(idx, attention_mask=torch.ones_like(idx), **GREEDY)
    assert torch.equal(output[0, 12:], greedy(ours, idx[0], 20))


# --------------------------------------------------------------------------------------------------
# generate


@torch.no_grad()
@pytest.mark.parametrize("settings", [
    dict(),
    dict(use_cache=False),
    dict(cache_implementation="static", disable_compile=True),
], ids=str)
def test_greedy_text_of_prompts_of_several_lengths(settings, theirs, ours):
    rows = prompts()
    idx, mask = padded(rows)
    output = theirs.generate(idx, attention_mask=mask, **GREEDY, **settings)
    for row, ids in zip(rows, output[:, idx.size(1):]):
        assert torch.equal(ids, greedy(ours, row, 20))


@torch.no_grad()
@pytest.mark.parametrize("exported", ["bigrams"], indirect=True)  # all kinds of cache layers
def test_compiled_steps_with_a_static_cache(theirs, ours):
    idx = prompts()[2][None]
    cache = StaticCache(config=theirs.config, max_cache_len=48)
    theirs(idx[:, :8], past_key_values=cache)
    step = torch.compile(theirs, backend="aot_eager", fullgraph=True)
    for i in range(8, 12):
        logits = step(idx[:, i:i + 1], past_key_values=cache).logits
        torch.testing.assert_close(logits[:, 0], ours(idx)[:, i], **EXACT)


@torch.no_grad()
@pytest.mark.parametrize("settings", [
    dict(num_beams=4, num_return_sequences=3),
    dict(do_sample=True, top_k=20, temperature=0.8),
    dict(do_sample=True, num_beams=3),
], ids=str)
def test_beams_and_sampling_are_the_same_with_and_without_a_cache(settings, theirs):
    """Beams reorder the cache, and with it what token shift and bigrams keep."""
    idx, mask = padded(prompts())
    outputs = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        outputs.append(theirs.generate(
            idx, attention_mask=mask, use_cache=use_cache, **GREEDY | settings))
    assert torch.equal(*outputs)


@torch.no_grad()
def test_a_cache_is_cropped_by_assisted_generation(theirs, ours):
    row = prompts()[2]
    output = theirs.generate(
        row[None], attention_mask=torch.ones_like(row[None]), prompt_lookup_num_tokens=3, **GREEDY)
    assert torch.equal(output[0, len(row):], greedy(ours, row, 20))


# --------------------------------------------------------------------------------------------------
# Training


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradients_are_ours_with_and_without_checkpointing(use_reentrant, theirs, exported):
    idx, mask = padded(prompts()[2:])
    ours = GPT.from_pretrained(exported[1]).train()
    loss = ours(idx[:, :-1], idx[:, 1:]) / idx[:, 1:].numel()
    loss.backward()
    theirs.train()
    for checkpointing in (False, True):
        if checkpointing:
            theirs.gradient_checkpointing_enable(dict(use_reentrant=use_reentrant))
            theirs.enable_input_require_grads()
        theirs.zero_grad()
        output = theirs(idx, attention_mask=mask, labels=idx)
        output.loss.backward()
        torch.testing.assert_close(output.loss, loss, **EXACT)
        expected = dict(ours.named_parameters())
        for name, p in theirs.named_parameters():
            torch.testing.assert_close(p.grad, expected[name].grad, rtol=1e-3, atol=1e-5)


def test_a_fine_tuned_model_is_saved_with_its_code_and_read_back(theirs, tmp_path):
    theirs.lm_head.weight.data.mul_(1.5)
    theirs.save_pretrained(tmp_path / "tuned")
    assert (tmp_path / "tuned" / "modeling_modern_gpt.py").exists()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned", trust_remote_code=True)
    ours = GPT.from_pretrained(tmp_path / "tuned").eval()
    idx = prompts()[0][None]
    with torch.no_grad():
        torch.testing.assert_close(again(idx).logits, theirs(idx).logits, **EXACT)
        torch.testing.assert_close(ours(idx), theirs(idx).logits, **EXACT)


def missing(*packages):
    return not all(map(importlib.util.find_spec, packages))


@pytest.mark.skipif(missing("peft"), reason="needs peft: make test-extra")
def test_a_step_of_lora(exported, load, ours, tmp_path):
    import peft

    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(load(), config).train()
    idx = prompts()[2][None]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    before = model(idx, labels=idx).loss
    before.backward()
    optimizer.step()
    after = model(idx, labels=idx).loss
    assert after < before
    merged = model.merge_and_unload().eval()
    merged.save_pretrained(tmp_path / "merged")
    with torch.no_grad():
        again = GPT.from_pretrained(tmp_path / "merged").eval()
        torch.testing.assert_close(again(idx), merged(idx).logits, **EXACT)


def trl_trainer(model, tokenizer, folder, with_lora):
    """trl's SFTTrainer; for a model with a soft cap, with the loss that docs/export.md shows."""
    import datasets
    import peft
    import transformers
    import trl

    class Trainer(trl.SFTTrainer):
        def compute_loss(self, *args, **kwargs):  # the model's own
            return transformers.Trainer.compute_loss(self, *args, **kwargs)

    rows = datasets.Dataset.from_list([{"text": "the cat sat on the mat. "}] * 8)
    args = trl.SFTConfig(
        output_dir=str(folder), max_steps=2, per_device_train_batch_size=2, max_length=16,
        gradient_checkpointing=True, report_to=[], use_cpu=True, bf16=False, learning_rate=1e-2,
        logging_steps=1, save_strategy="no")
    lora = peft.LoraConfig(r=4, target_modules="all-linear") if with_lora else None
    cls = Trainer if model.config.softcap else trl.SFTTrainer
    return cls(model, args, train_dataset=rows, processing_class=tokenizer, peft_config=lora)


@pytest.mark.skipif(missing("peft", "trl"), reason="needs peft and trl: make test-extra")
@pytest.mark.parametrize("with_lora", [False, True])
def test_steps_of_trl(with_lora, exported, theirs, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(exported[1], trust_remote_code=True)
    idx = torch.tensor([tokenizer("the cat sat on the mat. ")["input_ids"]])
    with torch.no_grad():
        expected = theirs(idx, labels=idx).loss.item()
    trainer = trl_trainer(theirs, tokenizer, tmp_path, with_lora)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(expected, abs=0.3)  # it appends the end-of-text id
    assert losses[1] < losses[0]


@pytest.mark.skipif(missing("peft", "trl"), reason="needs peft and trl: make test-extra")
@pytest.mark.parametrize("exported", ["speedrun"], indirect=True)
def test_trl_cannot_leave_the_soft_cap_out(exported, theirs, tmp_path):
    """Its own loss starts from hidden states."""
    import trl

    tokenizer = AutoTokenizer.from_pretrained(exported[1], trust_remote_code=True)
    trainer = trl_trainer(theirs, tokenizer, tmp_path, with_lora=False)
    batch = next(iter(trainer.get_train_dataloader()))
    with pytest.raises(AttributeError):
        trl.SFTTrainer.compute_loss(trainer, trainer.model, batch)


# --------------------------------------------------------------------------------------------------
# Files


def test_the_file_is_short_and_imports_torch_and_transformers_only():
    lines = (ROOT / "lib" / "modeling_modern_gpt.py").read_text().splitlines()
    assert lines.index("# Mixture of Experts") <= 329  # 328 lines, and a rule
    imports = [line.split()[1] for line in lines if line.startswith(("import ", "from "))]
    packages = {module.partition(".")[0] for module in imports}
    assert packages == {"functools", "torch", "transformers"}


def test_its_configuration_is_that_of_the_checkpoint(exported):
    model, folder = exported
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    for field in huggingface.CUSTOM_FIELDS:
        assert getattr(config, field) == getattr(model.config, field)
    assert config.hidden_size == model.config.n_embd
    assert config.max_position_embeddings == model.config.block_size
