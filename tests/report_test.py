"""The page and the figure of one denoised recording: what they hold, nothing from outside, what is refused."""

import base64
import html.parser
import json
import os
import re
import shutil
import subprocess
import sys

import matplotlib.figure
import matplotlib.image
import numpy as np
import pytest

from ralenet_jax import report
from ralenet_jax.errors import UserError

RATE = 100
GAP = -32768


class Page(html.parser.HTMLParser):
    """A parsed page: its tags, the attributes, the text that is read, the scripts."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.attributes, self.text, self.scripts = [], [], "", []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        self.data = json.loads(self.scripts[0])

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        if self.tags[-1:] == ["script"] and len(self.scripts) < self.tags.count("script"):
            self.scripts.append(data)
        elif self.tags[-1:] != ["style"]:
            self.text += " ".join(data.split()) + " "


def recording(seconds=30, leads=2):
    """A recording of which the samples differ, with a gap in the first lead's first second."""
    generator = np.random.default_rng(0)
    after = generator.normal(size=(seconds * RATE, leads)).cumsum(axis=0) * 0.05 + [[3.0] + [-1.0] * (leads - 1)]
    after[20:50, 0] = np.nan
    return {
        "title": "100.dat",
        "sampling_rate": RATE,
        "names": [f"lead {number}" for number in range(1, leads + 1)],
        "units": ["mV"] * leads,
        "before": after + generator.normal(size=after.shape) * 0.1,
        "after": after,
        "beats": np.arange(60, seconds * RATE, 80),
    }


def integers(text, dtype="<i2"):
    return np.frombuffer(base64.b64decode(text, validate=True), dtype)


def decoded(trace):
    levels = integers(trace["data"])
    return np.where(levels == GAP, np.nan, trace["offset"] + trace["step"] * levels.astype(float))


def test_the_page_holds_the_traces_to_half_a_step_with_their_gaps(tmp_path):
    arguments = recording()
    path = report.write(tmp_path / "deep" / "out.html", **arguments)
    assert path == tmp_path / "deep" / "out.html"
    assert os.listdir(path.parent) == ["out.html"]
    data = Page(path).data
    assert (data["rate"], data["length"], data["per_bin"]) == (RATE, 3000, 1)
    np.testing.assert_array_equal(integers(data["beats"], "<i4"), arguments["beats"])
    for number, lead in enumerate(data["leads"]):
        assert (lead["name"], lead["unit"]) == (f"lead {number + 1}", "mV")
        assert set(lead["traces"]) == {"before", "after"}
        for name, trace in lead["traces"].items():
            expected = arguments[name][:, number]
            assert trace["step"] == pytest.approx((np.nanmax(expected) - np.nanmin(expected)) / 65534)
            np.testing.assert_allclose(decoded(trace), expected, rtol=0, atol=trace["step"] * 0.5001)
    assert np.isnan(decoded(data["leads"][0]["traces"]["after"])).sum() == 30


def test_a_flat_lead_and_one_without_samples_are_embedded(tmp_path):
    arguments = recording()
    arguments["before"][:, 0] = arguments["after"][:, 0] = 1.25
    arguments["before"][:, 1], arguments["after"][:, 1] = np.nan, np.inf
    page = Page(report.write(tmp_path / "out.html", **arguments))
    flat, empty = (lead["traces"]["after"] for lead in page.data["leads"])
    np.testing.assert_array_equal(decoded(flat), np.full(3000, 1.25))
    assert set(integers(empty["data"])) == {GAP}
    assert "SNR before not known, removed 0 mV RMS" in page.text
    assert "SNR before not known, removed not known" in page.text


