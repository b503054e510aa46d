"""Training on sets that are larger than the disk: tokenised while the run trains."""
