"""Single-device maths that also runs sharded: transformer, routers, attention, experts. No training, no files."""
