"""Parameters, FLOPs, memory and exchanged bytes of a shape, without torch."""
