"""What `finetune.py` and `segment.py` are made of."""
