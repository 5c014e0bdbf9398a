"""The demo: the honest protocol on small simulated databases, trained in under two minutes on two cores."""

import ml_collections

from configs import honest


def get_config() -> ml_collections.ConfigDict:
    """Returns the demo's configuration."""
    config = honest.get_config()
    config.noise.kind = "emb"
    config.noise.snr_db = 0.0
    config.train.epochs = 5
    config.optim.learning_rate = 2e-3
    config.optim.schedule = "cosine"
    config.optim.warmup_steps = 50
    config.eval.kinds = "bw,ma,em,emb"
    config.eval.snr_db = (0.0,)
    return config
