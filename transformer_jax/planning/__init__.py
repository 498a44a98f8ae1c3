"""What a training step will take on devices that are not here: memory, FLOPs, collectives, time, money."""
