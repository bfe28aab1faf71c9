"""What the commands for checkpoints, adapters and the Hub are made of."""
