"""An engine of a quantised graph without its weights, to measure with (`--load-format dummy`): nothing is calibrated,
rounded, checked or written but the graph, so what it computes is noise and only its speed is to be looked at.

    python benchmarks/dummy_checkpoint.py /tmp/llama --hole
    python benchmarks/quantised_engine.py /tmp/llama fp8 -o /tmp/engine-fp8
    python benchmarks/gpu_serving.py /tmp/engine-fp8 --dummy

Graph, plan and tactics are those of a build with the same formats: what is left out takes time, not place.
"""

import argparse
import time
from datetime import UTC, datetime
from pathlib import Path

import onnx_ir as ir
import torch
from ingot import BuildConfig
from ingot.builder.checkpoint import Checkpoint
from ingot.builder.export import export
from ingot.builder.kv_cache import quantise_pools
from ingot.builder.passes import optimise
from ingot.builder.quantise import quantise
from ingot.builder.record import activation_dtype, kv_layers, model_info, versions
from ingot.builder.targets import target_of
from ingot.builder.text_files import copy_text_files
from ingot.calibration.recipe import parse
from ingot.calibration.scales import Scales
from ingot.engines.manifest import BuildRecord, Manifest
from ingot.engines.weights import GRAPH_FILE, WEIGHTS_FILE
from ingot.engines.writer import engine_directory

KEEP_HEAD = "{perplexity: 1, rules: [{match: lm_head.weight, method: keep}, {match: '*', method: rtn, %s}]}"
FORMATS = {
    "fp8": "format: {dtype: fp8_e4m3}, activation: {dtype: fp8_e4m3}",
    "fp8-block": "format: {dtype: fp8_e4m3, group: 128, rows: 128}, activation: {dtype: fp8_e4m3, group: 128}",
    "int8": "format: {dtype: int8}, activation: {dtype: int8}",
    "int4": "format: {dtype: int4, group: 128}", "int4-zero": "format: {dtype: int4, group: 128, symmetric: false}",
    "w8a16": "format: {dtype: int8}", "w8a16-fp8": "format: {dtype: fp8_e4m3}",
}  # fmt: skip
TYPES = {"int8": ir.DataType.INT8, "fp8_e4m3": ir.DataType.FLOAT8E4M3FN}


class Ones(dict[str, torch.Tensor]):
    """Scales of 1 for whatever pool is asked for."""

    def get(self, key: str, default: object = None) -> torch.Tensor:  # type: ignore[override]
        return torch.ones(1)


def point_nowhere(graph: ir.Model, folder: Path) -> None:
    """Initialisers become places in a file that is not written."""
    end = 0
    for name, value in graph.graph.initializers.items():
        tensor = value.const_value
        assert tensor is not None
        value.const_value = ir.ExternalTensor(
            WEIGHTS_FILE, end, tensor.nbytes, tensor.dtype, shape=ir.Shape(tuple(tensor.shape.numpy())), name=name,
            base_dir=folder,
        )  # fmt: skip
        end += tensor.nbytes
    print(f"weights of {end / 1e9:.2f} GB would be in the file")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("format", choices=["none", *FORMATS])
    parser.add_argument("-o", "--out", required=True)
    parser.add_argument("--kv-cache", choices=TYPES)
    parser.add_argument("--no-tune", action="store_true")
    parser.add_argument("--gpu-arch", type=int)
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--max-num-batched-tokens", type=int, default=BuildConfig.max_num_batched_tokens)
    args = parser.parse_args()
    start = time.perf_counter()
    config = BuildConfig(args.checkpoint, args.out, "cuda", force=True, tune=not args.no_tune, gpu_arch=args.gpu_arch,
                         max_num_seqs=args.max_num_seqs,
                         max_num_batched_tokens=args.max_num_batched_tokens)  # fmt: skip
    checkpoint = Checkpoint.open(args.checkpoint)
    dtype = activation_dtype("auto", checkpoint.config)
    with target_of("cuda").begin(config) as compile:
        graph = optimise(export(checkpoint, dtype))
        if args.format != "none":
            recipe = parse(KEEP_HEAD % FORMATS[args.format], args.format, "this benchmark")
            quantise(graph, recipe, Scales())
        if args.kv_cache:
            quantise_pools(graph, args.kv_cache, Ones())
        print(f"{graph.graph.num_nodes()} nodes after {time.perf_counter() - start:.1f} s", flush=True)
        with engine_directory(args.out, force=True) as folder:
            point_nowhere(graph, folder)
            ir.save(graph, folder / GRAPH_FILE)
            copy_text_files(checkpoint.path, folder)
            model = model_info(args.checkpoint, checkpoint, graph, dtype)
            info = compile(graph, model, folder)
            seconds = round(time.perf_counter() - start, 3)
            record = BuildRecord(datetime.now(UTC).isoformat(timespec="seconds"), seconds, versions=versions())
            Manifest(model, kv_layers(graph), "cuda", info, record, None).save(folder)
    print(f"{args.out}: {info['tactics']}; {info['buckets']} buckets, {info['cubins']} cubins, {seconds:.1f} s")


if __name__ == "__main__":
    main()
