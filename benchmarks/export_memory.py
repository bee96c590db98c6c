"""Time and memory of exporting a large decoder: no weight is ever made, so an 8B shape takes what a small one takes.

    python benchmarks/export_memory.py [llama-8b|qwen3-moe-30b] [dtype]

The export runs in a process of its own, which prints its peak resident memory before (all imports done, a tiny model
exported, so that the tracer's own code is loaded) and after. Exit code 1 if the 8B shape takes more than 60 s or 1 GiB.
2 shared cores of a cloud machine: llama-8b 18 s and 101 MiB, qwen3-moe-30b 80 s and 215 MiB (all of it torch's tracer).
"""

import json
import math
import resource
import subprocess
import sys
import time

LIMIT_SECONDS, LIMIT_MIB = 60, 1024
SHAPES = {
    "llama-8b": (
        "LlamaConfig",
        {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
         "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072},
    ),
    "qwen3-moe-30b": (
        "Qwen3MoeConfig",
        {"hidden_size": 2048, "moe_intermediate_size": 768, "num_hidden_layers": 48, "num_attention_heads": 32,
         "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8,
         "vocab_size": 151936, "norm_topk_prob": True},
    ),
}  # fmt: skip


def peak_mib() -> float:
    """Peak resident memory of this process so far, in MiB (Linux counts in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(shape: str, dtype: str) -> dict[str, float]:
    """Exports one shape in this process."""
    import transformers
    from ingot.builder.export import export

    class_name, sizes = SHAPES[shape]
    make = getattr(transformers, class_name)
    few = {
        "hidden_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 64,
    }
    export(make(**{**sizes, **few, "intermediate_size": 64}), dtype)
    before, start = peak_mib(), time.perf_counter()
    graph = export(make(**sizes), dtype)
    seconds = time.perf_counter() - start
    shapes = [value.shape.numpy() for value in graph.graph.initializers.values()]
    return {
        "seconds": round(seconds, 1),
        "growth_mib": round(peak_mib() - before),
        "peak_mib": round(peak_mib()),
        "parameters_billion": round(sum(map(math.prod, shapes)) / 1e9, 2),
        "nodes": graph.graph.num_nodes(),
    }


if __name__ == "__main__":
    arguments = [a for a in sys.argv[1:] if a != "--here"]
    shape, dtype = (*arguments, *("llama-8b", "bfloat16")[len(arguments) :])
    if "--here" in sys.argv:
        print(json.dumps(measure(shape, dtype)))
        sys.exit()
    command = [sys.executable, __file__, shape, dtype, "--here"]
    result = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1])
    print(f"{shape} {dtype}: {result}")
    over = result["seconds"] > LIMIT_SECONDS or result["growth_mib"] > LIMIT_MIB
    sys.exit(int(shape == "llama-8b" and over))
