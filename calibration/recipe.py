"""Recipes: which weights are stored in which numbers, and how much worse the model may become by it.

A recipe is a YAML file: ordered rules, each a glob on the weight's name in the engine's graph (`ingot inspect DIR -v`
shows them); the first that matches decides. `engines/recipes` has those that come with ingot.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from glob import escape
from pathlib import Path
from typing import Any

from ..engines.errors import BuildError, shown
from . import QuantisationError
from .formats import Format
from .observers import OBSERVERS

FOLDER = Path(__file__).resolve().parents[1] / "engines" / "recipes"
METHODS = "keep", "rtn", "gptq", "awq", "smoothquant"
SMOOTHS = {"awq", "smoothquant"}  # methods that move numbers between a weight and what it reads
NEEDS_TEXT = {"gptq"} | SMOOTHS


@dataclass(frozen=True)
class Rule:
    """`match`: a glob. `method`: `keep` (as it is), `rtn` (round to nearest), `gptq`, `awq` or `smoothquant`, into
    `format`."""

    match: str
    method: str
    format: Format | None = None
    act_order: bool = False  # gptq: the columns with the largest activations first
    # what the product reads: a scale for each token, or group of its columns (dynamic); rows 0: one for all (static)
    activation: Format | None = None
    observer: str = "absmax"  # what a static scale of activations covers: see calibration/observers.py

    @property
    def static(self) -> bool:
        """Whether the scale of the activations is found by calibration."""
        return self.activation is not None and self.activation.rows == 0

    @property
    def needs_text(self) -> bool:
        """Whether it looks at activations."""
        return self.method in NEEDS_TEXT or self.static

    def spelt(self) -> str:
        """In a few words: `gptq int4 in groups of 128, act-order`, `rtn fp8_e4m3, activations fp8_e4m3 per token`."""
        if self.format is None:
            return self.method
        words = [f"{self.method} {self.format.dtype}{_blocks(self.format)}"]
        words += ["zero points"] * (not self.format.symmetric) + ["act-order"] * self.act_order
        if self.activation is not None:
            scales = f"static ({self.observer})" if self.static else _blocks(self.activation) or "per token"
            words.append(f"activations {self.activation.dtype} {scales.strip()}")
        return ", ".join(words)


@dataclass(frozen=True)
class Mixed:
    """A search for the weights that are worth more bits than their rule gives them.

    budget: bits of a weight on average, scales included, over those that the rules quantise. instead: what a weight may
    have instead of its rule, without a match.
    """

    budget: float
    instead: tuple[Rule, ...]


@dataclass(frozen=True)
class KVCache:
    """Keys and values in 8 bits: `dtype` fp8_e4m3 or int8, a scale `per` layer or head, found by an observer.

    centred: keys are stored less their mean over the calibration text. Every score of a query changes by the same
    number, which softmax does not see, and what is stored is smaller. It is the mean over the positions of that text:
    it helps most in contexts no wider than calibration's windows.
    """

    dtype: str
    per: str = "layer"
    observer: str = "absmax"
    centred: bool = False

    @property
    def format(self) -> Format:
        return Format(self.dtype, rows=0)

    def spelt(self) -> str:
        """In a few words: `fp8_e4m3, a scale per layer (absmax)`."""
        return f"{self.dtype}, a scale per {self.per} ({self.observer})" + ", centred keys" * self.centred


# what `--kv-cache` knows
KV_CACHES = {
    "fp8": KVCache("fp8_e4m3"),
    "int8": KVCache("int8"),
    "fp8-head": KVCache("fp8_e4m3", "head"),
    "int8-head": KVCache("int8", "head"),
    "fp8-centred": KVCache("fp8_e4m3", centred=True),
}
KV_PERPLEXITY = 0.005  # by how much it may rise where nothing else is quantised


@dataclass(frozen=True)
class Recipe:
    """perplexity: by how much of itself it may rise on the text that the build is checked with (0.01: 1%)."""

    name: str
    description: str
    perplexity: float
    rules: tuple[Rule, ...]
    mixed: Mixed | None = None
    kv_cache: KVCache | None = None  # None: in the activations' type

    @property
    def needs_text(self) -> bool:
        """Whether anything is looked for in activations."""
        return self.mixed is not None or self.kv_cache is not None or any(rule.needs_text for rule in self.rules)

    def rule(self, weight: str) -> Rule | None:
        """The first rule that matches; None: the weight is kept."""
        return next((rule for rule in self.rules if fnmatchcase(weight, rule.match)), None)

    def mixing(self, chosen: Mapping[str, int], names: Sequence[str]) -> Recipe:
        """The recipe in which some weights have one of `mixed.instead`, by its index; names: of all weights."""
        assert self.mixed is not None
        own = tuple(replace(self.mixed.instead[index], match=escape(name)) for name, index in chosen.items())
        used = {self.rule(name) for name in names if name not in chosen}
        rules = tuple(rule for rule in self.rules if rule in used or rule.method == "keep")
        return replace(self, rules=own + rules, mixed=None)

    @classmethod
    def open(cls, name: str) -> Recipe:
        """A recipe of ingot's by its name, or one of the user's by its path.

        Raises BuildError: no such recipe (the known ones are named), or a file that is none, with the place.
        """
        known = sorted(path.stem for path in FOLDER.glob("*.yaml"))
        given = name.endswith((".yaml", ".yml"))
        advice = f"pass one of {', '.join(known)}, or the path of a file that ends in .yaml."
        if not given and name not in known:
            raise BuildError(f"there is no recipe {shown(name)}; {advice}")
        path = Path(name) if given else FOLDER / f"{name}.yaml"
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or error
            raise BuildError(f"the recipe {shown(name)} cannot be read ({why}); {advice}") from error
        return parse(text, path.stem, str(path))


def recipes() -> list[Recipe]:
    """Those that come with ingot, by name."""
    return [parse(path.read_text(encoding="utf-8"), path.stem, str(path)) for path in sorted(FOLDER.glob("*.yaml"))]


def kv_recipes() -> dict[str, Recipe]:
    """Those of a build with `--kv-cache` alone, by what it is given."""
    return {
        name: Recipe(f"kv-cache {name}", f"KV cache: {kv.spelt()}", KV_PERPLEXITY, (), kv_cache=kv)
        for name, kv in KV_CACHES.items()
    }


def parse(text: str, name: str, where: str) -> Recipe:
    """The recipe in a YAML text. Raises BuildError."""
    data = _yaml(text, where)
    entries = _mapping(data, {"description", "kv_cache", "mixed", "perplexity", "rules"}, where)
    rules, bound, kv = entries.get("rules"), entries.get("perplexity"), entries.get("kv_cache")
    if rules is None and kv is not None:
        rules = []
    elif not isinstance(rules, list) or not rules:
        raise BuildError(f"{where} has the rules {shown(rules)}; expected a list of at least one.")
    if isinstance(bound, bool) or not isinstance(bound, int | float) or not 0 <= bound <= sys.float_info.max:
        raise BuildError(f"{where} has the perplexity {shown(bound)}; expected how much it may rise, as 0.01 for 1%.")
    return Recipe(
        name, str(entries.get("description", "")), float(bound),
        tuple(_rule(entry, f"rule {i} of {where}") for i, entry in enumerate(rules, 1)),
        _mixed(entries["mixed"], where) if "mixed" in entries else None,
        None if kv is None else _kv_cache(kv, f"the kv_cache of {where}"),
    )  # fmt: skip


def _yaml(text: str, where: str) -> Any:
    """Raises BuildError: not YAML, or a key that stands twice in one place, of which YAML's readers take the last."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            if twice := sorted({key for key in keys if keys.count(key) > 1}):
                raise BuildError(f"{where} has the key '{twice[0]}' twice in one place; take one of the two out.")
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(text, Loader)
    except RecursionError:
        raise BuildError(f"{where} is no recipe: it is nested too deeply.") from None
    # the latter of numbers, dates and others that are none: the reader converts without a look
    except (yaml.YAMLError, ValueError, KeyError, AttributeError) as error:
        raise BuildError(f"{where} is not YAML: {' '.join(str(error).split())}.") from error


