"""The whole path per family: checkpoint -> engine directory -> in-flight batch, greedy tokens equal to eager ones.

Weights are random but large (initializer range 0.2; biases, norm weights and sinks perturbed), so that positions,
windows, norm offsets and expert routing all change the tokens: with the default 0.02 a wrong rotary table would pass.
"""

import pytest
import torch
from families import FAMILIES, REFUSED
from ingot import LLM, BuildConfig, BuildError, SamplingParams, build_engine
from transformers import AutoModelForCausalLM

PROMPT_LENGTHS = (3, 41, 17, 1, 26)
NEW_TOKENS = 12


def random_checkpoint(config, folder, seed=0):
    """Save a random fp32 model of `config` whose every parameter matters; returns it with eager attention."""
    torch.manual_seed(seed)
    config.initializer_range = 0.2
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 or "bias" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    return model


@torch.inference_mode()
def eager_greedy(model, prompt, num_tokens):
    """Greedy continuation, recomputed from scratch for every token: no cache that could be wrong."""
    ids = list(prompt)
    for _ in range(num_tokens):
        ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_transformers(family, tmp_path):
    config = FAMILIES[family]()
    model = random_checkpoint(config, tmp_path / "model")
    build_engine(BuildConfig(model=str(tmp_path / "model"), out=str(tmp_path / "engine"), dtype="float32"))
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(1, config.vocab_size, (n,), generator=generator).tolist() for n in PROMPT_LENGTHS]
    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    # 24 tokens a step: the 41-token prompt is prefilled in chunks, mixed with rows that decode already
    with LLM(tmp_path / "engine", max_num_batched_tokens=24, page_size=8, num_kv_pages=64) as llm:
        outputs = llm.generate(prompts, params, progress=False)
    for prompt, output in zip(prompts, outputs, strict=True):
        assert list(output.outputs[0].token_ids) == eager_greedy(model, prompt, NEW_TOKENS), f"prompt of {len(prompt)}"


@pytest.mark.parametrize("family", REFUSED)
def test_refused_with_a_reason(family, tmp_path):
    config = REFUSED[family]()
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path / "model")
    with pytest.raises(BuildError) as refusal:
        build_engine(BuildConfig(model=str(tmp_path / "model"), out=str(tmp_path / "engine"), dtype="float32"))
    assert config.model_type in str(refusal.value)
    assert not list(tmp_path.glob("engine*")), "a refused build leaves nothing behind"
