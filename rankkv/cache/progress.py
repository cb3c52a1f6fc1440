"""Progress: which layers of a cache took the last forward, and if a change of the cache was cut off in the middle."""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from ..errors import CacheStateError, InputError
from ..models.compat import find_linear_state, holds_state

#: One state of one layer: its index, and "keys" or the name of a convolution or recurrent state.
State = tuple[int, str]


class Progress:
    """Count how often each state of each layer was updated: after a whole forward all counts are equal.

    Sliding-window and linear layers do not tell how many tokens they took.  Their counts do, so a forward that was
    interrupted between two layers is noticed in hybrid models too.
    """

    def __init__(self) -> None:
        self._counts: Counter[State] = Counter()
        #: Sizes of a state that no prompt changes, such as heads and width.
        self.shapes: dict[State, tuple[int, ...]] = {}
        # What a linear layer read last: the tensor and its version, which a change in place raises.
        self._read: dict[State, tuple[weakref.ref[Tensor], int | None] | None] = {}
        # The first state that a forward updates; its next update begins a new forward.
        self._first: State | None = None
        # The change that has begun and has not ended.
        self._open: object = None

    @contextlib.contextmanager
    def update(self, state: State, layers: Sequence[Any]) -> Iterator[None]:
        """Run the update of one state; the first one of a forward checks the forward before it.

        Raises
        ------
        CacheStateError
            If the forward before did not reach every layer.
        """
        self._begin(state, layers)
        with self.change():
            yield
            self._counts[state] += 1

    def read(self, state: State, held: Tensor | None, layers: Sequence[Any]) -> None:
        """Note that a linear layer reads a state, which it will change in place or replace.

        Raises
        ------
        CacheStateError
            If the forward before did not reach every layer.
        """
        self._begin(state, layers)
        self._counts[state] += 1
        self._read[state] = None if held is None else (weakref.ref(held), _find_version(held))

    def _begin(self, state: State, layers: Sequence[Any]) -> None:
        if self._first is None:
            self._first = state
        elif state == self._first:
            self.check(layers)

    @contextlib.contextmanager
    def change(self) -> Iterator[None]:
        """Run a change of the cache, which is incomplete if it raises anything but a refusal."""
        outer, self._open = self._open, self
        try:
            yield
        except (CacheStateError, InputError):
            # Raised before anything changed.
            self._open = outer
            raise
        self._open = outer

    def fits(self, state: State, tensor: Tensor, held: Tensor | None) -> bool:
        """Return True if a new tensor of a state has the heads and width of the earlier ones.

        Parameters
        ----------
        state : tuple
            Layer and name.
        tensor : Tensor
            The new keys, ``[batch, kv_head, token, head_dim]``, or a linear layer's state.
        held : Tensor, optional
            Keys that the layer holds already.
        """
        if state not in self.shapes:
            known = tensor if held is None else held
            self.shapes[state] = _find_fixed_sizes(state, known)
        return self.shapes[state] == _find_fixed_sizes(state, tensor)

    def take_back(self, state: State) -> None:
        """Undo the last update of one state: its tokens were removed again."""
        self._counts[state] -= 1

    def check(self, layers: Sequence[Any]) -> None:
        """Raise if the last forward or change did not run to its end.

        Raises
        ------
        CacheStateError
            If it did not.
        """
        counts = self._counts
        reached = {index for (index, _), count in counts.items() if count}
        missing = {index for index, layer in enumerate(layers) if index not in reached and holds_state(layer)}
        unequal = len(set(counts.values())) > 1
        if self._open is not None or unequal or (reached and missing) or not self._has_advanced(layers):
            raise CacheStateError(
                "an earlier forward with this cache was interrupted, and not every layer took its tokens: use a new "
                "cache, or reset() this one."
            )

    def _has_advanced(self, layers: Sequence[Any]) -> bool:
        """Return False if a linear layer read a state and has not changed it since."""
        for (index, name), read in self._read.items():
            kind, _, number = name.split()
            held = find_linear_state(layers[index], kind, int(number))
            if held is None:
                return False
            if (
                read is not None
                and read[0]() is held
                and read[1] is not None
                and read[1] == _find_version(held)
            ):
                return False
        return True

    def copy(self) -> Progress:
        """Return an independent copy."""
        copied = Progress()
        copied._counts, copied.shapes = Counter(self._counts), dict(self.shapes)
        copied._read = dict(self._read)
        copied._first, copied._open = self._first, self._open
        return copied


def _find_fixed_sizes(state: State, tensor: Tensor) -> tuple[int, ...]:
    """Return the sizes that neither rows nor tokens change; those of a convolution are its channels."""
    if state[1] == "keys":
        return tensor.shape[1], tensor.shape[-1]
    return tuple(tensor.shape[1:2])


def _find_version(tensor: Tensor) -> int | None:
    """Return how often PyTorch changed a tensor in place; None where it does not count, or a kernel might not tell."""
    return None if tensor.is_inference() or tensor.device.type != "cpu" else tensor._version
