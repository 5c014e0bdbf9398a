"""One model for any recording, under the honest protocol: every noise from −6 to +24 dB and none, any window."""

import ml_collections

from configs import honest


def get_config() -> ml_collections.ConfigDict:
    """Returns the honest configuration on whole recordings, with every kind of noise."""
    config = honest.get_config()
    config.data.database = "mitdb_recordings"
    config.noise.kind = "bw,ma,em,emb,none"
    config.noise.snr_db = -6.0
    config.noise.snr_db_high = 24.0
    config.optim.schedule = "cosine"
    config.optim.warmup_steps = 500
    config.optim.clip_norm = 1.0
    return config
