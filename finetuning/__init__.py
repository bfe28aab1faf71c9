"""What `finetune.py`, `segment.py` and `evaluate.py` are made of."""

import checkpoint_tools as checkpoint_tools  # imports nothing, and quietens what PEFT imports
