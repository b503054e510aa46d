"""What the passes of a step learn from: text, a teacher, or the model at a larger budget."""
