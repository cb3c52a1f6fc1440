"""FrozenOptions: an immutable mapping of options that can be hashed, copied and pickled."""

from __future__ import annotations

from typing import Any, NoReturn


class FrozenOptions(dict[str, Any]):
    """A dict that refuses changes.

    Examples
    --------
    >>> FrozenOptions(exponent=2)["exponent"]
    2
    """

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError("these options cannot change: build a new object with dataclasses.replace().")

    __setitem__ = __delitem__ = __ior__ = _refuse
    clear = pop = popitem = setdefault = update = _refuse

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(tuple(sorted((name, repr(value)) for name, value in self.items())))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (dict(self),)
