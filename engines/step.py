"""The step tensors: one set of names from the exported graph to the plan and the batch.

Tokens of all requests of a step lie flat ("ragged"), so prefill and decode share one graph.
T tokens, S sequences, P page-table columns, R rows of logits; everything is int32.
"""

TOKENS = "tokens"  # [T] token ids
POSITIONS = "positions"  # [T] position of each token in its sequence
SLOTS = "slots"  # [T] page * page_size + offset: where K and V are written
QUERY_START = "query_start"  # [S+1] first token of each sequence; the last entry is T
KV_LEN = "kv_len"  # [S] keys each sequence attends to, this step's tokens included
PAGES = "pages"  # [S, P] page table
LOGIT_ROWS = "logit_rows"  # [R] indices into T
LOGITS = "logits"  # [R, vocab], the output
# [T] bits of what a token sees of its sequence's last keys, where drafts are a tree (`PagedAttention`); else left out
ANCESTORS = "ancestors"
MOST_NODES = 31  # of a tree: with the token before them, the keys that a token has bits for

# of a head that drafts (`Manifest.head`), besides; activation dtype. Its token t is the one at position t + 1
FEATURES = "features"  # [T, width] hidden states of the target, side by side, or zeros
DRAFTED = "drafted"  # [T, hidden_size] what the head itself gave as HIDDEN for the token before, less FC_BIAS, or zeros
HIDDEN = "hidden"  # [R, hidden_size], an output
TOKEN_IDS = "token_ids"  # [vocab] of its weights: the target's token that each of the logits is of
FC_BIAS = "fc.bias"  # [hidden_size] of its weights, if it has one: in an EAGLE-3 head, for FEATURES only

STATES = "hidden_states."  # before the number of a hidden state

STEP_INPUTS = (TOKENS, POSITIONS, SLOTS, QUERY_START, KV_LEN, PAGES, LOGIT_ROWS)


def hidden_states(layer: int) -> str:
    """Name of an output [T, hidden_size]: what enters layer `layer`, or after the last one, what the norm gives."""
    return f"{STATES}{layer}"


def k_pages(layer: int) -> str:
    """Name of the key pool of attention layer `layer`: [num_pages, page_size, kv_heads, head_dim]."""
    return f"k_pages.{layer}"


def v_pages(layer: int) -> str:
    """Name of the value pool of attention layer `layer`: [num_pages, page_size, kv_heads, v_head_dim]."""
    return f"v_pages.{layer}"
