"""MIT-BIH Arrhythmia Database: one example per annotated beat, and the recordings whole.

Records and their splits are those of de Chazal, O'Dwyer, Reilly, "Automatic classification of heartbeats using ECG
morphology and heartbeat interval features", IEEE Trans Biomed Eng 51(7):1196-1206 (2004), with one change: records
201 and 202 are one person, so 202 is in `ds1` with 201.
"""

from collections.abc import Iterator

import numpy as np
import tensorflow_datasets as tfds

from data_prep import physionet, shards, windows

DS1 = tuple("101 106 108 109 112 114 115 116 118 119 122 124 201 202 203 205 207 208 209 215 220 223 230".split())
DS2 = tuple("100 103 105 111 113 117 121 123 200 210 212 213 214 219 221 222 228 231 232 233 234".split())
PACED = tuple("102 104 107 217".split())


class Mitdb(shards.Builder):
    """Writes splits `ds1`, `ds2`, `paced`; `ds1+ds2+paced` is everything.

    `signal` int16 [256, 2] holds the file's ADC integers, both leads in the file's order at 360 Hz: nothing is lost,
    and mV = (signal - baseline) / gain. Beats whose window would leave the record are dropped.
    """

    DATABASE = physionet.DATABASES["mitdb"]
    VERSION = tfds.core.Version(DATABASE.version)
    DESCRIPTION = "Windows of 256 samples (360 Hz, two leads, ADC units) with an annotated beat at sample 128."
    CITATION = (
        "Moody GB, Mark RG. The impact of the MIT-BIH Arrhythmia Database. IEEE Eng in Med and Biol 20(3):45-50 (2001)."
    )
    FEATURES = {
        "signal": tfds.features.Tensor(shape=(windows.WIDTH, 2), dtype=np.int16, encoding="bytes"),
        "gain": tfds.features.Tensor(shape=(2,), dtype=np.float32),
        "baseline": tfds.features.Tensor(shape=(2,), dtype=np.int32),
        "record": tfds.features.Text(),
        "sample": tfds.features.Scalar(np.int32),
        "symbol": tfds.features.Text(),
        "leads": tfds.features.Tensor(shape=(2,), dtype=np.str_),
    }

    def split_records(self) -> dict[str, list[str]]:
        """Assigns records by name; one that no list holds is refused, not dropped in silence."""
        lists = {"ds1": DS1, "ds2": DS2, "paced": PACED}
        if unknown := set(self.copy.records) - {*DS1, *DS2, *PACED}:
            raise physionet.PrepareError(
                f"{self.DATABASE} in {self.copy.folder} has records {', '.join(sorted(unknown))}, which no split "
                "holds; use PhysioNet's records"
            )
        return {split: [record for record in self.copy.records if record in names] for split, names in lists.items()}

    def read_examples(self, record: str) -> Iterator[dict]:
        """Reads the windows of one record, one per beat that has room."""
        header = physionet.read_record(self.copy, record)
        annotation = physionet.read_annotation(self.copy, record)
        used = windows.is_beat(annotation.symbol) & windows.has_room(annotation.sample, len(header.d_signal))
        peaks = annotation.sample[used]
        symbols = np.array(annotation.symbol)[used]
        for window, peak, symbol in zip(windows.cut(header.d_signal, peaks), peaks, symbols, strict=True):
            yield {
                "signal": window,
                "gain": np.array(header.adc_gain, np.float32),
                "baseline": np.array(header.baseline, np.int32),
                "record": record,
                "sample": int(peak),
                "symbol": str(symbol),
                "leads": header.sig_name,
            }


class MitdbRecordings(Mitdb, skip_registration=True):
    """Writes the same splits with one example per recording: for windows that are not centred on a beat.

    `signal` int16 [N, 2] as in the windows, `beats` int32 [n] the samples of the annotated beats.
    """

    name = "mitdb_recordings"  # else TFDS takes the parent's
    DESCRIPTION = "Recordings of half an hour (360 Hz, two leads, ADC units) with the samples of their beats."
    FEATURES = {
        "signal": tfds.features.Tensor(shape=(None, 2), dtype=np.int16, encoding="bytes"),
        "gain": tfds.features.Tensor(shape=(2,), dtype=np.float32),
        "baseline": tfds.features.Tensor(shape=(2,), dtype=np.int32),
        "record": tfds.features.Text(),
        "beats": tfds.features.Tensor(shape=(None,), dtype=np.int32),
        "leads": tfds.features.Tensor(shape=(2,), dtype=np.str_),
    }

    def read_examples(self, record: str) -> Iterator[dict]:
        """Reads one recording."""
        header = physionet.read_record(self.copy, record)
        annotation = physionet.read_annotation(self.copy, record)
        yield {
            "signal": header.d_signal,
            "gain": np.array(header.adc_gain, np.float32),
            "baseline": np.array(header.baseline, np.int32),
            "record": record,
            "beats": annotation.sample[windows.is_beat(annotation.symbol)].astype(np.int32),
            "leads": header.sig_name,
        }
