"""How `checkpoints/sam-tiny` was made: drawn scenes, and training from scratch on them."""
