"""Programmatic dependent launch (compute capability 9.0 and up): a kernel starts while the one before it ends.

Every kernel of a plan takes `PDL` and calls `begin` before it reads or writes anything that another kernel of its part
touches. Earlier it may read what its part does not write: weights, and step tensors, since the first launch of a part
is an ordinary one (`runtime/cuda/graphs.py`). All must wait, those with nothing to wait for too: a kernel is done when
the one before it is, and only so does a wait reach back over the whole part. CUDA C++ Programming Guide, "Programmatic
Dependent Launch and Synchronization".
"""

import triton
import triton.language as tl

OLDEST = 90  # compute capability that has it


@triton.jit
def launch_next(PDL: tl.constexpr):
    """Lets the next kernel start as soon as all programs of this one have."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait(PDL: tl.constexpr):
    """Waits until all kernels before this one are done and their writes are seen."""
    if PDL:
        tl.extra.cuda.gdc_wait()


@triton.jit
def begin(PDL: tl.constexpr):
    """Both, for a kernel with nothing to do ahead of its inputs."""
    launch_next(PDL)
    wait(PDL)
