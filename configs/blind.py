"""One model for any recording, under the honest protocol: every noise from −6 to +24 dB and none, any window."""

import ml_collections

from configs import honest


def get_config() -> ml_collections.ConfigDict:
    """Returns the honest configuration on whole recordings, with every kind of noise."""
    config = honest.get_config()
    config.data.database = "mitdb_recordings"
    config.noise.kind = "bw,ma,em,emb,none"
    # Half of the windows are in the lowest quarter of this range (see `augment`).
    config.noise.snr_db = -6.0
    config.noise.snr_db_high = 24.0
    config.optim.schedule = "cosine"
    config.optim.warmup_steps = 500
    config.optim.clip_norm = 1.0
    # 1.4 million windows: an hour and a half on two cores.
    config.train.epochs = 60
    config.train.eval_every = 2
    config.train.checkpoint_every = 2
    return config
