"""Two GPUs' rules on a machine without one: every tensor has a device by name, and no operation may mix two of them.

All tensors are real and on the CPU, so results are those of the CPU, bit by bit.  The rules are PyTorch's: tensors of
different devices meet only in a copy, as a single number from the CPU, or as indices from the CPU; a tensor that is not
on the CPU does not become a NumPy array.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map_only

CPU = torch.device("cpu")
_GET_ITEM, _SET_ITEM = Tensor.__getitem__, Tensor.__setitem__
_MOVES = {Tensor.to, Tensor.cpu, Tensor.cuda, torch.as_tensor, torch.tensor, torch.asarray}
_CHECKED_ELSEWHERE = {torch.autograd.grad, Tensor.copy_, Tensor.set_, _GET_ITEM, _SET_ITEM}


def get_place(tensor: Tensor) -> torch.device:
    """Return the device a tensor goes by."""
    return getattr(tensor, "_place", CPU)


def put(tensor: Tensor, device: torch.device) -> Tensor:
    """Let a tensor go by a device."""
    tensor._place = device  # type: ignore[attr-defined]
    return tensor


class SplitDevices(TorchFunctionMode):
    """While it is entered, tensors have the devices they are named to be on, and mixing them is an error."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name == "__get__":
            return self._read(func, args[0])
        if func is Tensor.__deepcopy__:
            # The memo holds tensors of any device.
            return put(func(*args, **kwargs), get_place(args[0]))
        target = self._find_target(func, args, kwargs)
        tensors = [item for item in tree_flatten((args, kwargs))[0] if isinstance(item, Tensor)]
        place = _join(func, args, tensors, moves=target is not None or func in _MOVES)
        if place != CPU and (func is Tensor.numpy or func is Tensor.__array__):
            raise TypeError(f"can't convert {place} device type tensor to numpy")
        target = place if target is None else target
        args, kwargs = _without_devices(func, args, kwargs)
        result = func(*args, **kwargs)
        return tree_map_only(Tensor, lambda found: _name(found, tensors, target), result)

    def _read(self, func: Any, tensor: Tensor) -> Any:
        attribute = func.__self__.__name__
        place = get_place(tensor)
        if attribute == "device":
            return place
        if attribute in ("is_cuda", "is_cpu"):
            return place.type == attribute.removeprefix("is_")
        found = func(tensor)
        return put(found, place) if isinstance(found, Tensor) else found

    def _find_target(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> torch.device | None:
        """Return the device that a call asks for."""
        if func is Tensor.cpu:
            return CPU
        asked = kwargs.get("device")
        if func in (Tensor.to, Tensor.type_as):
            for argument in (*args[1:], *kwargs.values()):
                if isinstance(argument, Tensor):
                    asked = get_place(argument)
                elif isinstance(argument, str | torch.device):
                    asked = argument
        return None if asked is None else torch.device(asked)


def _without_devices(func: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    if kwargs.get("device") is not None:
        kwargs["device"] = CPU
    if func is Tensor.to:
        args = tuple(CPU if isinstance(item, str | torch.device) else item for item in args)
    return args, kwargs


def _name(found: Tensor, given: list[Tensor], target: torch.device) -> Tensor:
    """Let a result go by its device; what came from another one is a copy."""
    if any(found is one for one in given):
        if get_place(found) == target:
            return found
        return put(found.clone(), target)
    moved = any(get_place(one) != target and _shares(one, found) for one in given)
    return put(found.clone() if moved else found, target)


def _shares(one: Tensor, other: Tensor) -> bool:
    return one.numel() > 0 and one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def _join(func: Any, args: Any, tensors: list[Tensor], moves: bool) -> torch.device:
    """Return the one device of the tensors of a call, or refuse it as PyTorch does."""
    if not tensors:
        return CPU
    if moves or func in _CHECKED_ELSEWHERE:
        first = get_place(tensors[0])
        if func in (_GET_ITEM, _SET_ITEM):
            for index in tree_flatten(args[1])[0]:
                if isinstance(index, Tensor) and get_place(index) not in (CPU, first):
                    raise RuntimeError(f"indices should be either on cpu or on the same device ({first})")
            if func is _SET_ITEM and isinstance(args[2], Tensor) and args[2].dim():
                _check_same({first, get_place(args[2])}, func)
        return first
    places = {get_place(tensor) for tensor in tensors if tensor.dim() or get_place(tensor) != CPU}
    _check_same(places, func)
    return places.pop() if places else CPU


def _check_same(places: set[torch.device], func: Any) -> None:
    if len(places) > 1:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found {sorted(map(str, places))} in {func}"
        )


class _MoveInputs(AlignDevicesHook):
    """Accelerate's own hook, for weights that are where they belong already."""

    def init_hook(self, module: nn.Module) -> nn.Module:
        return module


def dispatch(model: Any, device_map: Mapping[str, str]) -> Any:
    """Put modules on named devices, as accelerate does: arguments are moved where a module begins."""
    for name, device in device_map.items():
        module, place = model.get_submodule(name), torch.device(device)
        for tensor in _list_tensors(module):
            put(tensor, place)
        skipped = getattr(model, "_skip_keys_device_placement", None)
        add_hook_to_module(module, _MoveInputs(execution_device=place, skip_keys=list(skipped or [])))
    unplaced = [name for name, tensor in model.named_parameters() if not hasattr(tensor, "_place")]
    assert not unplaced, f"the map names no device for {unplaced}"
    first = torch.device(next(iter(device_map.values())))
    skipped = getattr(model, "_skip_keys_device_placement", None)
    add_hook_to_module(
        model, _MoveInputs(execution_device=first, io_same_device=True, skip_keys=list(skipped or []))
    )
    model.hf_device_map = dict(device_map)
    return model


def _list_tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()
