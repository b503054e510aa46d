"""Who owns weights and gradients, and how they are updated."""
