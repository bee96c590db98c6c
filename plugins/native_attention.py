"""Binds PagedAttention to its C++ kernel: what is constant becomes a C struct once, a step only passes pointers."""

import struct
from collections.abc import Callable

import torch
from torch import Tensor

from .binder import Attributes, Constants, Run
from .paged_attention.reference import paged_attention

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # simd.h's DType
PLAIN = 0  # pages of the activations' type
QUANTISED = {torch.int8: 1, torch.float8_e4m3fn: 2}  # paged_attention/kernel.cpp's Pages
MAX_GROUP = 64  # query heads of a KV head that it holds in one task


def bind_paged_attention(launch: Callable[..., None], attributes: Attributes, constants: Constants) -> Run | None:
    """`launch`: the kernel, which takes AttentionArgs and AttentionCall."""
    heads, kv_heads = attributes["num_heads"], attributes["num_kv_heads"]
    head_dim, v_head_dim = attributes["head_dim"], attributes["v_head_dim"]
    if heads % kv_heads or heads // kv_heads > MAX_GROUP:
        return None
    scale, window, softcap = attributes["scale"], attributes["window"], attributes["softcap"]
    q_width, k_width, v_width = heads * head_dim, kv_heads * head_dim, kv_heads * v_head_dim
    pack = struct.Struct("3P3q4P3q7P").pack  # AttentionCall
    structs: dict[tuple[torch.dtype, torch.dtype, int], bytes] = {}  # AttentionArgs by activations, pages, page size
    k_constant, v_constant = (_of_heads(scales, kv_heads) for scales in constants[10:12])

    def run(
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        slots: Tensor,
        query_start: Tensor,
        kv_len: Tensor,
        pages: Tensor,
        k_pages: Tensor,
        v_pages: Tensor,
        sinks: Tensor | None = None,
        k_scale: Tensor | None = None,
        v_scale: Tensor | None = None,
        ancestors: Tensor | None = None,
    ) -> Tensor:
        dtype, stored = query.dtype, k_pages.dtype
        k_scales = _of_heads(k_scale, kv_heads) if k_constant is None else k_constant
        v_scales = _of_heads(v_scale, kv_heads) if v_constant is None else v_constant
        if stored is dtype:
            served = dtype in DTYPES and k_scale is None and v_scale is None
        else:
            served = dtype in DTYPES and stored in QUANTISED and k_scales is not None and v_scales is not None
        served = served and v_pages.dtype is stored and k_pages.is_contiguous() and v_pages.is_contiguous()
        served = served and (sinks is None or sinks.dtype is dtype)
        for index in (slots, query_start, kv_len, pages, ancestors):
            served = served and (index is None or (index.dtype is torch.int32 and index.is_contiguous()))
        if not served:
            step = (slots, query_start, kv_len, pages, k_pages, v_pages, sinks, k_scale, v_scale, ancestors)
            return paged_attention(query, key, value, *step, **attributes)
        query, num_tokens = query.contiguous(), query.shape[0]
        q = query.data_ptr()
        if key is None or value is None:
            stride, size = query.shape[1], query.element_size()
            k, v = q + q_width * size, q + (q_width + k_width) * size
            strides = (stride, stride, stride)
        else:
            key, value = key.contiguous(), value.contiguous()
            k, v, strides = key.data_ptr(), value.data_ptr(), (q_width, k_width, v_width)
        if sinks is not None:
            sinks = sinks.contiguous()
        page_size = k_pages.shape[1]
        arguments = structs.get((dtype, stored, page_size))
        if arguments is None:
            numbers = (heads, kv_heads, head_dim, v_head_dim, page_size, window, DTYPES[dtype])
            arguments = struct.pack("8qff", *numbers, QUANTISED.get(stored, PLAIN), scale, softcap)
            structs[dtype, stored, page_size] = arguments
        y = torch.empty((num_tokens, heads * v_head_dim), dtype=dtype)
        call = pack(
            *(q, k, v, *strides),
            *(slots.data_ptr(), query_start.data_ptr(), kv_len.data_ptr(), pages.data_ptr()),
            *(num_tokens, kv_len.shape[0], pages.shape[1]),
            *(k_pages.data_ptr(), v_pages.data_ptr(), _address(k_scales), _address(v_scales), _address(sinks)),
            *(y.data_ptr(), _address(ancestors)),
        )
        launch(arguments, call)
        return y

    return run


def _of_heads(scale: Tensor | None, kv_heads: int) -> Tensor | None:
    """[kv_heads] fp32 from a scale [1] or [kv_heads]; None: there is none, or one that the reference is to refuse."""
    if scale is None or scale.dtype is not torch.float32 or scale.shape not in ((1,), (kv_heads,)):
        return None
    return scale.expand(kv_heads).contiguous()


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
