"""Which layout of ranks a run would train fastest under, by a model of its time and memory."""
