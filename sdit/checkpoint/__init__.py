"""Checkpoints that outlive layouts: fp32 state keyed by parameter name and global expert id, in safetensors shards.

A checkpoint is a folder `images-000000012800` with one `shard-NNNNN.safetensors` per writing rank and `manifest.json`,
which is written last. A shard holds flat fp32 pieces under keys `KIND/NAME@START`: KIND is `weight`, `ema` or an
optimizer moment, NAME a parameter or, for a stack of experts, `PARAMETER#EXPERT`, START the piece's first element in
the flattened tensor. Which rank wrote which piece follows from the keys alone, so any layout reads what any other
wrote.

`manifest.py` says what a manifest must hold; later versions may add fields. `length_images` is the length of the run,
fixed when it started.

torch.distributed.checkpoint was looked at first: its index is a pickle, it keeps no checksums, and its chunks are
boxes, while a ZeRO partition is a range of the flattened tensor.
"""
