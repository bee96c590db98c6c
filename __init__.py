"""ingot casts a Hugging Face decoder into an ahead-of-time engine and serves it.

The names below are loaded on first use: `import ingot` costs nothing, and running an engine never imports the builder.
"""

from importlib import import_module

_EXPORTS = {
    "LLM": "runtime.llm",
    "AsyncLLM": "runtime.async_llm",
    "SamplingParams": "runtime.request",
    "RequestError": "engines.errors",
    "BuildError": "engines.errors",
    "EngineError": "engines.errors",
    "BuildConfig": "builder",
    "build_engine": "builder",
}
__all__ = list(_EXPORTS)
__version__ = "0.1.0"


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module 'ingot' has no attribute {name!r}")
    return getattr(import_module(f".{_EXPORTS[name]}", __name__), name)
