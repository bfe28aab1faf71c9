"""What the commands for checkpoints, adapters and the Hub are made of."""

import logging


# PEFT imports bitsandbytes, which warns of an optional package for 4-bit weights on CPUs.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
