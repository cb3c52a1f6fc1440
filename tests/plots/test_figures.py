"""Figures: their data, names, ticks, and files for light and dark pages."""

from __future__ import annotations

import ast
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from rankkv.errors import InputError, OutputError
from rankkv.evaluation.statistics import Estimate
from rankkv.pipeline import RankKVResult
from rankkv.plots import (
    name_method,
    name_methods,
    plot_cache_comparison,
    plot_kept_stretches,
    plot_layer_ranks,
    plot_pairs,
    plot_quality,
    plot_ranks_and_budgets,
    plot_recall_grids,
    plot_strategy_budgets,
    save_figure,
)
from rankkv.plots.names import BUDGETS, SELECTORS
from rankkv.plots.style import DARK, format_tick

ROOT = Path(__file__).resolve().parents[2]


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


def test_a_stem_gives_png_for_light_and_dark_pages_and_pdf(result, tmp_path):
    figure = result.plot(tmp_path / "new folder" / "rank_0.3")
    files = sorted(path.name for path in (tmp_path / "new folder").iterdir())
    assert files == ["rank_0.3-dark.png", "rank_0.3.pdf", "rank_0.3.png"]
    inches = figure.get_size_inches()
    for name in ("rank_0.3.png", "rank_0.3-dark.png"):
        assert read_png_size(tmp_path / "new folder" / name) == (int(150 * inches[0]), int(150 * inches[1]))
    assert (tmp_path / "new folder" / "rank_0.3.pdf").read_bytes().startswith(b"%PDF-")


