"""A stand-in for torch's attention over sequences of different lengths, which has no kernel for a CPU."""

from __future__ import annotations

import torch
from torch import Tensor


def attend_plainly(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """Attend with queries ``[head, head_dim]`` to ``[token, head_dim]``, in float64."""
    weights = (query.double() @ keys.double().T * scale).softmax(dim=-1)
    return weights @ values.double()


# fmt: off
def copy_of_varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
                   window_size=(-1, -1), enable_gqa=False, seqused_k=None, block_table=None, num_splits=None):
    # fmt: on
    """What torch documents of `varlen_attn`, sequence by sequence, with its checks."""
    assert enable_gqa
    assert key.shape[1] == 1
    assert query.shape[1] % key.shape[1] == 0
    assert {cu_seq_q.dtype, cu_seq_k.dtype, seqused_k.dtype} == {torch.int32}
    assert len(cu_seq_q) == len(cu_seq_k) == len(seqused_k) + 1
    assert int(cu_seq_q[-1]) == len(query)
    assert int(cu_seq_k[-1]) == len(key) == len(value)
    assert int((cu_seq_q[1:] - cu_seq_q[:-1]).max()) == max_q == 1
    assert int(seqused_k.max()) <= max_k
    assert (seqused_k <= cu_seq_k[1:] - cu_seq_k[:-1]).all()
    assert window_size == (-1, -1)
    assert return_aux is None
    assert block_table is None
    outputs = []
    for place, used in enumerate(seqused_k.tolist()):
        start = int(cu_seq_k[place])
        outputs.append(
            attend_plainly(query[place], key[start : start + used, 0], value[start : start + used, 0], scale)
        )
    return torch.stack(outputs).to(query.dtype)
