"""Twelve leads: convolutions around a trained, frozen RA-LENet on ludb, under the paper's protocol (emb, -4 dB).

It needs `model.base`, the work directory of that RA-LENet: mitdb, the same noise.
"""

import ml_collections

from configs import ralenet


def get_config() -> ml_collections.ConfigDict:
    """Returns the default configuration for twelve leads; `model.base` is still to be set."""
    config = ralenet.get_config()
    config.data.database = "ludb"
    config.noise.kind = "emb"
    config.model.name = "ralenet_12lead"
    return config