def test_same_data_gives_the_same_bytes(result, tmp_path):
    for folder in ("a", "b"):
        plot_ranks_and_budgets(result, tmp_path / folder / "figure")
    for name in ("figure.png", "figure-dark.png", "figure.pdf"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def read_pixels(path):
    from PIL import Image

    return np.asarray(Image.open(path).convert("RGBA")).reshape(-1, 4).astype(int)


def test_dark_variant_is_light_ink_on_nothing(result, tmp_path):
    plot_ranks_and_budgets(result, tmp_path / "figure")
    light, dark = (read_pixels(tmp_path / name) for name in ("figure.png", "figure-dark.png"))
    assert (light[:, 3] == 255).all()
    assert (light[:, :3].min(axis=1) > 250).mean() > 0.4
    assert (dark[:, 3] == 0).mean() > 0.4
    # Nothing that is drawn is as dark as the page.
    assert dark[dark[:, 3] > 200, :3].max(axis=1).min() > 60
    bar = [int(DARK["#0072b2"][place : place + 2], 16) for place in (1, 3, 5)]
    assert (np.abs(dark[:, :3] - bar).max(axis=1) < 6).mean() > 0.02


def test_a_figure_has_its_own_colours_again_after_it_was_saved(tmp_path):
    scores = [Estimate(2.0, 1.5, 3.0, 8), Estimate(1.0, 0.5, 1.25, 8)]
    figure = plot_quality({"one": {"a": list(zip([0.1, 0.4], scores, strict=True))}}, [0.75])
    for name in ("a", "b"):
        save_figure(figure, tmp_path / name)
    for ending in (".png", "-dark.png"):
        assert (tmp_path / f"a{ending}").read_bytes() == (tmp_path / f"b{ending}").read_bytes()


def test_path_with_an_ending_gives_that_file_only(result, tmp_path):
    assert save_figure(plot_ranks_and_budgets(result), tmp_path / "one.pdf") == [tmp_path / "one.pdf"]
    assert [path.name for path in tmp_path.iterdir()] == ["one.pdf"]


@pytest.mark.parametrize(
    ("ticks", "written"),
    [
        ([0.0, 0.025, 0.05, 0.075], ["0.000", "0.025", "0.050", "0.075"]),
        ([0.0, 0.1, 0.2, 0.30000000000000004], ["0.0", "0.1", "0.2", "0.3"]),
        ([0.0, 500.0, 1000.0], ["0", "500", "1,000"]),
        ([-0.5, -0.0, 0.5], ["-0.5", "0.0", "0.5"]),
    ],
)
def test_ticks_are_written_exactly(ticks, written):
    assert [format_tick(tick, ticks) for tick in ticks] == written


def test_tick_labels_of_small_values_are_the_ticks():
    scores = [Estimate(0.21, 0.18, 0.243, 8), Estimate(0.016, 0.012, 0.02, 8)]
    figure = plot_quality({"one": {"a": list(zip([0.05, 0.3], scores, strict=True))}})
    figure.draw_without_rendering()
    (axes,) = figure.axes
    for tick, label in zip(axes.get_yticks(), axes.get_yticklabels(), strict=True):
        assert float(label.get_text()) == pytest.approx(tick, abs=1e-12)


def test_every_registered_method_has_a_name_for_readers():
    from rankkv.budget.strategies import STRATEGIES
    from rankkv.evaluation.settings import NAMED_STRATEGIES
    from rankkv.selection import SELECTORS as REGISTERED

    assert set(SELECTORS) >= set(REGISTERED)
    assert set(BUDGETS) >= {*NAMED_STRATEGIES, "uniform", "pyramid", "cake", "lava"} & {
        *STRATEGIES,
        *NAMED_STRATEGIES,
    }
    assert name_method("snapkv + default") == "SnapKV + RankKV (default)"
    assert name_method("mine + default") == "mine + default"
    twice = ["snapkv + default", "snapkv + distortion", "h2o + auto"]
    assert list(name_methods(twice).values()) == [*twice[:2], "H2O + RankKV (with profile)"]


def test_plots_import_nothing_of_the_house_but_its_errors_and_its_writer():
    for path in (ROOT / "rankkv" / "plots").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level > 1:
                assert node.module in ("errors", "utils.files"), path
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not [name for name in names if name.startswith("rankkv")], path


def test_unwritable_place_is_an_input_error(result, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        plot_ranks_and_budgets(result, tmp_path / "file" / "figure")


def test_layer_ranks_have_their_intervals():
    mean, low, high, layers = [3.0, 7.0, 5.0], [2.5, 7.0, 3.0], [3.25, 7.0, 6.0], [0, 1, 2]
    (axes,) = plot_layer_ranks(mean, low, high, layers).axes
    (container,) = axes.containers
    line, _, (bars,) = container
    np.testing.assert_allclose(line.get_xydata(), np.column_stack([layers, mean]))
    spans = [(segment[0, 1], segment[1, 1]) for segment in bars.get_segments()]
    np.testing.assert_allclose(spans, list(zip(low, high, strict=True)))


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


def test_pairs_stand_on_their_lines_with_their_intervals():
    panels = {
        "loss": {"one": {"a": Estimate(2.0, 1.5, 3.0, 8), "b": Estimate(1.0, 0.5, 1.25, 8)}},
        "found": {"one": {"a": Estimate(0.5, 0.25, 0.75, 8), "b": Estimate(1.0, 1.0, 1.0, 8)}},
    }
    figure = plot_pairs(panels, "Pairs\nof two", full={"found": 0.9})
    for axes, scores in zip(figure.axes, panels.values(), strict=True):
        for container, score in zip(axes.containers, scores["one"].values(), strict=True):
            line, _, (bars,) = container
            assert line.get_xdata()[0] == score.mean
            (segment,) = bars.get_segments()
            np.testing.assert_allclose(segment[:, 0], (score.low, score.high))
    assert any(set(line.get_xdata()) == {0.9} for line in figure.axes[1].lines)


def test_committed_method_figure_shows_at_most_sixty_numbers(tmp_path, monkeypatch):
    pytest.importorskip("pyarrow")
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    import draw_figures
    from matplotlib.container import ErrorbarContainer

    from rankkv import plots

    drawn = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, stem: drawn.append(figure) or [])
    draw_figures.draw_rows("method_quality", draw_figures.method_quality.draw, ROOT / "results")
    (figure,) = drawn
    containers = [
        one for axes in figure.axes for one in axes.containers if isinstance(one, ErrorbarContainer)
    ]
    assert 0 < sum(len(one.lines[0].get_xdata()) for one in containers) <= 60
    assert {one.get_label() for one in containers} == {"Uniform", "RankKV (equal heads)"}


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
        (lambda: plot_layer_ranks([1.0], [0.0], [2.0], [0, 1]), "mean has 1 values for 2 layers"),
        (lambda: plot_layer_ranks([1.0], [1.5], [2.0], [3]), r"layer 3 has the interval \[1.5, 2\]"),
        (lambda: plot_pairs({"a": {"x": {}}, "b": {"y": {}}}, "none"), "the same lines"),
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
        "    plot_layer_ranks([1.0], [1.0], [1.0], [0])\n"
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
        "plot_layer_ranks([1.0, 2.0], [1.0, 1.5], [1.0, 2.5], [0, 1]).draw_without_rendering()\n"
        "print('matplotlib.pyplot' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
