"""An engine on a GPU against the figures of its peers: time per output token, time to first token, throughput.

    python benchmarks/gpu_serving.py ENGINE [--dummy] [--batches 1,4,16,64,128,256] [--prompts 128,1024,4096]
                                            [--offline 512:512:256,256:2048:128] [--json FILE]

TPOT: from a prompt of 128 random tokens, the time that 128 further tokens take after the first 8, greedy, all requests
alike. TTFT: one request alone, one token. Offline: requests:input:output, all sent at once. No prefix cache.
"""

import argparse
import json
import random
import time

START = time.perf_counter()  # nothing heavy is imported before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine")
    parser.add_argument("--dummy", action="store_true", help="random weights, the file is not read")
    parser.add_argument("--batches", default="1,4,16,64,128,256")
    parser.add_argument("--prompts", default="128,1024,4096")
    parser.add_argument("--offline", default="512:512:256,256:2048:128")
    parser.add_argument("--memory", type=float, default=0.88)
    parser.add_argument("--json")
    args = parser.parse_args()

    from ingot import LLM, SamplingParams

    options = {"load_format": "dummy"} if args.dummy else {}
    llm = LLM(args.engine, prefix_cache=False, gpu_memory_utilization=args.memory, **options)
    rng, vocab = random.Random(0), llm.vocab_size

    def seconds(num: int, length: int, num_tokens: int) -> float:
        prompts = [[rng.randrange(vocab) for _ in range(length)] for _ in range(num)]
        params = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
        start = time.perf_counter()
        llm.generate(prompts, params, progress=False)
        return time.perf_counter() - start

    found: dict[str, float] = {"ready_s": time.perf_counter() - START}
    found["kv_tokens"] = llm.num_kv_tokens
    print(f"ready in {found['ready_s']:.2f} s, {found['kv_tokens']} KV tokens", flush=True)
    for batch in map(int, filter(None, args.batches.split(","))):
        seconds(batch, 128, 4)
        found[f"tpot_{batch}_ms"] = ms = 1000 * (seconds(batch, 128, 136) - seconds(batch, 128, 8)) / 128
        print(f"TPOT at {batch:3}: {ms:7.3f} ms", flush=True)
    for length in map(int, filter(None, args.prompts.split(","))):
        found[f"ttft_{length}_ms"] = ms = 1000 * sorted(seconds(1, length, 1) for _ in range(7))[3]
        print(f"TTFT of {length:4}: {ms:7.2f} ms", flush=True)
    for load in filter(None, args.offline.split(",")):
        num, length, output = map(int, load.split(":"))
        took = seconds(num, length, output)
        found[f"output_tokens_per_s_{load}"], found[f"total_tokens_per_s_{load}"] = (
            num * output / took, num * (length + output) / took
        )  # fmt: skip
        print(f"{load}: {num * output / took:8.0f} output tok/s, {num * (length + output) / took:8.0f} in all")
    llm.close()
    if args.json:
        with open(args.json, "w") as file:
            json.dump(found, file, indent=1)


if __name__ == "__main__":
    main()
