"""Figures: what is drawn, that a file appears whole or not at all, and what is refused."""

import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure

from ralenet_jax import plots

CHECKOUT = Path(__file__).parents[1]
HISTORY = [
    {"step": 5, "train/loss": 0.5, "train/snr_db": 3.0},
    {"step": 10, "validation/epoch": 1, "validation/snr_db": 8.0},
    {"step": 20, "validation/epoch": 2, "validation/snr_db": 11.25},
    {"step": 30, "validation/epoch": 3, "validation/snr_db": 11.0},
]


@pytest.fixture
def figures(monkeypatch):
    """Collects the figures that are drawn."""
    drawn = []

    class Kept(Figure):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            drawn.append(self)

    monkeypatch.setattr(plots, "Figure", Kept)
    return drawn


def windows():
    clean = np.random.default_rng(0).normal(size=(3, 256, 2))
    # 1/10 and 1/1000 of the power: 10 and 30 dB
    return clean * (1 + np.sqrt(0.1)), clean * (1 - np.sqrt(0.001)), clean


def test_windows_are_drawn_with_time_names_and_ratios(figures, tmp_path):
    noisy, denoised, clean = windows()
    path = plots.windows_figure(
        tmp_path / "deep" / "windows.png", noisy, denoised, clean, 128, leads=["MLII", "V1"], titles=["a", "b-1", "c"]
    )
    assert path == tmp_path / "deep" / "windows.png"
    assert matplotlib.image.imread(path).std() > 0.01
    (figure,) = figures
    assert len(figure.axes) == 6
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["noisy", "clean", "denoised"]
    for index, panel in enumerate(figure.axes):
        row, column = divmod(index, 2)
        lines = {line.get_label(): line for line in panel.lines}
        for name, array in (("noisy", noisy), ("denoised", denoised), ("clean", clean)):
            np.testing.assert_array_equal(lines[name].get_ydata(), array[row, :, column])
        assert lines["clean"].get_xdata()[-1] == 255 / 128
        assert panel.get_title(loc="right") == ["MLII", "V1"][column]
    assert figure.axes[2].get_title(loc="left") == "b-1: SNR 10.0 → 30.0 dB"
    assert figure.axes[2].get_ylabel() == "mV"
    assert figure.axes[4].get_xlabel() == "time in s"


def test_perfect_and_hopeless_windows_can_be_drawn(figures, tmp_path):
    _, _, clean = windows()
    plots.windows_figure(tmp_path / "windows.png", clean * 3, clean, clean)
    assert figures[0].axes[0].get_title(loc="left") == "window 1: SNR −6.0 → inf dB"


@pytest.mark.parametrize(
    ("shapes", "names", "message"),
    [
        (((2, 256, 2), (2, 256, 2), (2, 255, 2)), {}, "expected one"),
        (((2, 256, 2), (1, 256, 2), (2, 256, 2)), {}, "expected one"),
        (((256, 2),) * 3, {}, "expected one"),
        (((0, 256, 2),) * 3, {}, "expected one"),
        (((2, 256, 2),) * 3, {"leads": ["II"]}, "2 titles, 1 leads; expected 2 and 2"),
        (((2, 256, 2),) * 3, {"titles": ["one"]}, "1 titles, 2 leads; expected 2 and 2"),
    ],
)
def test_windows_that_do_not_fit_together_are_refused(tmp_path, shapes, names, message):
    with pytest.raises(ValueError, match=message):
        plots.windows_figure(tmp_path / "windows.png", *map(np.ones, shapes), **names)
    assert list(tmp_path.iterdir()) == []


def test_learning_curve_shows_the_validations_and_the_best(figures, tmp_path):
    path = plots.learning_curve(tmp_path / "curve.png", HISTORY)
    assert matplotlib.image.imread(path).std() > 0.01
    (panel,) = figures[0].axes
    curve, best = panel.lines
    np.testing.assert_array_equal(curve.get_xydata(), [[1, 8.0], [2, 11.25], [3, 11.0]])
    np.testing.assert_array_equal(best.get_xydata(), [[2, 11.25]])
    assert best.get_label() == "best: 11.25 dB, epoch 2"
    assert panel.get_xlabel() == "epoch"
    assert panel.get_ylabel() == "validation SNR in dB"


def test_a_history_without_validation_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no validation among 1 lines"):
        plots.learning_curve(tmp_path / "curve.png", HISTORY[:1])


def test_a_drawing_that_fails_leaves_the_old_file(monkeypatch, tmp_path):
    path = plots.learning_curve(tmp_path / "curve.png", HISTORY)
    old = path.read_bytes()

    def fail(canvas, file):
        Path(file).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(plots.FigureCanvasAgg, "print_png", fail)
    with pytest.raises(OSError, match="No space"):
        plots.learning_curve(path, HISTORY)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


def test_no_global_state_and_no_display(tmp_path):
    code = (
        "import sys\nfrom ralenet_jax import plots\n"
        "plots.learning_curve(sys.argv[1], [{'validation/epoch': 1, 'validation/snr_db': 2.0}])\n"
        "assert 'matplotlib.pyplot' not in sys.modules and 'jax' not in sys.modules"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "curve.png")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=CHECKOUT)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "curve.png").stat().st_size > 1000


def test_without_matplotlib_the_extra_is_named():
    code = "import sys; sys.modules['matplotlib.figure'] = None\nimport ralenet_jax.plots"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=CHECKOUT)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        'ImportError: figures need the library matplotlib; install it with: pip install "ralenet_jax[plots]"'
    )


def test_table_with_and_without_curves(tmp_path):
    columns, rows = ["bw −4 dB", "ma −4 dB"], {"dwt": ["−3.99", "–"], "dwt, published": ["1.00", "1.32"]}
    curves = {f"run {number}": [{"epoch": 1, "snr_db": 4.0}, {"epoch": 2, "snr_db": number}] for number in range(12)}
    bare = plots.table_figure(tmp_path / "bare.png", columns, rows, {})
    whole = plots.table_figure(tmp_path / "whole.png", columns, rows, curves)
    heights = [int.from_bytes(path.read_bytes()[20:24]) for path in (bare, whole)]  # PNG: the height is at byte 20
    assert heights[1] > heights[0] + 300
