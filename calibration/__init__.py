"""Numbers, not graphs: what a weight or an activation becomes in fewer bits, and how its scales are found.

`formats` says what a quantised tensor is and rounds to nearest; `observers` find scales of activations; `gptq`, `awq`
and `smoothquant` choose better numbers for the same format. They know no model, graph or file: tensors go in and
tensors come out. Arithmetic is float32, on the device of the inputs, and needs memory for one layer.
"""

from ..engines.errors import BuildError


class QuantisationError(BuildError):
    """A tensor cannot be put into the format that was asked for."""
