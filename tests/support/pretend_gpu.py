"""A pretend GPU: tensors that say ``cuda:0`` over CPU arithmetic, and counts of what a GPU would have to do.

Inside :func:`pretend`, a tensor that :func:`put_on_gpu` made says that it is on a GPU.  What a real GPU refuses raises:
operands of two devices, NumPy of a GPU tensor.  Counted are launches (operations that are no views), waits (the host
reads a number of the GPU), and copies from the host's ordinary memory, each by the file and line of rankkv that caused
it.  What the model itself does is counted apart.
"""

from __future__ import annotations

import collections
import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import rankkv

GPU = torch.device("cuda", 0)
_PACKAGE = str(Path(rankkv.__file__).parent) + "/"
_VIEWS = {
    "view", "_unsafe_view", "reshape", "expand", "transpose", "t", "slice", "select", "unsqueeze",
    "squeeze", "permute", "detach", "alias", "unflatten", "flatten", "as_strided", "diagonal", "unbind",
    "split", "split_with_sizes", "chunk", "lift_fresh", "lift", "mT", "numpy_T", "_reshape_alias",
    "unfold", "movedim", "is_same_size", "sym_size", "empty", "empty_like", "new_empty",
    "empty_strided", "_local_scalar_dense", "is_pinned",
}  # fmt: skip
_T = torch.Tensor
_READS: dict[Any, str] = {
    _T.item: "item",
    _T.tolist: "tolist",
    _T.__bool__: "bool",
    _T.__int__: "int",
    _T.__float__: "float",
    _T.__index__: "index",
    _T.cpu: "cpu",
    _T.numpy: "numpy",
    _T.__array__: "numpy",
}
#: Operations whose result has a size that only the device knows, or that check for errors on the host.
_WAITING = {"nonzero", "equal", "allclose", "unique", "masked_select", "argwhere", "bincount"} | {
    f"linalg_{name}" for name in ("eigvalsh", "eigh", "svdvals", "svd")
}
_OF_METADATA = {
    "__get__", "__set__", "dim", "size", "stride", "numel", "__repr__", "is_floating_point",
    "is_contiguous", "storage_offset", "data_ptr", "element_size", "__hash__", "requires_grad_",
    "is_complex", "__len__", "untyped_storage", "ndimension", "nelement", "__deepcopy__", "type",
    "is_inference",
}  # fmt: skip


class Counts:
    """What was counted since the last :meth:`clear`, each by place."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Start again from zero."""
        self.launches: collections.Counter[str] = collections.Counter()
        self.waits: collections.Counter[str] = collections.Counter()
        self.copies: collections.Counter[str] = collections.Counter()
        #: Waits for what was sent behind the host's back, which it reads later.
        self.late: collections.Counter[str] = collections.Counter()

    def own(self, counter: collections.Counter[str]) -> int:
        """Sum a counter without what the model itself did."""
        return sum(count for where, count in counter.items() if where != "model")


_counts = Counts()
_is_counting = [True]


