"""Published weights: folders of safetensors files, read into any layout of ranks, and written."""