def test_the_header_tells_the_figures(tmp_path):
    arguments = recording()
    arguments["after"] = np.tile([[1.0, 5.0], [-1.0, 3.0]], (1500, 1))
    arguments["before"] = arguments["after"] + [0.1, 2.0]  # powers 1 and 1 against 0.01 and 4: 20 and −6.02 dB
    page = Page(report.write(tmp_path / "out.html", **arguments, notes=["Model ralenet.", "Second line."]))
    for text in (
        "100.dat", "Sampling rate 100 Hz", "Duration 0:00:30 (h:min:s)", "Leads lead 1, lead 2", "Units mV",
        "Beats 37 detected", "Heart rate 75 bpm on average; over spans of 10 s 75–75 bpm",
        "Model ralenet. Second line.",
        "SNR before ≈ 20.0 dB, removed 0.1 mV RMS", "SNR before ≈ −6.0 dB, removed 2 mV RMS",
        "Research software, not a medical device.",
    ):  # fmt: skip
        assert text in page.text
    assert page.tags.count("canvas") == 3
    assert ("aria-label", "lead 2: before, after and removed, in mV, over time") in page.attributes


def test_text_is_escaped_and_marks_are_not_filled_twice(tmp_path):
    evil = "<script>alert(1)</script>"
    arguments = recording() | {"title": f"a&b {evil} {{{{data}}}}", "names": [evil, '"><b>'], "units": ["<i>", "µV"]}
    page = Page(report.write(tmp_path / "out.html", **arguments, notes=[f"</ul>{evil}"]))
    plain = Page(report.write(tmp_path / "plain.html", **recording(), notes=["one"]))
    assert page.tags == plain.tags
    assert page.text.count(f"a&b {evil} {{{{data}}}}") == 2  # title and h1
    assert f"</ul>{evil}" in page.text
    assert [lead["name"] for lead in page.data["leads"]] == [evil, '"><b>']
    assert "<" not in page.scripts[0]
    assert ("aria-label", '"><b>: before, after and removed, in µV, over time') in page.attributes


def test_a_file_name_that_is_no_unicode_can_be_told(tmp_path):
    page = Page(report.write(tmp_path / "out.html", **recording() | {"title": os.fsdecode(b"\xff.dat")}))
    assert r"\udcff.dat" in page.text


def test_the_page_asks_for_nothing_from_outside(tmp_path):
    page = Page(report.write(tmp_path / "out.html", **recording()))
    source = page.source.replace(page.scripts[0], "")  # base64 may hold anything but a scheme
    assert not re.search(r"https?:|//[a-z]|url\(|@import|\bimport\b|fetch|XMLHttp|WebSocket|Worker", source)
    assert ":/" not in page.scripts[0]
    assert not {"src", "href", "srcset", "action", "data", "poster"} & {name for name, _ in page.attributes}
    assert not {"link", "iframe", "img", "object", "base"} & set(page.tags)
    (policy,) = (value for name, value in page.attributes if value and "default-src" in value)
    assert policy == "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'"


def test_what_the_script_looks_for_is_on_the_page(tmp_path):
    page = Page(report.write(tmp_path / "out.html", **recording()))
    ids = {value for name, value in page.attributes if name == "id"}
    wanted = set(re.findall(r'(?:\$|shown)\("(\w+)"\)', page.scripts[1]))
    assert {"traces", "overview", "paper"} <= wanted <= ids
    assert {"lead0", "lead1", "readout0", "readout1"} <= ids
    assert set(re.findall(r"var\(--(\w+)\)", page.source)) <= set(re.findall(r"--(\w+): ", page.source))


