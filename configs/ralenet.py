"""The default configuration: RA-LENet on one cell (bw, -4 dB) of the paper's protocol, every knob commented."""

import ml_collections
from ml_collections import config_dict


def get_config() -> ml_collections.ConfigDict:
    """Returns the locked default configuration."""
    config = ml_collections.ConfigDict()

    # Initial weights, order of the windows and fresh noise. What is trained and tested on has its own seeds below.
    config.seed = 0
    # "paper": windows split at random, one z-score of the clean window, noise from the whole recordings (comparable
    # with the published figures; patients stand in both sides). "honest": split by record, noise split in time,
    # normalised with the statistics of the noisy window, metrics in mV.
    config.protocol = "paper"

    config.data = ml_collections.ConfigDict()
    # Folder with the shards that `ralenet prepare` wrote.
    config.data.dir = "data"
    # "mitdb": two leads, windows around beats; "mitdb_recordings": windows from anywhere in the same recordings, with
    # varied gains and polarities, single leads, hum and white noise, and R peaks as a detector tells them (honest
    # protocol only); "ludb": twelve leads, always split by record.
    config.data.database = "mitdb"
    # Which windows are drawn, and how they are split (mitdb under the paper's protocol only).
    config.data.seed = 0
    # Windows drawn at random from all, and how many of them train; the others validate and test (likewise).
    config.data.num_windows = 10_000
    config.data.num_train = 8_000
    # False: training and validation windows are read into memory at the start. True: they stay in their shards and are
    # read ahead of the training, for databases larger than memory; the result is the same (not mitdb_recordings).
    config.data.stream = False

    config.noise = ml_collections.ConfigDict()
    # "bw", "ma", "em", "emb" (the sum of all three) or "none"; several with commas: drawn anew for each window.
    config.noise.kind = "bw"
    # Signal-to-noise ratio of the noisy window, dB.
    config.noise.snr_db = -4.0
    # None: every window at snr_db; else uniform between snr_db and this, dB.
    config.noise.snr_db_high = config_dict.placeholder(float)
    # False: each window keeps its noise for the whole training (the paper); True: fresh noise at every step.
    config.noise.fresh = False
    # Fixed noise, and always the noise of validation and test.
    config.noise.seed = 0

    config.model = ml_collections.ConfigDict()
    # "ralenet", "ralenet_mlp" (no local enhancement), "ralenet_nra" (no R-wave attention), "ralenet_12lead" (a trained,
    # frozen ralenet inside), or one of the rivals: "unet", "danet", "acdae".
    config.model.name = "ralenet"
    # Work directory of the training of that ralenet (ralenet_12lead only); read once, when the training starts.
    config.model.base = config_dict.placeholder(str)
    # What the named model is made of; None: as published under that name. The rivals have a dtype alone.
    # "partial", "depthwise" or "none": the convolution inside the feed-forward.
    config.model.local_enhancement = config_dict.placeholder(str)
    # Efficient channel attention after the feed-forward.
    config.model.efficient_channel_attention = config_dict.placeholder(bool)
    # The learned bias around the R wave.
    config.model.r_wave_attention = config_dict.placeholder(bool)
    # "float32" (None too) or "bfloat16": what products and activations are computed in, of any model. Parameters, what
    # is summed (normalisation, softmax, loss, running statistics) and what is saved stay float32.
    config.model.dtype = config_dict.placeholder(str)

    config.optim = ml_collections.ConfigDict()
    # "adam", "adamw" or "sgd".
    config.optim.name = "adam"
    config.optim.learning_rate = 1e-3
    # "constant" or "cosine" (to zero at the last step), after a linear warm-up of so many steps.
    config.optim.schedule = "constant"
    config.optim.warmup_steps = 0
    # Decoupled weight decay (adamw only).
    config.optim.weight_decay = 0.0
    # Gradients are scaled down to this global norm; 0: never.
    config.optim.clip_norm = 0.0

    config.train = ml_collections.ConfigDict()
    # Windows in one optimiser step, over all devices.
    config.train.batch_size = 32
    config.train.epochs = 100
    # Optimiser steps in one dispatch to the devices, at most (an epoch is cut into even parts).
    config.train.steps_per_dispatch = 50
    # Epochs between two validations, and between two checkpoints.
    config.train.eval_every = 1
    config.train.checkpoint_every = 1

    config.eval = ml_collections.ConfigDict()
    # Windows in one evaluation step, over all devices.
    config.eval.batch_size = 256
    # What `ralenet evaluate` tests: kinds with commas, and SNRs in dB, each with each. Empty: the training's own.
    config.eval.kinds = ""
    config.eval.snr_db = ()

    # Devices to train on, over all processes; 0: all (on a CPU: one host device for each core).
    config.num_devices = 0

    # Training over several processes (docs/pods.md); as it stands here, one process.
    config.distributed = ml_collections.ConfigDict()
    # True: the cluster's environment (TPU pod, SLURM, Kubernetes, Open MPI) tells what the next three would.
    config.distributed.auto = False
    # "HOST:PORT" of process 0, the number of processes, and which of them this one is, from 0.
    config.distributed.coordinator = config_dict.placeholder(str)
    config.distributed.num_processes = config_dict.placeholder(int)
    config.distributed.process_id = config_dict.placeholder(int)
    # Seconds after which a process that gives no sign of life counts as dead, and the others stop.
    config.distributed.timeout_s = 100
    # Seconds to wait at the start until all processes are there, and have read and compiled.
    config.distributed.start_timeout_s = 300

    return config.lock()
