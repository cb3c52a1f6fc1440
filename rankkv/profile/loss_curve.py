"""LossCurve: the loss to expect from the share of attention that eviction loses; fitting alone needs numpy."""

from __future__ import annotations

import bisect
import functools
import importlib.resources
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ..errors import InputError, ProfileError
from ..utils.files import parse_json, shorten

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

#: Share of the calibrated prompts whose loss stays below the bound.
CONFIDENCE = 0.9
#: Most knots of a curve, and fewest measurements that each of them stands for.
MOST_KNOTS, PER_KNOT = 12, 6
#: Curve for models that were not calibrated, in the package.
DEFAULT_FILE = "loss_curves.json"
# Shares of attention and losses below these are noise of float32.
_LEAST_LOST, _LEAST_LOSS = 1e-6, 1e-7
# Size of a curve: a damaged file must not fill the memory.
_LARGEST_CURVE = 1000


@dataclass(frozen=True)
class LossCurve:
    """Monotone curve from the share of attention that eviction loses to the loss that follows.

    The loss is the mean KL divergence of the compressed model's next-token distribution from the full cache's, nats
    per token, over the 128 tokens that follow.  Between its knots the curve is linear in the logarithms.  Below the
    first knot the loss is proportional to the share; above the last one the last slope goes on.

    Parameters
    ----------
    lost : sequence of float
        ``[knot]`` shares of attention in (0, 1], ascending.
    loss : sequence of float
        ``[knot]`` loss that half of the prompts stay below, nats per token, not descending.
    margin : float
        Factor on ``loss`` that nine of ten prompts stay below, at least 1.
    measured : mapping
        Record of the measurement: models, prompts, strategy.

    Raises
    ------
    ProfileError
        If a number is out of its range, or the knots do not ascend.

    Examples
    --------
    >>> curve = LossCurve([0.01, 0.1], [0.02, 0.2], margin=2.0)
    >>> [round(value, 3) for value in curve.predict(0.05)]
    [0.1, 0.2]
    """

    lost: tuple[float, ...]
    loss: tuple[float, ...]
    margin: float
    measured: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        try:
            for name in ("lost", "loss"):
                object.__setattr__(self, name, tuple(map(_read_positive, getattr(self, name))))
            object.__setattr__(self, "margin", _read_positive(self.margin))
            object.__setattr__(self, "measured", dict(self.measured or {}))
            models, strategy = self.measured.get("models", []), self.measured.get("strategy", "")  # type: ignore[union-attr]
            if not isinstance(models, list | tuple) or not all(
                isinstance(text, str) for text in (*models, strategy)
            ):
                raise TypeError("models must be a list of names, and strategy a name")
        except (TypeError, ValueError, OverflowError) as error:
            raise ProfileError(f"the loss curve is not well-formed ({error}); calibrate again.") from error
        count = len(self.lost)
        ascending = all(a < b for a, b in itertools.pairwise(self.lost))
        if not 2 <= count <= _LARGEST_CURVE or len(self.loss) != count or not ascending or self.lost[-1] > 1:
            raise ProfileError(
                f"the loss curve has lost {shorten(list(self.lost))} and {len(self.loss)} losses, but needs 2 to "
                f"{_LARGEST_CURVE} of each, lost ascending up to 1; calibrate again."
            )
        if any(a > b for a, b in itertools.pairwise(self.loss)) or self.margin < 1:
            raise ProfileError(
                f"the loss curve has losses {shorten(list(self.loss))} and margin {self.margin:g}, but the losses must "
                "not descend and the margin must be at least 1; calibrate again."
            )

    def __hash__(self) -> int:
        return hash((self.lost, self.loss, self.margin))

    def predict(self, lost: float) -> tuple[float, float]:
        """Predict the loss that half of the prompts stay below, and the one that nine of ten stay below.

        Parameters
        ----------
        lost : float
            Share of the attention that goes to evicted tokens, in [0, 1].
        """
        if lost <= _LEAST_LOST:
            return 0.0, 0.0
        x, y = [list(map(math.log, values)) for values in (self.lost, self.loss)]
        place = math.log(lost)
        if place <= x[0]:
            slope, start = 1.0, 0
        else:
            # Beyond the last knot its own piece goes on.
            start = min(bisect.bisect_left(x, place), len(x) - 1) - 1
            slope = (y[start + 1] - y[start]) / (x[start + 1] - x[start])
        expected = math.exp(y[start] + slope * (place - x[start]))
        return expected, expected * self.margin

    def find_lost(self, max_loss: float) -> float:
        """Find the largest share of attention, up to 1, whose bound of nine in ten stays at or below a loss.

        Parameters
        ----------
        max_loss : float
            Nats per token, above 0.

        Examples
        --------
        >>> round(LossCurve([0.01, 0.1], [0.02, 0.2], margin=2.0).find_lost(0.2), 4)
        0.05
        """
        low, high = math.log(_LEAST_LOST), 0.0
        if self.predict(1.0)[1] <= max_loss:
            return 1.0
        for _ in range(60):
            middle = (low + high) / 2.0
            low, high = (middle, high) if self.predict(math.exp(middle))[1] <= max_loss else (low, middle)
        return math.exp(low)

    def to_dict(self) -> dict[str, Any]:
        """Return the curve as plain JSON types."""
        return {**asdict(self), "lost": list(self.lost), "loss": list(self.loss)}

    @classmethod
    def from_dict(cls, record: Any) -> LossCurve:
        """Build a curve from a record of `to_dict`.

        Raises
        ------
        ProfileError
            If the record is not a curve.
        """
        if not isinstance(record, Mapping):
            raise ProfileError(f"the loss curve is {shorten(record)}, it must be a record; calibrate again.")
        try:
            return cls(**record)
        except TypeError as error:
            raise ProfileError(f"the loss curve is not well-formed ({error}); calibrate again.") from error