@pytest.mark.skipif(not shutil.which("node"), reason="needs node")
def test_the_script_is_javascript(tmp_path):
    (tmp_path / "page.js").write_text(Page(report.write(tmp_path / "out.html", **recording())).scripts[1])
    done = subprocess.run(["node", "--check", tmp_path / "page.js"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_half_an_hour_is_embedded_whole(tmp_path):
    signal = np.random.default_rng(0).normal(size=(30 * 60 * 360, 2))
    arguments = recording() | {"sampling_rate": 360, "before": signal, "after": signal * 0.5}
    path = report.write(tmp_path / "out.html", **arguments)
    assert path.stat().st_size < 7.1e6  # 648,000 samples, 2 leads, 2 traces, 2 bytes, 4/3 for base64: 6.9 MB
    assert '"per_bin": 1,' in path.read_text()


def test_a_long_recording_is_embedded_as_bins_and_says_so(tmp_path):
    signal = np.random.default_rng(0).normal(size=(2 * 3600 * 360 + 1, 2)).astype(np.float32)
    signal[1000:1100, 0] = np.nan
    arguments = recording() | {"sampling_rate": 360, "before": signal, "after": signal * 0.25}
    path = report.write(tmp_path / "out.html", **arguments)
    assert 15e6 < path.stat().st_size < 20e6
    page = Page(path)
    # 2,592,001 samples, 2 leads, 3 traces, 2 values, 2 bytes, 4/3 for base64: 82.9 MB, over 18 MB: 4.6
    assert page.data["per_bin"] == 5
    assert "the lowest and highest value of each 5 samples (0.014 s)" in page.text
    for number, factors in enumerate(({"before": 1, "after": 0.25, "removed": 0.75},) * 2):
        traces = page.data["leads"][number]["traces"]
        assert set(traces) == set(factors)
        for name, factor in factors.items():
            low, high = decoded(traces[name]).reshape(-1, 2).T
            assert len(low) == 518_401
            close = {"rtol": 0, "atol": traces[name]["step"] * 0.51}
            bins = signal[:-1, number].reshape(-1, 5) * factor
            there = ~np.isnan(bins).any(axis=1)
            np.testing.assert_allclose(low[:-1][there], bins[there].min(axis=1), **close)
            np.testing.assert_allclose(high[:-1][there], bins[there].max(axis=1), **close)
            np.testing.assert_allclose([low[-1], high[-1]], np.repeat(signal[-1, number] * factor, 2), **close)
    assert np.flatnonzero(np.isnan(decoded(page.data["leads"][0]["traces"]["before"])))[[0, -1]].tolist() == [400, 439]


def test_figures_worked_by_hand():
    # Powers: ±1 about 7 mV has 1; what is removed, 0.1 mV everywhere, 0.01: 20 dB. ±3 has 9, ±0.3 has 0.09: 20 dB.
    after = np.tile([[8.0, 3.0], [6.0, -3.0]], (1100, 1))
    before = after + np.tile([[0.1, 0.3], [0.1, -0.3]], (1100, 1))
    before[5], after[70] = np.nan, np.nan
    # 60 bpm to 10 s, then 120 to 20 s. Of the spans: 9 intervals in 9 s; 20 (one of them of 1 s) in 10.5 s; the
    # third holds the end of one interval only.
    beats = np.concatenate([np.arange(0, 1000, 100), np.arange(1000, 2001, 50)])
    figures = report.summary(before, after, RATE, beats)
    assert json.loads(json.dumps(figures, allow_nan=False)) == figures
    assert figures["beats"] == 31
    assert figures["leads"] == [
        {"snr_before_db": pytest.approx(20, abs=0.01), "removed_rms": pytest.approx(0.1)},
        {"snr_before_db": pytest.approx(20, abs=0.01), "removed_rms": pytest.approx(0.3)},
    ]
    expected = {"mean": 60 * 29 / 19, "min": 60.0, "max": 60 * 20 / 10.5}  # without the interval that has the gap
    assert figures["heart_rate_bpm"] == pytest.approx(expected)


def test_figures_that_are_not_known():
    after = np.tile([[1.0, 0.0, np.nan]], (500, 1))
    figures = report.summary(after + [0, 1, 0], after, RATE, np.array([70]))
    assert figures["leads"] == [
        {"snr_before_db": None, "removed_rms": 0.0},
        {"snr_before_db": None, "removed_rms": 1.0},
        {"snr_before_db": None, "removed_rms": None},
    ]
    assert figures["heart_rate_bpm"] is None
    after[100:200] = np.inf
    assert report.summary(after, after, RATE, np.array([50, 250]))["heart_rate_bpm"] is None  # a gap between the two
    rate = report.summary(after, after, RATE, np.array([250, 300]))["heart_rate_bpm"]
    assert rate == {"mean": 120.0, "min": 120.0, "max": 120.0}  # too short for spans
    assert report.summary(after, after, RATE, [])["beats"] == 0


@pytest.fixture
def figures(monkeypatch):
    """Collects the figures that are drawn."""
    drawn = []

    class Kept(matplotlib.figure.Figure):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            drawn.append(self)

    monkeypatch.setattr(matplotlib.figure, "Figure", Kept)
    return drawn


def test_the_figure_shows_the_noisiest_ten_seconds(figures, tmp_path):
    arguments = recording(seconds=40)
    arguments["before"][1500:2500] += np.tile([[1.0], [-1.0]], (500, 1))
    path = report.figure(tmp_path / "out.png", **arguments | {"title": "cost $5 and $6", "units": ["mV", "µV"]})
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert matplotlib.image.imread(path).std() > 0.01
    (figure,) = figures
    assert len(figure.axes) == 4
    lines = {line.get_label(): line for panel in figure.axes[2:] for line in panel.lines}
    assert lines["after"].get_xdata()[[0, -1]] == pytest.approx([15, 24.99], abs=0.2)
    start = round(lines["after"].get_xdata()[0] * RATE)
    before, after = (arguments[name][start : start + 1000, 1] for name in ("before", "after"))
    np.testing.assert_array_equal(lines["before"].get_ydata(), before)
    np.testing.assert_array_equal(lines["after"].get_ydata(), after)
    np.testing.assert_array_equal(lines["removed"].get_ydata(), before - after)
    np.testing.assert_allclose(lines["beats"].get_xdata() * RATE, np.arange(60, 4000, 80)[18:31])
    assert figure.axes[2].get_ylabel() == "lead 2\nµV"
    assert figure.get_suptitle().startswith(
        r"cost \$5 and \$6: the 10 s with the most removed noise; research software"
    )
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == ["before", "after", "beats", "removed"]


def test_the_figure_has_twelve_leads_at_most_and_takes_a_short_recording(figures, tmp_path):
    arguments = recording(seconds=2, leads=13)
    arguments["before"][:, 4] = np.nan
    report.figure(tmp_path / "out.png", **arguments | {"beats": []})
    assert len(figures[0].axes) == 24
    assert "the 2 s with the most removed noise, 12 of 13 leads" in figures[0].get_suptitle()


def test_without_matplotlib_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match=r'matplotlib; pip install "ralenet_jax\[plots\]"'):
        report.figure(tmp_path / "out.png", **recording())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("function", [report.write, report.figure])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"before": np.ones((3000, 1))}, r"before \(3000, 1\), after \(3000, 2\); expected one"),
        ({"before": np.ones(3000), "after": np.ones(3000)}, r"expected one \[L, leads\]"),
        ({"before": np.ones((0, 2)), "after": np.ones((0, 2))}, "not empty"),
        ({"names": ["II"]}, "1 names, 2 units; expected one each for 2 leads"),
        ({"units": ["mV"] * 3}, "2 names, 3 units"),
        ({"sampling_rate": 0}, "sampling rate 0; expected Hz, above 0"),
        ({"sampling_rate": float("nan")}, "sampling rate nan"),
        ({"beats": np.array([5, 3000])}, r"expected \[n\] samples from 0 to 2999"),
        ({"beats": np.array([-1])}, "samples from 0"),
        ({"beats": np.array([0.5])}, "beats float64"),
    ],
)
def test_what_does_not_fit_together_is_refused(tmp_path, function, change, message):
    with pytest.raises(UserError, match=message):
        function(tmp_path / "out", **recording() | change)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("function", [report.write, report.figure])
def test_what_cannot_be_written_leaves_nothing_behind(monkeypatch, tmp_path, function):
    (tmp_path / "file").write_text("old")
    with pytest.raises(UserError, match=r"file/out cannot be written \(.*\); name another file"):
        function(tmp_path / "file" / "out", **recording())

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report.os, "replace", fail)
    with pytest.raises(UserError, match=r"file cannot be written \(No space left on device\)"):
        function(tmp_path / "file", **recording())
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "old"
