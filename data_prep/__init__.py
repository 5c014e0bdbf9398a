"""From PhysioNet's recordings to TFDS shards on disk; meets `ralenet_jax` nowhere but there."""