def _mixed(data: Any, where: str) -> Mixed:
    entries = _mapping(data, {field.name for field in fields(Mixed)}, f"`mixed` of {where}")
    budget, instead = entries.get("budget"), entries.get("instead")
    if isinstance(budget, bool) or not isinstance(budget, int | float) or not 0 < budget <= 32:
        raise BuildError(f"{where} has the budget {shown(budget)}; expected bits of a weight on average, as 5.0.")
    if not isinstance(instead, list) or not instead or any(isinstance(e, dict) and "match" in e for e in instead):
        raise BuildError(
            f"{where} has {shown(instead)} instead of its rules; expected a list of rules without a match."
        )
    rules = [_rule({"match": "*", **entry} if isinstance(entry, dict) else entry, f"rule {i} of `mixed` of {where}")
             for i, entry in enumerate(instead, 1)]  # fmt: skip
    if any(rule.method in SMOOTHS for rule in rules):
        raise BuildError(f"`mixed` of {where} smooths; weights that read the same must then have the same rule.")
    return Mixed(float(budget), tuple(rules))


def _rule(data: Any, where: str) -> Rule:
    entries = _mapping(data, {field.name for field in fields(Rule)}, where)
    match, method = entries.get("match"), entries.get("method")
    if not isinstance(match, str) or not match:
        raise BuildError(f"{where} has the match {shown(match)}; expected a glob of weight names, as '*.mlp.*'.")
    if method not in METHODS:
        raise BuildError(f"{where} has the method {shown(method)}; expected one of {', '.join(METHODS)}.")
    form = entries.get("format")
    if (form is None) != (method == "keep"):
        raise BuildError(
            f"{where} has the method {method} and the format {shown(form)}; `keep` has none, others need one."
        )
    order = entries.get("act_order", False)
    if not isinstance(order, bool) or (order and method != "gptq"):
        raise BuildError(f"{where} has the act_order {shown(order)}; expected true or false, and only with gptq.")
    activation = entries.get("activation")
    if activation is not None and form is None:
        raise BuildError(f"{where} quantises activations, but not the weight; give it a format.")
    read = None if activation is None else _activation(activation, where)
    observer = entries.get("observer", "absmax")
    if (
        not isinstance(observer, str)
        or observer not in OBSERVERS
        or ("observer" in entries and (read is None or read.rows))
    ):
        raise BuildError(
            f"{where} has the observer {shown(observer)}; expected one of {', '.join(OBSERVERS)}, and only with static "
            "activations (rows: 0)."
        )
    if method == "smoothquant" and read is None:
        raise BuildError(f"{where} smooths activations that it does not quantise; give it an activation, or use rtn.")
    return Rule(match, method, None if form is None else _format(form, where), order, read, observer)


