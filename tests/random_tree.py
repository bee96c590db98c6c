"""Random trees of drafts, and what their nodes see, told as plainly as can be."""

TREE = 32  # keys at the end of a sequence that may be nodes


def random_parents(rng, num):
    """The parent of each of `num` nodes, all before it; -1: the last token that is known."""
    deep = rng.random()  # from bushes to chains
    return [i - 1 if rng.random() < deep else rng.randrange(-1, i) for i in range(num)]


def path_to(parents, node):
    """Nodes from the root's child to `node`."""
    found = []
    while node >= 0:
        found.append(node)
        node = parents[node]
    return found[::-1]


def bits_of(parents, node, num_nodes):
    """`ancestors` of a node where its sequence ends with `num_nodes` nodes; all that is before them is seen."""
    seen = set(path_to(parents, node))
    bits = 0
    for place in range(TREE):
        at = place - (TREE - num_nodes)
        bits |= (at < 0 or at in seen) << place
    return bits - (1 << TREE) if bits >= 1 << (TREE - 1) else bits
