"""From a checkpoint and a recipe to a smaller checkpoint, block by block."""
