"""Products of any number of rows in few shapes, since oneDNN keeps memory for each shape that it has met.

A step has as many rows as it has tokens, so all numbers occur. torch hands matrix products in 16 bits to oneDNN, which
compiles code for each shape. Measured on a CPU with AVX-512, 257 to 512 rows: 0.65 MB and 0.3 ms a shape; its cache has
room for 1,024 (https://uxlfoundation.github.io/oneDNN/dev_guide_primitive_cache.html), and 0.4 MB of those stay where
it has none (ONEDNN_PRIMITIVE_CACHE_CAPACITY=0).
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor


def in_few_shapes(product: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """product(x), x [T, K] -> [T, N], where a row of the result depends on the same row of x alone.

    Rows of zeros make T a number of four significant bits: at most 8 shapes from a power of two to the next, at most an
    eighth more rows, and none where T is such a number itself, as a full step's mostly is.
    """
    rows = x.shape[0]
    missing = -rows % (1 << max(rows.bit_length() - 4, 0))
    return product(F.pad(x, (0, 0, 0, missing)))[:rows] if missing else product(x)
