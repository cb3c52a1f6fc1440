"""RankProfile: the measured sensitivity of each layer and head of one model, and its JSON form."""

from __future__ import annotations

import hashlib
import json
import math
import operator
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import InputError, ProfileError, SourceUnavailableError
from ..utils.files import dump_json, parse_json, shorten, write_text_atomically
from ..utils.hub import pull_file, push_file, require
from .loss_curve import LossCurve

FORMAT = "rankkv-profile"
VERSION = 1
#: Largest file of a profile, in bytes, and bounds of what it holds.
SIZE_LIMIT = 64 * 2**20
_MOST_LAYERS, _MOST_CHARACTERS = 10_000, 1_000
#: Name of the file in a hub repository.
HUB_FILE = "rankkv_profile.json"

# Share of the largest sampled weight. Casting a model to another floating-point type changes weights by less.
_WEIGHT_TOLERANCE = 0.01


@dataclass(frozen=True)
class RankProfile:
    """Measured sensitivity of each compressible layer of one model.

    All distances are means over the calibration texts, in nats per token. They compare the model with its full cache
    and with part of it, on a continuation. ``divergence`` is KL(full || compressed). ``excess_loss`` is the difference
    of the negative log-likelihoods; the divergence estimates it with less noise.

    Parameters
    ----------
    model : mapping
        Shape of the model: type, layer count, heads, widths, vocabulary.
    weight_sample : sequence of float
        Values of a few weights that tell this model from another of the same shape.
    layer_indices : sequence of int
        Model indices of the compressible layers.
    ratios : sequence of float
        Fractions of the cache kept at which the curves were measured, ascending.
    excess_loss, divergence : sequence of sequence of float
        ``[layer][ratio]``: distance when this layer alone is compressed to that ratio. If ``calibration["method"]`` is
        "gradient", an estimate of the distance this adds while all other layers keep ``base_ratio``.
    gain_loss, gain_divergence : sequence of float
        ``[layer]``: drop in distance when this layer gets its full cache back and all others keep ``base_ratio``.
    base_ratio : float
        Fraction of the cache that all layers keep for the gains.
    ranks : mapping
        ``"scope/aggregation"`` to ``{"mean": [layer], "std": [layer]}``, effective ranks over the texts.
    calibration : mapping
        Record of the measurement: number of texts, tokens, selector, version.
    name : str
        Name of the model.
    head_gain_divergence : sequence of sequence of float
        ``[layer][kv_head]``: as ``gain_divergence``, when this head alone gets its full cache back. Empty if not
        measured.
    query_centres : mapping
        Centres of each head's queries, for selector ``"triattention"``; empty if not measured.
    score_weights : mapping
        ``{"selector": name, "weights": [layer][kv_head]}`` and how they were measured: factors of a selector's scores,
        for strategy ``"global"``; empty if not measured.
    loss_curves : mapping
        Selector name to a record of :class:`rankkv.profile.loss_curve.LossCurve`; empty if not measured.

    Raises
    ------
    ProfileError
        If lengths disagree, a number is not finite, a value has another type, the ratios are not ascending in (0, 1),
        or the layer indices are not ascending from 0 on.

    Examples
    --------
    >>> profile = RankProfile(model={"num_hidden_layers": 2}, weight_sample=[0.5], layer_indices=[0, 1],
    ...     ratios=[0.1, 0.4], excess_loss=[[0.2, 0.1], [0.4, 0.1]], divergence=[[0.2, 0.1], [0.4, 0.1]],
    ...     gain_loss=[0.1, 0.3], gain_divergence=[0.1, 0.3], base_ratio=0.1)
    >>> RankProfile.from_dict(profile.to_dict()) == profile
    True
    """

    model: Mapping[str, Any]
    weight_sample: tuple[float, ...]
    layer_indices: tuple[int, ...]
    ratios: tuple[float, ...]
    excess_loss: tuple[tuple[float, ...], ...]
    divergence: tuple[tuple[float, ...], ...]
    gain_loss: tuple[float, ...]
    gain_divergence: tuple[float, ...]
    base_ratio: float
    ranks: Mapping[str, Any] = field(default_factory=dict)
    calibration: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""
    head_gain_divergence: tuple[tuple[float, ...], ...] = ()
    query_centres: Mapping[str, Any] = field(default_factory=dict)
    score_weights: Mapping[str, Any] = field(default_factory=dict)
    loss_curves: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "model", dict(self.model))
            object.__setattr__(self, "layer_indices", tuple(map(operator.index, self.layer_indices)))
            for name in ("weight_sample", "ratios", "gain_loss", "gain_divergence"):
                object.__setattr__(self, name, tuple(map(_read_number, getattr(self, name))))
            for name in ("excess_loss", "divergence", "head_gain_divergence"):
                rows = tuple(tuple(map(_read_number, row)) for row in getattr(self, name))
                object.__setattr__(self, name, rows)
            object.__setattr__(self, "base_ratio", _read_number(self.base_ratio))
            self._check_descriptions()
        except (TypeError, ValueError, OverflowError) as error:
            raise ProfileError(f"the profile is not well-formed ({error}); calibrate again.") from error
        self._check()

    def __hash__(self) -> int:
        return hash((self.layer_indices, self.divergence, self.gain_divergence))

    def _check_descriptions(self) -> None:
        """Raise TypeError or ValueError if a text or a mapping is not what calibration writes."""
        if not isinstance(self.name, str) or len(self.name) > _MOST_CHARACTERS:
            raise TypeError(
                f"name is {shorten(self.name)}, it must be a text of at most {_MOST_CHARACTERS} characters"
            )
        for name, value in self.model.items():
            if (
                not isinstance(name, str)
                or not isinstance(value, int | str)
                or len(str(value)) > _MOST_CHARACTERS
            ):
                raise TypeError(
                    f"model has {shorten(name)}: {shorten(value)}, it must map names to integers or texts"
                )
        if not isinstance(self.ranks, Mapping) or not isinstance(self.calibration, Mapping):
            raise TypeError("ranks and calibration must be mappings")
        if not isinstance(self.query_centres, Mapping):
            raise TypeError(f"query_centres is {shorten(self.query_centres)}, it must be a mapping")
        self._check_score_weights()
        if not isinstance(self.loss_curves, Mapping) or not all(
            isinstance(name, str) for name in self.loss_curves
        ):
            raise TypeError(f"loss_curves is {shorten(self.loss_curves)}, it must map selectors to curves")
        for record in self.loss_curves.values():
            LossCurve.from_dict(record)
        count = len(self.layer_indices)
        for name, measured in self.ranks.items():
            if not isinstance(measured, Mapping):
                raise TypeError(f"ranks[{shorten(name)}] must be a mapping")
            for values in measured.values():
                if len(values) != count or not all(map(math.isfinite, map(_read_number, values))):
                    raise ValueError(
                        f"ranks[{shorten(name)}] must hold {count} finite numbers, one per layer"
                    )

    def _check_score_weights(self) -> None:
        """Raise TypeError or ValueError if the weights are not one positive number for each head of each layer."""
        found = self.score_weights
        if not isinstance(found, Mapping):
            raise TypeError(f"score_weights is {shorten(found)}, it must be a mapping")
        if not found:
            return
        rows, count = found.get("weights"), len(self.layer_indices)
        if not isinstance(found.get("selector"), str):
            raise TypeError(f"score_weights names {shorten(found.get('selector'))}, it must name a selector")
        if not isinstance(rows, list | tuple) or len(rows) != count or not all(rows):
            raise ValueError(f"score_weights must hold {count} lists of numbers, one per layer")
        numbers = [_read_number(value) for row in rows for value in row]
        # Within these bounds no product with a score overflows or vanishes.
        if not all(1e-6 <= value <= 1e6 for value in numbers):
            raise ValueError("score_weights must hold numbers from 1e-6 to 1e6")

    def _check(self) -> None:
        count, ratios = len(self.layer_indices), self.ratios
        indices = list(self.layer_indices)
        if indices and (indices != sorted({*indices}) or not 0 <= indices[0] <= indices[-1] < _MOST_LAYERS):
            raise ProfileError(
                f"layer_indices is {shorten(indices)}, but must ascend from 0 or more and stay below {_MOST_LAYERS:,}; "
                "calibrate again."
            )
        if not 0 < self.base_ratio <= 1:
            raise ProfileError(
                f"base_ratio is {self.base_ratio!r}, but must be a fraction of the cache in (0, 1]; calibrate again."
            )
        if (
            count == 0
            or not ratios
            or list(ratios) != sorted({*ratios})
            or not 0 < ratios[0] <= ratios[-1] < 1
        ):
            raise ProfileError(
                f"a profile needs at least one layer and ascending ratios in (0, 1), got {count} layers and ratios "
                f"{shorten(list(ratios))}; calibrate again."
            )
        for name in ("excess_loss", "divergence", "gain_loss", "gain_divergence"):
            values = getattr(self, name)
            if len(values) != count:
                raise ProfileError(
                    f"{name} has {len(values)} entries for {count} layers: the file is damaged; calibrate again."
                )
            if name in ("excess_loss", "divergence") and any(len(row) != len(ratios) for row in values):
                raise ProfileError(
                    f"{name} needs {len(ratios)} numbers per layer, one per ratio; calibrate again."
                )
        heads = [len(row) for row in self.head_gain_divergence]
        if heads and (len(heads) != count or 0 in heads):
            raise ProfileError(
                f"head_gain_divergence has {shorten(heads)} heads for {count} layers: it is damaged; calibrate again."
            )
        numbers = [*self.gain_loss, *self.gain_divergence, *self.weight_sample]
        tables = (self.excess_loss, self.divergence, self.head_gain_divergence)
        numbers += [value for rows in tables for row in rows for value in row]
        if not all(map(math.isfinite, numbers)):
            raise ProfileError(
                "a number of the profile is not finite; calibrate again, in float32 or bfloat16."
            )

    @property
    def key(self) -> str:
        """Digest of the model's shape, the key of known profiles."""
        return compute_shape_key(self.model)

    def check_model(
        self, model: Mapping[str, Any], weight_sample: Iterable[float], layers: list[int]
    ) -> None:
        """Check that the profile belongs to a model.

        Parameters
        ----------
        model : mapping
            Shape of the model.
        weight_sample : iterable of float
            Its sampled weights.
        layers : list of int
            Model indices of its compressible layers.

        Raises
        ------
        ProfileError
            If it belongs to another model; the message names the differences.
        """
        names = sorted({*self.model, *model})
        differing = [
            f"{name}: profile {shorten(self.model.get(name))}, model {shorten(model.get(name))}"
            for name in names
            if self.model.get(name) != model.get(name)
        ]
        if not differing and list(self.layer_indices) != list(layers):
            differing = [f"compressible layers: profile {list(self.layer_indices)}, model {list(layers)}"]
        if not differing:
            sample = [float(value) for value in weight_sample]
            scale = max((abs(value) for value in self.weight_sample), default=0.0)
            same = len(sample) == len(self.weight_sample) and all(
                abs(a - b) <= _WEIGHT_TOLERANCE * scale
                for a, b in zip(sample, self.weight_sample, strict=True)
            )
            if not same:
                differing = ["the shape is the same but the weights differ"]
        if differing:
            raise ProfileError(
                f"the profile{f' of {self.name}' if self.name else ''} belongs to another model: "
                f"{'; '.join(differing)}; use profile=None, or calibrate this model (rankkv calibrate)."
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the profile as plain JSON types, with format and version."""
        record = {"format": FORMAT, "version": VERSION, **json.loads(json.dumps(asdict(self)))}
        for name in ("query_centres", "score_weights", "loss_curves"):
            # Few profiles have them.
            if not record[name]:
                del record[name]
        return record

    @classmethod
    def from_dict(cls, record: Any) -> RankProfile:
        """Build a profile from a record of `to_dict`.

        Raises
        ------
        ProfileError
            If the record is not a profile, or has a version that this library does not know.
        """
        if not isinstance(record, Mapping) or record.get("format") != FORMAT:
            raise ProfileError("this is not a RankKV profile: give a file that RankProfile.save() wrote.")
        if record.get("version") != VERSION:
            raise ProfileError(
                f"the profile has version {shorten(record.get('version'))} but this RankKV reads version {VERSION}: "
                "calibrate again, or use the RankKV that wrote it."
            )
        fields = {name: value for name, value in record.items() if name not in ("format", "version")}
        try:
            return cls(**fields)
        except ProfileError:
            raise
        except TypeError as error:
            raise ProfileError(f"the profile is not well-formed ({error}); calibrate again.") from error

    def save(self, path: str | Path) -> Path:
        """Write the profile as JSON, atomically, and return the path."""
        return write_text_atomically(path, dump_json(self.to_dict()))

    @classmethod
    def load(cls, path: str | Path) -> RankProfile:
        """Read a profile; neither torch nor a model is needed.

        Raises
        ------
        SourceUnavailableError
            If the file cannot be read.
        ProfileError
            If it does not hold a profile.
        """
        file = Path(path).expanduser()
        try:
            size = file.stat().st_size
            text = file.read_text(encoding="utf-8") if size <= SIZE_LIMIT else ""
        except (OSError, UnicodeDecodeError) as error:
            raise SourceUnavailableError(f"cannot read a profile from {str(path)!r}: {error}.") from error
        if size > SIZE_LIMIT:
            raise ProfileError(
                f"{str(path)!r} has {size:,} bytes, a profile has at most {SIZE_LIMIT:,}: give the path of a profile."
            )
        try:
            record = parse_json(text)
        except ValueError as error:
            raise ProfileError(f"{str(path)!r} is not JSON ({error}): give the path of a profile.") from error
        try:
            return cls.from_dict(record)
        except ProfileError as error:
            raise ProfileError(f"{str(path)!r}: {error}") from error

    @classmethod
    def calibrate(cls, model: Any, tokenizer: Any = None, texts: Any = None, **options: Any) -> RankProfile:
        """Measure a profile of ``model``; see :func:`rankkv.calibrate` for all options.

        Parameters
        ----------
        model : PreTrainedModel
            A causal language model.
        tokenizer : PreTrainedTokenizerBase, optional
            Needed for texts that are strings.
        texts : sequence of str or Tensor
            Strings, or token ids ``[token]`` or ``[1, token]``.
        **options
            Such as the tokens of context and continuation, the ratios, the selector and a file to resume from.
        """
        # The root resolves names on use: calibration runs caches and stands above this package.
        import rankkv

        return rankkv.calibrate(model, tokenizer, texts, **options)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload the profile, as JSON, to a hub repository and return the commit's address.

        Parameters
        ----------
        repo_id : str
            "organisation/name" of a model repository, created if it does not exist.
        **options
            ``private`` for a new repository, and options of ``huggingface_hub.HfApi.upload_file``, such as ``token``,
            ``revision`` or ``create_pr``.

        Raises
        ------
        InputError
            If ``repo_id`` cannot be a hub id.
        SourceUnavailableError
            If the hub cannot be reached, or refuses the upload.
        """
        require("huggingface_hub", "pip install huggingface_hub", "pushing a profile")
        return push_file(repo_id, HUB_FILE, dump_json(self.to_dict()).encode(), **options)

    @classmethod
    def pull_from_hub(cls, repo_id: str, **options: Any) -> RankProfile:
        """Download a profile that `push_to_hub` uploaded.

        If the hub cannot be reached, an earlier download is used.

        Parameters
        ----------
        repo_id : str
            "organisation/name".
        **options
            Options of ``huggingface_hub.hf_hub_download``, such as ``token`` or ``revision``.

        Raises
        ------
        SourceUnavailableError
            If the hub cannot be reached and nothing was downloaded before, or the repository holds no profile.
        ProfileError
            If the downloaded file is not a profile.
        """
        require("huggingface_hub", "pip install huggingface_hub", "pulling a profile")
        return cls.load(pull_file(repo_id, HUB_FILE, **options))


def _read_number(value: Any) -> float:
    """Return a number as a float; TypeError for a text or a truth value, which ``float`` would take."""
    if isinstance(value, str | bytes | bool):
        raise TypeError(f"{shorten(value)} is not a number")
    return float(value)


def compute_shape_key(model: Mapping[str, Any]) -> str:
    """Compute the digest of a model's shape, 16 hexadecimal digits.

    Examples
    --------
    >>> len(compute_shape_key({"num_hidden_layers": 2}))
    16
    """
    return hashlib.sha256(json.dumps(dict(model), sort_keys=True, default=str).encode()).hexdigest()[:16]


def check_profile(value: Any) -> Any:
    """Check the option ``profile`` and return "auto", None or a `RankProfile`.

    Paths and records are loaded.

    Raises
    ------
    ProfileError, SourceUnavailableError
        As `RankProfile.load` and `RankProfile.from_dict`.
    InputError
        If the value is of another type.
    """
    if value is None or isinstance(value, RankProfile) or value == "auto":
        return value
    if isinstance(value, str | Path):
        return RankProfile.load(value)
    if isinstance(value, Mapping):
        return RankProfile.from_dict(value)
    raise InputError(f"profile={value!r} must be 'auto', None, a RankProfile, or the path of a saved one.")
