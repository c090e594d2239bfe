"""What a run will need, before it starts: arithmetic on the config and on the model's shapes, held against measurements."""
