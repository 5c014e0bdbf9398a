"""Which channels are ECG."""

import pytest

from ralenet_jax.readers_recording import find_leads


@pytest.mark.parametrize(
    "name", ["EEG Fpz-Cz", "C3-A2", "EOG horizontal", "EMG submental", "SpO2", "RESP", "Abdomen", "ART"]
)
def test_names_that_are_no_lead(name):
    names = ["ECG", "aVR", "MLII", "V5", "ECG X-lead", "C4", "CM5", "noise1", name]
    assert find_leads(names, ["uV"] * 9) == tuple(range(8))


def test_units_that_are_no_lead():
    units = ["mV", "", "mmHg", "adu", "%", "µV", "μV", "V", "l/min"]
    assert find_leads(["X"] * 9, units) == (0, 1, 3, 5, 6, 7)
    assert find_leads(["Pressure"], ["mmHg"]) == ()
