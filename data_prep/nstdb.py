"""MIT-BIH Noise Stress Test Database: the three recordings of noise, whole."""

from collections.abc import Iterator

import numpy as np
import tensorflow_datasets as tfds

from data_prep import physionet, shards


class Nstdb(shards.Builder):
    """Writes splits `bw` (baseline wander), `em` (electrode motion), `ma` (muscle artefact), one example in each.

    `signal` int16 [L, 2] holds the file's ADC integers, both channels at 360 Hz; mV = (signal - baseline) / gain.
    The database's ECG records with noise added are not read.
    """

    DATABASE = physionet.DATABASES["nstdb"]
    VERSION = tfds.core.Version(DATABASE.version)
    DESCRIPTION = "Recordings of noise from electrodes on active people (360 Hz, two channels, ADC units)."
    CITATION = (
        "Moody GB, Muldrow WE, Mark RG. A noise stress test for arrhythmia detectors. "
        "Computers in Cardiology 11:381-384 (1984)."
    )
    FEATURES = {
        "signal": tfds.features.Tensor(shape=(None, 2), dtype=np.int16, encoding="bytes"),
        "gain": tfds.features.Tensor(shape=(2,), dtype=np.float32),
        "baseline": tfds.features.Tensor(shape=(2,), dtype=np.int32),
        "record": tfds.features.Text(),
    }

    def split_records(self) -> dict[str, list[str]]:
        """Makes each record a split."""
        return {record: [record] for record in self.copy.records}

    def read_examples(self, record: str) -> Iterator[dict]:
        """Reads one recording."""
        header = physionet.read_record(self.copy, record)
        yield {
            "signal": header.d_signal,
            "gain": np.array(header.adc_gain, np.float32),
            "baseline": np.array(header.baseline, np.int32),
            "record": record,
        }