def _activation(data: Any, where: str) -> Format:
    """A scale for each token or group of its columns, or one for all: what engines compute."""
    form = _format(data, f"the activation of {where}")
    if form.dtype == "int4" or not form.symmetric or form.rows > 1 or (form.group and not form.rows):
        raise BuildError(
            f"the activation of {where} is {shown(data)}; expected int8 or fp8_e4m3 without zero points, and a scale "
            "for each token (rows: 1), for groups of its columns (rows: 1, group) or for all (rows: 0)."
        )
    return form


def _blocks(form: Format) -> str:
    """What shares a scale, in a few words; nothing for a whole row."""
    if form.rows != 1:
        return f" in blocks of {form.rows or 'all'} x {form.group or 'all'}"
    return f" in groups of {form.group}" if form.group else ""


def _kv_cache(data: Any, where: str) -> KVCache:
    entries = _mapping(data, {field.name for field in fields(KVCache)}, where)
    known = {"dtype": ("fp8_e4m3", "int8"), "per": ("layer", "head"), "observer": tuple(OBSERVERS)}
    for key, words in known.items():
        if entries.get(key, words[0] if key != "dtype" else None) not in words:
            raise BuildError(f"{where} has the {key} {shown(entries.get(key))}; expected one of {', '.join(words)}.")
    if not isinstance(entries.get("centred", False), bool):
        raise BuildError(f"{where} has the centred {shown(entries['centred'])}; expected true or false.")
    return KVCache(**entries)


def _format(data: Any, where: str) -> Format:
    entries = _mapping(data, {field.name for field in fields(Format)}, f"the format of {where}")
    try:
        return Format(**entries)
    except (TypeError, ValueError, QuantisationError) as error:
        raise BuildError(f"the format of {where} is {shown(data)}: {str(error).rstrip('.')}.") from error


def _mapping(data: Any, known: set[str], where: str) -> Mapping[str, Any]:
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise BuildError(f"{where} holds {shown(data)}; expected the keys {', '.join(sorted(known))}.")
    if unknown := sorted(data.keys() - known):
        raise BuildError(f"{where} has the unknown key '{unknown[0]}'; known are {', '.join(sorted(known))}.")
    return data