class _OnGpu(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def put_on_gpu(value: Any) -> Any:
    """Return a tensor that says it is on the GPU; a module gets such parameters and buffers, in place."""
    if isinstance(value, torch.nn.Module):
        for module in value.modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is not None:
                    module._parameters[name] = put_on_gpu(parameter.detach())  # type: ignore[assignment]
            for name, buffer in list(module._buffers.items()):
                module._buffers[name] = put_on_gpu(buffer)
            for name, attribute in list(vars(module).items()):
                if isinstance(attribute, torch.Tensor):
                    setattr(module, name, put_on_gpu(attribute))
        return value
    if isinstance(value, _OnGpu) or not isinstance(value, torch.Tensor):
        return value
    with torch._C.DisableTorchFunction():
        return value.as_subclass(_OnGpu)


def count_as_one(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a stand-in for one kernel: what it computes with, on the CPU, counts as one launch."""

    def kernel(*args: Any, **kwargs: Any) -> Any:
        _counts.launches[_find_place()] += 1
        _is_counting[0] = False
        try:
            with torch._C.DisableTorchFunction():
                result = function(*_take_off(args), **_take_off(kwargs))
        finally:
            _is_counting[0] = True
        return _map(put_on_gpu, result)

    return kernel


@contextlib.contextmanager
def pretend() -> Iterator[Counts]:
    """Count inside the block, and let tensors be made on the GPU."""
    _counts.clear()
    with pretend_events(), _Launches(), _Factories():
        yield _counts


@contextlib.contextmanager
def pretend_events() -> Iterator[None]:
    """Let the events of a stream be made and waited for, which a torch without CUDA cannot."""
    events = torch.cuda.Event, torch.cuda.current_stream
    torch.cuda.Event, torch.cuda.current_stream = _Event, lambda *_: None  # type: ignore[misc,assignment]
    try:
        yield
    finally:
        torch.cuda.Event, torch.cuda.current_stream = events  # type: ignore[misc]


class _Event:
    """An event of a stream that has always just been reached."""

    def record(self, stream: Any = None) -> None:
        """Mark what the device has done so far."""

    def synchronize(self) -> None:
        """Wait for it."""
        _counts.late[_find_place()] += 1


class _Launches(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        output = func(*args, **(kwargs or {}))
        if name not in _VIEWS and _is_counting[0]:
            _counts.launches[_find_place()] += 1
        return output


class _Factories(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") == "pin_memory":
            return args[0]
        on_gpu = any(isinstance(tensor, _OnGpu) for tensor in _flatten((args, kwargs)))
        named = [kwargs.get("device"), *(args[1:] if getattr(func, "__name__", "") == "to" else ())]
        if on_gpu or any(_is_gpu(device) for device in named):
            return _run(func, args, kwargs)
        # What the host computes is no launch.
        counting, _is_counting[0] = _is_counting[0], False
        try:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        finally:
            _is_counting[0] = counting


def _is_gpu(device: Any) -> bool:
    return isinstance(device, str | torch.device) and torch.device(device).type == "cuda"


def _find_place() -> str:
    """Name the line of rankkv that runs now, or "model" inside of the model's own layers and attention."""
    frame, in_model = sys._getframe(2), False
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(_PACKAGE):
            runs_model = file.endswith("observe/call.py") and frame.f_code.co_name == "run"
            if in_model or runs_model:
                return "model"
            return f"{file[len(_PACKAGE) :]}:{frame.f_lineno} {frame.f_code.co_name}"
        if ("/transformers/" in file and "cache_utils" not in file) or (
            "/nn/modules/" in file and not file.endswith("nn/modules/module.py")
        ):
            in_model = True
        frame = frame.f_back
    return "model"


def _map(change: Callable[[Any], Any], value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_map(change, item) for item in value))
    if isinstance(value, tuple):
        # Also the named results of torch, which are built from one sequence.
        return type(value)([_map(change, item) for item in value])
    if isinstance(value, list):
        return [_map(change, item) for item in value]
    if isinstance(value, dict):
        return {key: _map(change, item) for key, item in value.items()}
    return value


def _flatten(value: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, list | tuple):
        for item in value:
            found += _flatten(item)
    elif isinstance(value, dict):
        found = _flatten(list(value.values()))
    return found


def _take_off(value: Any) -> Any:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        with torch._C.DisableTorchFunction():
            return tensor.as_subclass(torch.Tensor)

    return _map(change, value)


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    """Run one function of torch that has a GPU tensor or names a GPU."""
    name = getattr(func, "__name__", str(func))
    tensors = _flatten((args, kwargs))
    if name == "__get__" and args and isinstance(args[0], _OnGpu):
        known = {"device": GPU, "is_cuda": True, "is_cpu": False}
        attribute = getattr(getattr(func, "__self__", None), "__name__", "")
        if attribute in known:
            return known[attribute]
    if func in _READS and isinstance(args[0], _OnGpu):
        if _READS[func] == "numpy":
            raise TypeError(f"cannot convert a tensor of cuda:0 to numpy, at {_find_place()}")
        _counts.waits[_find_place()] += 1
        _is_counting[0] = False
        try:
            with torch._C.DisableTorchFunction():
                result = func(*_take_off(args), **_take_off(kwargs))
        finally:
            _is_counting[0] = True
        return result.clone() if isinstance(result, torch.Tensor) else result
    if name in ("to", "type_as") and tensors:
        return _move(func, args, kwargs)
    plain = dict(kwargs)
    made_on_gpu = _is_gpu(plain.get("device"))
    if plain.get("device") is not None:
        plain["device"] = "cpu" if made_on_gpu else plain["device"]
    plain.pop("pin_memory", None)
    if not any(isinstance(tensor, _OnGpu) for tensor in tensors):
        with torch._C.DisableTorchFunction():
            result = func(*args, **plain)
        if made_on_gpu and name in ("tensor", "as_tensor", "asarray"):
            _counts.copies[_find_place()] += 1
        return _map(put_on_gpu, result) if made_on_gpu else result
    if name not in _OF_METADATA:
        _check(name, args, tensors)
    with torch._C.DisableTorchFunction():
        result = func(*_take_off(args), **_take_off(plain))
    if name == "__set__" or (name == "__get__" and not isinstance(result, torch.Tensor)):
        return result
    # What works in place returns its own tensor.
    if (
        isinstance(result, torch.Tensor)
        and isinstance(args[0], _OnGpu)
        and name.endswith("_")
        and not name.endswith("__")
    ):
        return args[0]
    return _map(put_on_gpu, result)


def _move(func: Any, args: Any, kwargs: Any) -> Any:
    source = isinstance(args[0], _OnGpu)
    target, rest, named = source, [], dict(kwargs)
    for value in args[1:]:
        if isinstance(value, str | torch.device):
            target, value = _is_gpu(value), "cpu"
        elif isinstance(value, torch.Tensor):
            target, value = isinstance(value, _OnGpu), _take_off(value)
        rest.append(value)
    if named.get("device") is not None:
        target, named["device"] = _is_gpu(named["device"]), "cpu"
    if source and not target and not named.get("non_blocking"):
        _counts.waits[_find_place()] += 1
    if target and not source and not named.get("non_blocking"):
        _counts.copies[_find_place()] += 1
    with torch._C.DisableTorchFunction():
        result = func(_take_off(args[0]), *rest, **named)
        if source != target and result is args[0]:
            result = result.clone()
    return put_on_gpu(result) if target else _take_off(result)


def _check(name: str, args: Any, tensors: list[torch.Tensor]) -> None:
    """Count what makes the host wait, and raise on what two devices cannot do together."""
    place = _find_place()
    if any(tensor.dim() for tensor in tensors if not isinstance(tensor, _OnGpu)):
        if name in ("__getitem__", "__setitem__"):
            _counts.copies[place] += 1
        elif name == "copy_":
            (_counts.copies if isinstance(args[0], _OnGpu) else _counts.waits)[place] += 1
        else:
            raise RuntimeError(f"expected all tensors on one device, found cuda:0 and cpu: {name} at {place}")
    if name in _WAITING or (name == "where" and len(tensors) == 1):
        _counts.waits[place] += 1
    if name in ("__getitem__", "__setitem__"):
        for index in args[1] if isinstance(args[1], tuple) else (args[1],):
            if isinstance(index, torch.Tensor) and (index.dtype == torch.bool or index.dim() == 0):
                _counts.waits[place] += 1
            if isinstance(index, list):
                _counts.copies[place] += 1
