"""The honest protocol: split by record, noise split in time, fresh noise at every step, metrics in mV."""

import ml_collections

from configs import ralenet


def get_config() -> ml_collections.ConfigDict:
    """Returns the default configuration under the honest protocol."""
    config = ralenet.get_config()
    config.protocol = "honest"
    config.noise.fresh = True
    # An epoch is five times the paper's.
    config.train.epochs = 20
    return config
