"""Sites of sampling from what a test says of its rows, and every tactic against the definition in torch."""

import torch
from ingot.plugins import tactics_of
from ingot.plugins.sample import sample
from ingot.plugins.tactic import Device, Site, Tensor
from triton_run import DEVICE, described, run_tactic

GPU = DEVICE == "cuda"
DRAFTS = 7  # of a request, where some are verified


def table(num_rows, values, dtype, default=0):
    """[num_rows] of `values` (a number, or row -> number), the rest `default`."""
    full = torch.full((num_rows,), default, dtype=dtype)
    for row, value in (values if isinstance(values, dict) else dict.fromkeys(range(num_rows), values)).items():
        full[row] = value
    return full


def make_inputs(
    logits, rows=None, positions=None, num_rows=None, *, temperature=None, top_k=0, top_p=1.0, min_p=0.0, seed=None,
    truncate=False, penalties=None, counts=None, bias=None, stop=None, min_length=0, masks=None,
):  # fmt: skip
    """The site's inputs. bias: row -> {token: value}; stop, masks: row -> tokens; penalties [num_rows, 3]."""
    size, vocab = logits.shape
    rows = torch.arange(size, dtype=torch.int32) if rows is None else torch.tensor(rows, dtype=torch.int32)
    positions = torch.arange(size) * 3 + 5 if positions is None else torch.as_tensor(positions)
    num_rows = num_rows or size
    random = [None] * 5
    if temperature is not None:
        truncation = [
            table(num_rows, top_k, torch.int32), table(num_rows, top_p, torch.float32, 1),
            table(num_rows, min_p, torch.float32),
        ]  # fmt: skip
        seed = torch.randint(-(2**63), 2**63 - 1, (num_rows,)) if seed is None else table(num_rows, seed, torch.int64)
        random = [table(num_rows, temperature, torch.float32), *(truncation if truncate else [None] * 3), seed]
    extras = [None] * 7
    if any(x is not None for x in (penalties, bias, stop, masks)):
        if penalties is None:
            penalties = torch.tensor([[1.0, 0, 0]]).repeat(num_rows, 1)
        if counts is None:
            counts = torch.zeros(num_rows, vocab, dtype=torch.int32)
        ids, values, stops = torch.full((num_rows, 6), -1), torch.zeros(num_rows, 6), torch.full((num_rows, 4), -1)
        for row, biases in (bias or {}).items():
            for slot, (token, value) in enumerate(biases.items(), 1):  # the first slot is empty
                ids[row, slot], values[row, slot] = token, value
        for row, tokens in (stop or {}).items():
            stops[row, 1 : 1 + len(tokens)] = torch.tensor(tokens)
        bits = torch.ones(num_rows, -(-vocab // 32) * 32, dtype=torch.int64)
        for row, tokens in (masks or {}).items():
            bits[row] = 0
            bits[row, torch.as_tensor(tokens)] = 1
        words = (bits.view(num_rows, -1, 32) << torch.arange(32)).sum(-1)
        words = torch.where(words >= 2**31, words - 2**32, words).int()
        extras = [penalties, counts, ids.int(), values, stops.int(), table(num_rows, min_length, torch.int32), words]
    last = torch.full((num_rows,), 77, dtype=torch.int32)
    return [logits, rows, positions.int(), *random, *extras, last]


def site_of(inputs, num_logprobs=0, device=None):
    inputs = [described(x) for x in inputs]
    rows = inputs[0].shape[0]
    extras = inputs[8] is not None
    attributes = {
        "num_rows": inputs[15].shape[0], "num_bias": inputs[10].shape[1] if extras else 0,
        "num_stop": inputs[12].shape[1] if extras else 0, "num_logprobs": num_logprobs,
        "random": inputs[3] is not None, "truncate": inputs[4] is not None, "extras": extras,
        "drafts": DRAFTS if len(inputs) > 16 else 0,
    }  # fmt: skip
    outputs = [Tensor((rows,), "int32")]
    if num_logprobs:
        outputs += [Tensor((rows,), "float32"), Tensor((rows,), "int32"), Tensor((rows, num_logprobs), "int32"),
                    Tensor((rows, num_logprobs), "float32")]  # fmt: skip
    return Site("Sample", attributes, tuple(inputs), tuple(outputs), device or Device())


def run(inputs, num_logprobs=0, tactic=0):
    """-> outputs, the inputs afterwards (copies: the caller's are untouched)."""
    site = site_of(inputs, num_logprobs)
    found = tactics_of("Sample")(site)
    after = [None if x is None else x.clone().to(DEVICE) for x in inputs]
    outputs = run_tactic(found[tactic], after, site.outputs)
    return [y.cpu() for y in outputs], [None if x is None else x.cpu() for x in after]


def compare(inputs, num_logprobs=0, every=GPU):
    """Tokens, counts and last tokens are the reference's, nothing else changes; in every tactic. -> tokens."""
    expected = [None if x is None else x.clone() for x in inputs]
    outputs = sample(*expected, num_logprobs=num_logprobs)
    live = inputs[1] >= 0
    for tactic in range(len(tactics_of("Sample")(site_of(inputs, num_logprobs))) if every else 1):
        ours, after = run(inputs, num_logprobs, tactic)
        torch.testing.assert_close(ours[0], outputs[0], rtol=0, atol=0)
        for mine, theirs in zip(ours[1:], outputs[1:], strict=True):
            torch.testing.assert_close(mine[live], theirs[live], rtol=1e-5, atol=1e-5)
        for mine, theirs in zip(after, expected, strict=True):
            assert mine is None or mine.equal(theirs)
    return outputs[0]