def fit_loss_curve(
    lost: ArrayLike, losses: ArrayLike, prompts: Sequence[Any], measured: Mapping[str, Any] | None = None
) -> LossCurve:
    """Fit a loss curve: medians of neighbouring measurements, made monotone, and the margin of nine in ten.

    The measurements are sorted by the share lost and cut into at most 12 equal groups.  A knot is the group's median
    share and median loss.  Losses that descend are pooled.  The margin is the 0.9 quantile of loss over curve, and each
    prompt is left out of the curve that it is compared with.

    Parameters
    ----------
    lost, losses : array_like
        ``[measurement]`` share of attention lost in [0, 1] and loss in nats per token.
    prompts : sequence
        ``[measurement]``, the prompt that each measurement belongs to.
    measured : mapping, optional
        Record of the measurement.

    Raises
    ------
    InputError
        If fewer than 24 measurements, or measurements of fewer than 4 prompts, lose attention.

    Examples
    --------
    >>> shares = [i / 100 for i in range(1, 41)]
    >>> curve = fit_loss_curve(shares, [2 * share for share in shares], [i % 8 for i in range(40)])
    >>> round(curve.predict(0.2)[0], 2), round(curve.margin, 1)
    (0.4, 1.0)
    """
    import numpy as np

    x, y = np.asarray(lost, dtype=np.float64), np.asarray(losses, dtype=np.float64)
    names = np.array([str(prompt) for prompt in prompts])
    used = np.isfinite(x) & np.isfinite(y) & (x > _LEAST_LOST)
    x, y, names = np.log(np.minimum(x[used], 1.0)), np.log(np.maximum(y[used], _LEAST_LOSS)), names[used]
    known = sorted(set(names.tolist()))
    if len(x) < 4 * PER_KNOT or len(known) < 4:
        raise InputError(
            f"a loss curve needs at least {4 * PER_KNOT} measurements of 4 prompts that lose attention, got {len(x)} "
            f"of {len(known)}: give more or longer texts."
        )
    errors = []
    for name in known:
        own = names == name
        errors += (y[own] - np.interp(x[own], *_fit_knots(x[~own], y[~own]))).tolist()
    # The finite-sample quantile of split conformal prediction.
    place = min(len(errors) - 1, math.ceil(CONFIDENCE * (len(errors) + 1)) - 1)
    margin = math.exp(max(0.0, sorted(errors)[place]))
    knots, values = _fit_knots(x, y)
    described = {"prompts": len(known), "measurements": len(x), **(measured or {})}
    return LossCurve(_shorten(np.exp(knots)), _shorten(np.exp(values)), float(f"{margin:.4g}"), described)


@functools.cache
def load_default_curves() -> dict[str, LossCurve]:
    """Load the curves for models that were not calibrated, by selector name."""
    path = importlib.resources.files("rankkv.profile") / "shipped" / DEFAULT_FILE
    return {name: LossCurve.from_dict(record) for name, record in parse_json(path.read_text("utf-8")).items()}


def _fit_knots(x: Any, y: Any) -> tuple[Any, Any]:
    """Return the knots and their non-descending values, both logarithms, as arrays."""
    import numpy as np

    order = np.argsort(x, kind="stable")
    groups = np.array_split(order, max(2, min(MOST_KNOTS, len(x) // PER_KNOT)))
    knots = np.array([np.median(x[group]) for group in groups])
    pools: list[list[float]] = []
    for value in (float(np.median(y[group])) for group in groups):
        pools.append([value, 1.0])
        while len(pools) > 1 and pools[-2][0] >= pools[-1][0]:
            later, count = pools.pop()
            earlier, before = pools[-1]
            pools[-1] = [(earlier * before + later * count) / (before + count), before + count]
    values = np.concatenate([np.full(int(count), value) for value, count in pools])
    distinct = np.concatenate([[True], np.diff(knots) > 1e-9])
    return knots[distinct], values[distinct]


def _shorten(values: Any) -> tuple[float, ...]:
    return tuple(float(f"{value:.6g}") for value in values)


def _read_positive(value: Any) -> float:
    if isinstance(value, str | bytes | bool):
        raise TypeError(f"{shorten(value)} is not a number")
    number = float(value)
    if not 0 < number < math.inf:
        raise ValueError(f"{number:g} is not a finite number above 0")
    return number
