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


def grown(after, depth, num, run, branches=8):
    """The tree of EAGLE-2 as {path of tokens: logarithm of its chance}: `run` nodes of a level go on, the `num` best of
    all nodes are kept. after(path): log-probabilities of what follows."""
    level, nodes = {(): 0.0}, {}
    for _ in range(depth):
        going_on = sorted(level, key=level.get, reverse=True)[:run]
        level = {}
        for path in going_on:
            chances, tokens = (part.tolist() for part in after([*path]).topk(branches))
            level |= {(*path, t): nodes.get(path, 0.0) + p for t, p in zip(tokens, chances, strict=True)}
        nodes |= level
    return dict(sorted(nodes.items(), key=lambda item: -item[1])[:num])


def same_tree(tree, wanted):
    """Whether a `Tree` has those paths, but for some at the edge that are as likely as others, to 1e-3."""
    found = {tuple(tree.up_to(i)) for i in range(len(tree))}
    edge = min(wanted.values())
    return len(found) == len(wanted) and all(abs(wanted[path] - edge) < 1e-3 for path in wanted.keys() - found)
