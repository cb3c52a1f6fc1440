"""Figures hold the data they were given, and their files are whole."""

from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from rankkv.errors import InputError
from rankkv.evaluation.statistics import Estimate
from rankkv.pipeline import RankKVResult
from rankkv.plots import (
    plot_cache_comparison,
    plot_kept_stretches,
    plot_layer_ranks,
    plot_quality,
    plot_ranks_and_budgets,
    plot_recall_grids,
    plot_strategy_budgets,
    save_figure,
)


@pytest.fixture
def result() -> RankKVResult:
    # Layers with a gap, as a hybrid model has them.
    return RankKVResult(
        budgets=[40, 100, 60, 80],
        layer_ranks=[4.0, 10.5, 6.0, 8.25],
        layer_indices=[1, 3, 5, 7],
        total_budget=280,
        seq_len=100,
        compression_ratio=0.7,
        strategy="power",
        scope="evictable",
        aggregation="concat",
        model_name="tiny",
        strategy_options={"exponent": 4.0},
    )


def read_bars(axes):
    return {round(bar.get_x() + bar.get_width() / 2): bar.get_height() for bar in axes.patches}


def read_png_size(path: Path) -> tuple[int, int]:
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    assert content.rstrip().endswith(b"IEND\xaeB`\x82")
    return struct.unpack(">II", content[16:24])


def test_ranks_and_budgets_stand_over_their_layers(result):
    upper, lower = plot_ranks_and_budgets(result).axes
    assert read_bars(upper) == dict(zip(result.layer_indices, result.layer_ranks, strict=True))
    assert read_bars(lower) == dict(zip(result.layer_indices, result.budgets, strict=True))
    assert "tokens" in lower.get_ylabel()
    (average,) = lower.lines
    assert set(average.get_ydata()) == {70.0}


def test_result_plot_saves_png_and_pdf(result, tmp_path):
    figure = result.plot(tmp_path / "new folder" / "rank_0.3")
    files = sorted(path.name for path in (tmp_path / "new folder").iterdir())
    assert files == ["rank_0.3.pdf", "rank_0.3.png"]
    width, height = read_png_size(tmp_path / "new folder" / "rank_0.3.png")
    inches = figure.get_size_inches()
    assert (width, height) == (int(150 * inches[0]), int(150 * inches[1]))
    assert (tmp_path / "new folder" / "rank_0.3.pdf").read_bytes().startswith(b"%PDF-")


