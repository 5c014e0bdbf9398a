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
    # 6.8 million windows: some three minutes on an H200. Two CPU cores see 1.4 million in an hour and a half, which is
    # train.batch_size=32, optim.learning_rate=1e-3, train.epochs=60.
    config.optim.learning_rate = 1.5e-3
    config.train.batch_size = 256
    config.train.epochs = 300
    config.train.eval_every = 15
    config.train.checkpoint_every = 30
    return config
