"""What is right: the ticks of a trigger, the verdict on a tick, the next retry. Pure functions."""
