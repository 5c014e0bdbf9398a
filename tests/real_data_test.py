"""The real databases: what is prepared from them, and that the honest protocol keeps training and test apart."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data_prep import prepare
from ralenet_jax import filters, input_pipeline, noise
from ralenet_jax.main import load_config

# de Chazal et al. (2004), with 202 moved to DS1 since 201 and 202 are one person.
_DS1 = set("101 106 108 109 112 114 115 116 118 119 122 124 201 202 203 205 207 208 209 215 220 223 230".split())
_DS2 = set("100 103 105 111 113 117 121 123 200 210 212 213 214 219 221 222 228 231 232 233 234".split())


@pytest.fixture(scope="module")
def prepared(physionet, tmp_path_factory):
    folder = tmp_path_factory.mktemp("real")
    prepare.prepare(folder, source=physionet, databases=("mitdb", "nstdb"))
    return folder


@pytest.fixture(scope="module")
def honest(prepared):
    return load_config("honest", [f"data.dir={str(prepared)!r}"])


def test_every_beat_is_there_and_the_content_is_pinned(prepared):
    mitdb, nstdb = (input_pipeline.open_shards(prepared, name) for name in ("mitdb", "nstdb"))
    counts = {name: split.num_examples for name, split in mitdb.info.splits.items()}
    assert counts == {"ds1": 53_607, "ds2": 47_558, "paced": 8_758}
    assert mitdb.info.metadata["digest"] == "c4f885a09ce2f365c0eb8f1b58b3ee7ae2f89af3aef658fe9881ab0fb1be064d"
    assert nstdb.info.metadata["digest"] == "781cae8bdd6060d38dd6a19e1e26c7d4bbcfb9d15864389ff79dba7ea8a32ad8"


def test_no_record_stands_in_both_training_and_test(honest):
    parts = {name: input_pipeline.read_split(honest, name) for name in ("train", "validation", "test")}
    records = {name: set(windows.record) for name, windows in parts.items()}
    assert records["validation"] == {"109", "116", "124", "205", "223"}
    assert records["train"] == _DS1 - records["validation"]
    assert records["test"] == _DS2
    ids = np.concatenate([windows.id for windows in parts.values()])
    assert len(ids) == len(set(ids.tolist())) == 53_607 + 47_558


def test_no_sample_of_noise_stands_in_both_training_and_test(honest):
    recordings = input_pipeline.read_noise(honest)
    assert recordings.shape == (3, 650_000, 2)
    length = recordings.shape[1]
    # Recordings whose value is the place of the sample (exact in float32): what is cut tells where it lay.
    place = jnp.broadcast_to(jnp.arange(length, dtype=jnp.float32)[None, :, None], (3, length, 2))
    used = {}
    for split in ("train", "validation", "test"):
        span = jnp.asarray(input_pipeline.noise_span(honest, split, length))
        cut = jax.vmap(lambda key, span=span: noise._noise_window(place, jnp.array([0.0, 1.0, 0.0]), span, key, 256))
        used[split] = np.unique(np.asarray(cut(jax.random.split(jax.random.key(0), 20_000))).astype(int))
    assert used["train"].max() < 325_000 and used["validation"].max() < 325_000 and used["test"].min() >= 325_000
    # Nearly all of each half is drawn, so the bounds above were put to the test.
    assert len(used["train"]) > 320_000 and len(used["test"]) > 320_000


def test_paper_windows_are_drawn_once_and_split(prepared):
    config = load_config("ralenet", [f"data.dir={str(prepared)!r}"])
    train, test = (input_pipeline.read_split(config, name) for name in ("train", "test"))
    assert (len(train), len(test)) == (8_000, 2_000)
    assert len(set(train.id.tolist()) | set(test.id.tolist())) == 10_000


@pytest.mark.slow
def test_wavelet_row_of_the_published_table(prepared):
    config = load_config("ralenet", [f"data.dir={str(prepared)!r}"])
    windows, recordings = input_pipeline.read_split(config, "train"), input_pipeline.read_noise(config)
    keys = noise.window_keys(jax.random.key(0), windows.id, None)
    mix = jax.jit(noise.mix, static_argnums=0)
    # RMSE at -4 dB; that of the noisy windows is sqrt(10^0.4) = 1.5849.
    for kind, published in {"bw": 1.5824, "ma": 1.5455, "em": 1.5811, "emb": 1.5786}.items():
        chosen = noise.condition(kind, -4.0, None, (0, recordings.shape[1]))
        mixture = jax.device_get(mix("paper", recordings, chosen, windows.millivolts(), keys))
        rmse = np.sqrt(np.square(filters.dwt(mixture.noisy) - mixture.clean).mean((1, 2)))
        # Other windows and other noise than the published ones; both means are of 8,000.
        chance = 3 * rmse.std() * np.sqrt(2 / len(rmse))
        assert abs(rmse.mean() - published) < chance, kind