def test_same_data_gives_the_same_bytes(result, tmp_path):
    for folder in ("a", "b"):
        plot_ranks_and_budgets(result, tmp_path / folder / "figure")
    for name in ("figure.png", "figure.pdf"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_path_with_an_ending_gives_that_file_only(result, tmp_path):
    assert save_figure(plot_ranks_and_budgets(result), tmp_path / "one.pdf") == [tmp_path / "one.pdf"]
    assert [path.name for path in tmp_path.iterdir()] == ["one.pdf"]


def test_unwritable_place_is_an_input_error(result, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write the figure"):
        plot_ranks_and_budgets(result, tmp_path / "file" / "figure")


def test_layer_ranks_have_error_bars_of_one_standard_deviation():
    mean, std, layers = [3.0, 7.0, 5.0], [0.5, 0.0, 1.5], [0, 1, 2]
    (axes,) = plot_layer_ranks(mean, std, layers).axes
    (container,) = axes.containers
    line, _, (bars,) = container
    np.testing.assert_allclose(line.get_xydata(), np.column_stack([layers, mean]))
    spans = [(segment[0, 1], segment[1, 1]) for segment in bars.get_segments()]
    np.testing.assert_allclose(spans, [(m - s, m + s) for m, s in zip(mean, std, strict=True)])


@pytest.mark.parametrize("count", [1, 2, 6, 7])
def test_one_panel_a_strategy(count):
    budgets = {f"strategy {i}": [10 + i, 20, 30 - i] for i in range(count)}
    figure = plot_strategy_budgets(budgets, [0, 1, 2])
    panels = [axes for axes in figure.axes if axes.get_visible()]
    assert {axes.get_title(loc="left"): list(read_bars(axes).values()) for axes in panels} == budgets
    assert len({axes.get_ylim() for axes in panels}) == 1


def test_cache_comparison_shows_megabytes_seconds_and_milliseconds():
    runs = [
        {"name": "full", "cache_bytes": 2_000_000, "ttft_seconds": 1.5, "tpot_seconds": 0.02},
        {"name": "half", "cache_bytes": 1_000_000, "ttft_seconds": 1.75, "tpot_seconds": 0.0},
    ]
    figure = plot_cache_comparison(runs)
    widths = {axes.get_title(loc="left"): [bar.get_width() for bar in axes.patches] for axes in figure.axes}
    assert list(widths) == ["KV cache (MB)", "Time to first token (s)", "Time per output token (ms)"]
    np.testing.assert_allclose(list(widths.values()), [[2.0, 1.0], [1.5, 1.75], [20.0, 0.0]])


def test_quality_has_a_line_a_method_with_its_intervals():
    scores = [Estimate(2.0, 1.5, 3.0, 8), Estimate(1.0, 0.5, 1.25, 8)]
    figure = plot_quality(
        {"one\nloss": {"a": list(zip([0.1, 0.4], scores, strict=True))}, "two": {}}, [0.75, None]
    )
    axes = next(axes for axes in figure.axes if axes.get_title(loc="left") == "one\nloss")
    (container,) = axes.containers
    line, _, (bars,) = container
    np.testing.assert_allclose(line.get_xydata(), [[0.1, 2.0], [0.4, 1.0]])
    np.testing.assert_allclose([(s[0, 1], s[1, 1]) for s in bars.get_segments()], [(1.5, 3.0), (0.5, 1.25)])
    assert any(set(line.get_ydata()) == {0.75} for line in axes.lines)


def test_maps_hold_the_shares_they_were_given():
    grids = {"a": {(0.0, 512): 1.0, (0.5, 512): 0.0, (0.0, 1024): 0.25}, "b": {(0.5, 1024): 0.5}}
    figure = plot_recall_grids(grids, "Facts")
    images = [axes.images[0].get_array().filled(np.nan) for axes in figure.axes if axes.images]
    np.testing.assert_array_equal(images[0], [[1.0, 0.25], [0.0, np.nan]])
    np.testing.assert_array_equal(images[1], [[np.nan, np.nan], [np.nan, 0.5]])
    shares = {"a": [[0.0, 1.0], [0.5, 0.25]]}
    (image,) = [axes.images[0] for axes in plot_kept_stretches(shares, [1, 3], "Kept").axes if axes.images]
    np.testing.assert_array_equal(image.get_array(), shares["a"])


def test_texts_stay_inside_the_figure(result):
    long_name = RankKVResult(**{**result.to_dict(), "model_name": "/some/where/" + "deep/" * 40 + "model"})
    figure = plot_ranks_and_budgets(long_name)
    figure.draw_without_rendering()
    frame = figure.bbox
    boxes = [
        text.get_window_extent()
        for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))
        if text.get_visible() and text.get_text().strip()
    ]
    assert boxes
    for box in boxes:
        assert box.x0 >= frame.x0 - 1
        assert box.x1 <= frame.x1 + 1


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: plot_layer_ranks([1.0], [0.0, 0.0], [0, 1]), "mean has 1 values for 2 layers"),
        (lambda: plot_strategy_budgets({}, [0]), "at least one strategy"),
        (lambda: plot_strategy_budgets({"uniform": [1, 2]}, [0]), "uniform has 2 values for 1 layers"),
        (lambda: plot_cache_comparison([]), "at least one generation"),
        (lambda: plot_quality({}), "at least one task"),
        (lambda: plot_recall_grids({}, "none"), "at least one setting"),
        (lambda: plot_kept_stretches({"a": [[1.0]]}, [0, 1], "one too few"), "each with 2 layers"),
    ],
)
def test_data_that_does_not_fit_is_named(draw, message):
    with pytest.raises(InputError, match=message):
        draw()


def test_missing_matplotlib_is_one_command(tmp_path):
    # An interpreter in which matplotlib cannot be found: a finder that answers first, and says no.
    script = (
        "import importlib.util, sys\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *rest: None if name == 'matplotlib' else find(name, *rest)\n"
        "from rankkv.errors import MissingDependencyError\n"
        "from rankkv.plots import plot_layer_ranks\n"
        "try:\n"
        "    plot_layer_ranks([1.0], [0.0], [0])\n"
        "except MissingDependencyError as error:\n"
        "    print(error)\n"
        "assert 'matplotlib' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert 'pip install "rankkv[plots]"' in done.stdout


def test_drawing_leaves_pyplot_alone(result):
    script = (
        "import sys\n"
        "from rankkv.plots import plot_layer_ranks\n"
        "plot_layer_ranks([1.0, 2.0], [0.0, 0.5], [0, 1]).draw_without_rendering()\n"
        "print('matplotlib.pyplot' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
