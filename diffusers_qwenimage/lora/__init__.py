"""LoRA files: read any format, prove what was read, write any format. Pure functions on state dicts."""
