"""Effective ranks from singular values or Gram matrices, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, DegenerateAttentionError, InputError

# Entries converted to float64 at a time: 128 MiB, which a GPU multiplies in few launches, or half a MiB on a CPU, which
# fits into its cache.
_BLOCK_ELEMENTS, _CPU_BLOCK_ELEMENTS = 1 << 24, 1 << 16
_MIN_BLOCK_KEYS = 256
# Keys of one product on a GPU.  One long product of few rows would leave most of its cores idle.
_SPLIT_KEYS = 512
#: The error that torch raises if a spectrum does not converge.
LinAlgError: type[RuntimeError] = torch.linalg.LinAlgError  # type: ignore[attr-defined]
_EPSILON = torch.finfo(torch.float64).eps


def as_real_tensor(matrix: object) -> Tensor:
    """Return a tensor or an array as a detached real tensor; on MPS, which has no float64, as a CPU tensor.

    Raises
    ------
    InputError
        If it does not hold real numbers.
    """
    if isinstance(matrix, Tensor):
        tensor = matrix.detach()
    else:
        try:
            # A copy, because torch refuses read-only buffers and negative strides.
            tensor = torch.as_tensor(matrix.copy() if hasattr(matrix, "__array__") else matrix)  # type: ignore[attr-defined]
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(
                f"a matrix must be a tensor or an array of numbers, got {type(matrix).__name__} ({error})."
            ) from error
    if tensor.is_complex():
        raise InputError(f"a matrix must be real, got dtype {tensor.dtype}; take its absolute value first.")
    return tensor.cpu() if tensor.device.type == "mps" else tensor


def rank_from_singular_values(values: Tensor) -> Tensor:
    """Compute exp(H(p)) with p = values / sum(values) along the last axis.

    Parameters
    ----------
    values : Tensor
        Singular values ``[..., k]``, float64, non-negative, in any order.

    Returns
    -------
    Tensor
        Effective ranks ``[...]`` in [1, k]; 0 where every value is 0.

    Examples
    --------
    >>> rank_from_singular_values(torch.tensor([[1.0, 1.0, 0.0], [5.0, 0.0, 0.0], [0.0, 0.0, 0.0]])).tolist()
    [2.0, 1.0, 0.0]
    """
    if values.shape[-1] == 0:
        return values.new_zeros(values.shape[:-1])
    largest = values.amax(-1, keepdim=True)
    scaled = values / torch.where(largest > 0, largest, 1.0)
    shares = scaled / scaled.sum(-1, keepdim=True).clamp_min(1.0)
    ranks = torch.special.entr(shares).sum(-1).exp().clamp(1.0, float(values.shape[-1]))
    return torch.where(largest.squeeze(-1) > 0, ranks, 0.0)


@torch.no_grad()
def compute_effective_ranks(matrices: Tensor, normalize: bool = False) -> Tensor:
    """Compute the exact effective rank of each matrix of a batch, from singular values in float64.

    ``erank(A) = exp(-sum_i p_i log p_i)`` with ``p = sigma / sum(sigma)``.

    Parameters
    ----------
    matrices : Tensor
        ``[..., m, n]``, any real dtype; half precision is upcast, which is exact.
    normalize : bool, default False
        Divide by ``min(m, n)``.

    Returns
    -------
    Tensor
        ``[...]`` float64, in [1, min(m, n)]; 0 for a zero matrix, NaN for one with NaN or infinity.

    Raises
    ------
    InputError
        If there are fewer than two dimensions, a matrix is empty, or entries are not real numbers.
    DegenerateAttentionError
        If the singular values do not converge on the device, on the CPU, nor with a tiny jitter.

    References
    ----------
    O. Roy, M. Vetterli, "The effective rank: A measure of effective dimensionality", EUSIPCO 2007, def. 1.

    Examples
    --------
    >>> compute_effective_ranks(torch.stack([torch.eye(3), torch.ones(3, 3)])).round(decimals=6).tolist()
    [3.0, 1.0]
    """
    tensor = as_real_tensor(matrices)
    if tensor.ndim < 2 or 0 in tensor.shape[-2:]:
        raise InputError(f"matrices must have shape [..., m, n] with m, n >= 1, got {tuple(tensor.shape)}.")
    smallest = min(tensor.shape[-2:])
    if tensor.numel() == 0:
        return torch.zeros(tensor.shape[:-2], dtype=torch.float64, device=tensor.device)
    scaled, finite = _rescaled(tensor.to(torch.float64))
    ranks = rank_from_singular_values(_solve(torch.linalg.svdvals, scaled))
    ranks = torch.where(finite, ranks, torch.nan)
    return ranks / smallest if normalize else ranks


@torch.no_grad()
def compute_rank_from_gram(gram: Tensor) -> Tensor:
    """Compute effective ranks from Gram matrices ``G = A A^T``: sigma = sqrt(eigenvalues of G).

    The Gram matrix squares the condition number, so eigenvalues carry noise of about ``eps * lambda_max``. Those
    below ``4 w eps lambda_max`` count as zero, and an exact rank 1 gives 1 within 1e-6. So singular values below
    ``d = sqrt(4 w eps)`` of the largest are dropped. Each adds at most ``-d log d`` to the entropy: the rank
    moves by at most about ``-w d log d`` relative, 1e-4 for w = 32. Reaching this bound takes one large value
    and all others just below the floor. Softmax attention moves by 1e-7 at w = 128 and by 1.3e-6 at w = 2048.
    `compute_effective_ranks` has no such floor.

    Parameters
    ----------
    gram : Tensor
        ``[..., w, w]`` symmetric positive semi-definite; only the lower triangle is read, in float64.

    Returns
    -------
    Tensor
        ``[...]`` float64, in [1, w]; 0 for a zero matrix, NaN for one with NaN or infinity.

    Raises
    ------
    InputError
        If the last two axes are not equal.
    DegenerateAttentionError
        If the eigenvalues do not converge on the device, on the CPU, nor with a tiny jitter.

    Examples
    --------
    >>> attention = torch.eye(4, 100)
    >>> round(float(compute_rank_from_gram(attention @ attention.T)), 6)
    4.0
    """
    return rank_from_eigenvalues(compute_gram_eigenvalues(gram))


@torch.no_grad()
def compute_gram_eigenvalues(gram: Tensor) -> Tensor:
    """Compute the eigenvalues of Gram matrices, each divided by its largest entry.

    Parameters
    ----------
    gram : Tensor
        As in :func:`compute_rank_from_gram`, which also names what is raised.

    Returns
    -------
    Tensor
        ``[..., w]`` float64, ascending; NaN for a matrix with NaN or infinity.
    """
    tensor = as_real_tensor(gram)
    if tensor.ndim < 2 or tensor.shape[-1] != tensor.shape[-2] or tensor.shape[-1] == 0:
        raise InputError(f"a Gram matrix must have shape [..., w, w] with w >= 1, got {tuple(tensor.shape)}.")
    if tensor.numel() == 0:
        return torch.zeros(tensor.shape[:-1], dtype=torch.float64, device=tensor.device)
    scaled, finite = _rescaled(tensor.to(torch.float64))
    return torch.where(finite[..., None], _solve(torch.linalg.eigvalsh, scaled), torch.nan)


def rank_from_eigenvalues(eigenvalues: Tensor) -> Tensor:
    """Compute effective ranks from what :func:`compute_gram_eigenvalues` returns, ``[..., w]`` to ``[...]``."""
    floor = 4 * eigenvalues.shape[-1] * _EPSILON * eigenvalues.amax(-1, keepdim=True)
    singular = torch.where(eigenvalues > floor, eigenvalues, 0.0).clamp_min(0.0).sqrt()
    ranks = rank_from_singular_values(singular)
    return torch.where(eigenvalues.isfinite().all(dim=-1), ranks, torch.nan)


@torch.no_grad()
def compute_gram(matrices: Tensor) -> Tensor:
    """Compute ``A A^T`` in float64, block by block of columns, without a float64 copy of the whole input.

    Additive: the Gram matrix of heads (or key blocks, or shards) side by side is the sum of theirs.

    Parameters
    ----------
    matrices : Tensor
        ``[..., m, n]``, any real dtype. Float64 entries should be within 1e-150 to 1e150, because they are squared.

    Returns
    -------
    Tensor
        ``[..., m, m]`` float64 on the same device.

    Raises
    ------
    InputError
        If there are fewer than two dimensions, or entries are not real numbers.

    Examples
    --------
    >>> compute_gram(torch.tensor([[1.0, 2.0], [0.0, 3.0]])).tolist()
    [[5.0, 6.0], [6.0, 9.0]]
    """
    tensor = as_real_tensor(matrices)
    if tensor.ndim < 2:
        raise InputError(f"matrices must have shape [..., m, n], got {tuple(tensor.shape)}.")
    *lead, rows, keys = tensor.shape
    if tensor.numel() == 0:
        return torch.zeros(*lead, rows, rows, dtype=torch.float64, device=tensor.device)
    flat = tensor.reshape(-1, rows, keys)
    gram = torch.zeros(flat.shape[0], rows, rows, dtype=torch.float64, device=tensor.device)
    elements = _CPU_BLOCK_ELEMENTS if tensor.device.type == "cpu" else _BLOCK_ELEMENTS
    together = max(1, min(flat.shape[0], elements // (rows * keys)))
    for first in range(0, flat.shape[0], together):
        part, out = flat[first : first + together], gram[first : first + together]
        step = max(_MIN_BLOCK_KEYS, elements // (part.shape[0] * rows))
        for start in range(0, keys, step):
            block = part[:, :, start : start + step]
            if tensor.device.type != "cpu" and block.shape[-1] > _SPLIT_KEYS:
                whole = block.shape[-1] // _SPLIT_KEYS * _SPLIT_KEYS
                out += _multiply_in_parts(block[..., :whole])
                block = block[..., whole:]
            if block.shape[-1]:
                block = block.to(torch.float64)
                out.baddbmm_(block, block.mT)
    return gram.reshape(*lead, rows, rows)


def _multiply_in_parts(block: Tensor) -> Tensor:
    """Compute ``A A^T`` of ``[matrix, row, key]`` in float64, as the sum of many small products at once."""
    matrices, rows, keys = block.shape
    parts = block.new_empty((matrices, keys // _SPLIT_KEYS, rows, _SPLIT_KEYS), dtype=torch.float64)
    parts.copy_(block.unflatten(-1, (-1, _SPLIT_KEYS)).transpose(1, 2))
    flat = parts.flatten(0, 1)
    return torch.bmm(flat, flat.mT).view(*parts.shape[:2], rows, rows).sum(dim=1)


def round_ranks(ranks: Any, digits: int = 6) -> Any:
    """Round ranks to ``digits`` significant digits, so that float noise cannot change a token's layer.

    Parameters
    ----------
    ranks : float, list, array or Tensor
        Any nesting; NaN and infinity pass through.
    digits : int, default 6
        Significant decimal digits, 1 to 17.

    Returns
    -------
    float, list or Tensor
        For a tensor, a float64 tensor on the same device; otherwise floats, in lists like the input's.

    Raises
    ------
    ConfigError
        If ``digits`` is not an integer from 1 to 17.

    Examples
    --------
    >>> round_ranks([12.34567891, 0.0, 8.0000000003])
    [12.3457, 0.0, 8.0]
    """
    if isinstance(digits, bool) or not isinstance(digits, int) or not 1 <= digits <= 17:
        raise ConfigError(f"digits must be an integer from 1 to 17, got {digits!r}.")
    if isinstance(ranks, Tensor):
        rounded = round_ranks(ranks.detach().cpu().to(torch.float64).tolist(), digits)
        device = "cpu" if ranks.device.type == "mps" else ranks.device
        return torch.tensor(rounded, dtype=torch.float64, device=device)
    if hasattr(ranks, "tolist"):
        return round_ranks(ranks.tolist(), digits)
    if isinstance(ranks, (list, tuple)):
        return [round_ranks(rank, digits) for rank in ranks]
    return float(f"{float(ranks):.{digits - 1}e}")


def _solve(kernel: Callable[[Tensor], Tensor], matrices: Tensor) -> Tensor:
    """Run a LAPACK kernel; on failure retry on the CPU, then with a tiny jitter, then raise."""
    try:
        return kernel(matrices)
    except LinAlgError:
        pass
    on_cpu = matrices.cpu()
    try:
        return kernel(on_cpu).to(matrices.device)
    except LinAlgError:
        pass
    size = min(on_cpu.shape[-2:])
    # Callers rescale entries to at most 1, so the jitter stays below the floor of the spectrum.
    shifted = on_cpu.clone()
    shifted.diagonal(dim1=-2, dim2=-1).add_(_EPSILON * torch.linspace(1.0, 2.0, size, dtype=torch.float64))
    try:
        return kernel(shifted).to(matrices.device)
    except LinAlgError as error:
        raise DegenerateAttentionError(
            f"the spectrum of a matrix of shape {tuple(matrices.shape)} does not converge even with a jitter "
            f"of {2 * _EPSILON:.1e} ({error}); use strategy='uniform', which needs no rank."
        ) from error


def _rescaled(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Divide each matrix by its largest entry; non-finite matrices become 0. Also return which are finite."""
    largest = matrices.abs().amax((-2, -1), keepdim=True)
    scaled = matrices / largest.clamp(min=torch.finfo(matrices.dtype).tiny)
    # One entry that is not finite makes all others NaN or zero.
    return torch.nan_to_num(scaled, nan=0.0, posinf=0.0, neginf=0.0), largest.isfinite()[..., 0, 0]
